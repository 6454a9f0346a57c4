"""What the log says on request, beyond what it always says: of each call, checkpoint, turn and change one line."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pipeline.operations.live_settings import LiveSettings
from pipeline.runtime import Runtime
from pipeline.store import Store
from tests.conftest import client_of, quick
from tests.faults import INGEST
from tests.helpers import Clock, event, until


def test_at_debug_the_log_tells_of_calls_checkpoints_turns_of_jobs_and_settings_taken_over(
    nexus: Runtime, store: Store, clock: Clock, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "pipeline")

    def told(message: str, least: int = 0, **fields: Any) -> bool:
        return any(
            record.getMessage().startswith(message)
            and fields.items() <= vars(record).items()
            and vars(record).get("ordinal", least) >= least
            for record in list(caplog.records)
        )

    assert client_of(nexus).post(INGEST, json={"events": [event(), event()]}).status_code == 202
    until(lambda: told("partner called", events=2, status=200), "the call")
    until(lambda: told("checkpoint made", least=2, stream="features"), "the checkpoint")
    until(lambda: told("job ran", job="snapshot", error=None), "the turn")
    LiveSettings(store, quick("unix:///elsewhere", tmp_path), clock).change({"FEATURE_SYNC_INTERVAL": 77}, None, "test")
    until(lambda: told("settings taken over: FEATURE_SYNC_INTERVAL is 77"), "the setting")
