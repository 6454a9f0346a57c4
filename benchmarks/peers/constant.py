"""The trivial route: a constant answer from the web server that Nexus runs on, which takes the body in and drops it.

python -m benchmarks.peers.constant PORT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from granian import Granian
from granian.constants import Interfaces

_BODY = b'{"accepted":1,"duplicates":0,"rejected":[],"event_ids":[]}'
_HEADERS = [("Content-Type", "application/json"), ("Content-Length", str(len(_BODY)))]


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    environ["wsgi.input"].read()
    start_response("202 Accepted", _HEADERS)
    return [_BODY]


def main() -> None:
    Granian(
        "benchmarks.peers.constant:app",
        "127.0.0.1",
        int(sys.argv[1]),
        interface=Interfaces.WSGI,
        blocking_threads=16,
        backpressure=512,
        log_enabled=False,
    ).serve()


if __name__ == "__main__":
    main()
