"""Nexus with the six features of the first version alone: what the whole catalogue is compared with, end to end."""

from __future__ import annotations

import sys

from flask import Flask

from benchmarks import altered
from benchmarks.harness import System
from pipeline import runtime
from pipeline.catalogue import FEATURES

SIX = ("acceptance_rate", "response_time", "recent_rejections", "event_count_5m", "event_count_1h", "event_count_24h")


class SixFeatures(System):
    """The system with these six."""

    supervisor = "benchmarks.six_features"


def nexus() -> Flask:
    runtime.FEATURES = tuple(f for f in FEATURES if f.name in SIX)  # type: ignore[attr-defined]
    return altered.worker()


if __name__ == "__main__":
    sys.exit(altered.main("benchmarks.six_features", sys.argv[1:]))
