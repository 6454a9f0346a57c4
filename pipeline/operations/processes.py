"""What a process of Nexus needs of the system: a free port, an end with its parent, and a store of its own where none
is set."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path

from pipeline import embedded
from pipeline.errors import AlreadyRunning
from pipeline.settings import Settings

_PR_SET_PDEATHSIG = 1
_MOST_S = 30.0  # that imports take on a machine which has much else to do


def require_free_port(host: str, port: int, setting: str) -> None:
    """Raises AlreadyRunning where somebody listens. The server itself would share the port in silence
    (SO_REUSEPORT)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise AlreadyRunning(
            f"port {port} on {host} is not free ({error.strerror}); stop what listens there, or set {setting}"
        ) from error


def missing_package(module: str, folder: Path) -> str | None:
    """What the import of a program's module in `folder` does not find, as Python says it; None where nothing is missing."""
    try:
        tried = subprocess.run(
            [sys.executable, "-c", f"import {module}"], cwd=folder, stderr=subprocess.PIPE, text=True, timeout=_MOST_S
        )
    except subprocess.TimeoutExpired:
        return None
    found = re.search(r"^ModuleNotFoundError: (.*)\s*\Z", tried.stderr, re.MULTILINE)
    return found[1] if found else None


def tie_to_parent() -> None:
    """End this process with SIGTERM when its parent ends, even by kill -9. From the main thread.

    SIGTERM ends it until it has a handler of its own: the web server's worker begins with its parent's, which there does
    nothing, so that a stop amid its start was lost.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def heed_signals() -> None:
    """Run this process's signal handlers within a second, whichever thread took the signal. From the main thread.

    Python runs them in the main thread alone, and that one sleeps on in the web server's wait where another thread was
    given the signal, as one that is just being made often is: a stop amid a burst of requests was not noticed. Only for
    that wait: a call of the store in the main thread would never time out, since after each signal Python reads again, and
    the kernel's timeout (pool.py) begins anew.
    """
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)


def at_exit(stop: Callable[[], None]) -> None:
    """Run `stop` when this worker process ends in order, with the signals of heed_signals() ended; atexit does not run
    in one."""

    def end() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        stop()

    Finalize(None, end, exitpriority=100)


@contextlib.contextmanager
def own_store(settings: Settings) -> Iterator[None]:
    """The embedded store, started here where it is wanted and nobody serves it yet, and stopped at the end."""
    if not settings.embedded or embedded.is_serving(settings):
        yield
        return
    store = embedded.EmbeddedStore(settings)
    store.start()
    try:
        store.wait_ready()
        yield
    finally:
        store.stop()
