"""Starts the store, the Python service and Nexus, starts again what dies, and stops them in order.

    python -m pipeline.supervisor [--demo] [--tied]

It is one thread that waits for signals: SIGCHLD when a part has ended, SIGTERM, SIGINT or SIGHUP when all is to stop. Those
that reached only who started it are noticed within a second (--tied).
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # the imports take a while, and until main() there is nothing to let go of
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    from pipeline.embedded import EmbeddedStore, is_serving, spawn
    from pipeline.errors import AlreadyRunning, NexusError, SettingError
    from pipeline.operations.processes import missing_package, tie_to_parent
    from pipeline.operations.starter import Starter
    from pipeline.settings import Settings, address, child_environment, load, make_folders
except ModuleNotFoundError as lacking:
    sys.exit(f"nexus: {lacking}; run make clean, then make run")

_ROOT = Path(__file__).resolve().parent.parent
_BACKOFF_FIRST_S, _BACKOFF_MOST_S, _HEALTHY_AFTER_S = 0.2, 10.0, 3.0
_PROBE_EVERY_S = 0.05
_LOOK_EVERY_S = 1.0
_SETTLES_S = 2.0  # within which a part that is ready has come to do its work
_PATIENCE_S = 4.0  # with an answer that may have to wait for the store
_HURRIED_GRACE_S = 1.0
_AFTER_KILL_S = 15.0  # how long the processes of an owner that was killed may keep their ports
_WRONG_SETTING = 2  # the exit code of a program that takes exception to a variable; it has said so in one line
_STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def _always() -> bool:
    return True


def _never() -> bool:
    return False


def _nothing() -> str | None:
    return None


@dataclass(frozen=True)
class Part:
    """One supervised process: how it starts, when it counts as ready, what must hold before it starts, its grace in s.

    `spawn` starts a process in a session of its own; embedded.spawn() is such a function. `lost` tells why a process that
    runs cannot be reached any more and has to be started again, `why` for what trouble it has ended, `lacks` what its program
    cannot be run without, `idle` why it is ready and yet cannot do its work: told once, since starting it again would not help.
    """

    name: str
    spawn: Callable[[], subprocess.Popen[bytes]]
    ready: Callable[[], bool] = _always
    after: Callable[[], bool] = _always
    grace: float = 10.0
    lost: Callable[[], str | None] = _nothing
    why: Callable[[], str | None] = _nothing
    lacks: Callable[[], str | None] = _nothing
    idle: Callable[[], str | None] = _nothing


class _Refused(Exception):
    """A part ended before it was ever ready, for what starting it again will not mend."""


class _Run:
    """A part at run time: its process, and when it is due to be started again."""

    def __init__(self, part: Part, say: Callable[[str], None]) -> None:
        self.part = part
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._began = self._due = time.monotonic()
        self._backoff = _BACKOFF_FIRST_S
        self._was_ready = self.ready = False
        self._ending: float | None = None  # since when it is to end, having been lost
        self._told: str | None = None  # why it ended the last time
        self._settled: float | None = None  # by when it is to do its work; None: it does, or has said why not

    def step(self, now: float) -> None:
        """Start it when due, notice that it is ready, notice that it has ended. Raises _Refused."""
        if self._process is None:
            if now >= self._due and self.part.after():
                self._process, self._began = self.part.spawn(), now
        elif self._ended():
            healthy = self.ready and now - self._began >= _HEALTHY_AFTER_S
            self._schedule(now, self._reap(), healthy)
        elif not self.ready:
            if self.part.ready():
                self._was_ready = self.ready = True
                self._settled = now + _SETTLES_S
                self._say(f"{self.part.name} is ready after {time.monotonic() - self._began:.1f} s")
        elif self._ending is None:
            if lost := self.part.lost():
                self._say(f"{self.part.name} cannot be reached: {lost}; it is started again")
                self._process.send_signal(signal.SIGTERM)
                self._ending = now
            elif self._settled is not None:
                self._look(now, self._settled)
        elif now - self._ending > self.part.grace:
            self._process.send_signal(signal.SIGKILL)

    def _look(self, now: float, settled: float) -> None:
        idle = self.part.idle()
        if idle is None or now >= settled:
            self._settled = None
            if idle is not None:
                self._say(f"{self.part.name} cannot serve yet: {idle}")

    def stop(self, wait: Callable[[float], bool], hurried: bool) -> None:
        """SIGTERM, and SIGKILL when the grace is over. `wait(s)` waits for a signal; True means: hurry."""
        if self._process is None:
            return
        if not self._ended():
            self._process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while not self._ended():
            grace = min(self.part.grace, _HURRIED_GRACE_S) if hurried else self.part.grace
            left = began + grace - time.monotonic()
            if left <= 0:
                self._say(f"{self.part.name} has not ended within {grace:g} s: killed")
                self._process.send_signal(signal.SIGKILL)
                break
            hurried = wait(left) or hurried
        self._reap()

    def _ended(self) -> bool:
        """Whether the process has ended, which is left unreaped so that its id still names its group."""
        assert self._process is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _reap(self) -> int:
        """End what the process has left behind in its group, then collect it; the exit code."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._process, self.ready, self._ending, self._settled = None, False, None, None
        return code

    def _schedule(self, now: float, code: int, healthy: bool) -> None:
        """A part that was up and running is started again at once, however often it is killed; one that does not get there
        waits longer each time."""
        if code == _WRONG_SETTING and not self._was_ready:
            raise _Refused
        if code > 0 and not self._was_ready and self._backoff == _BACKOFF_FIRST_S and (lack := self.part.lacks()):
            self._say(f"{self.part.name} cannot be started: {lack}; run make clean, then make run")
            raise _Refused
        alive = now - self._began
        if healthy:
            self._backoff = _BACKOFF_FIRST_S
        self._due = now + self._backoff
        why = self.part.why() if code > 0 else None
        self._say(
            f"{self.part.name} ended {_cause(code)} after {alive:.1f} s; starting it again in {self._backoff:.1f} s"
        )
        if why is not None and why != self._told:
            self._say(f"{self.part.name}: {why}")
        self._told = why
        self._backoff = min(self._backoff * 2, _BACKOFF_MOST_S)

    def wake_in(self, now: float) -> float:
        """Seconds until it wants step() again, if no signal comes before."""
        if self._process is None:
            return max(self._due - now, _PROBE_EVERY_S)
        if not self.ready:
            return _PROBE_EVERY_S
        return _LOOK_EVERY_S


class Supervisor:
    """Runs the parts until a stop signal, or until `left`: who started it wants it no more. `parts` are in the order of the start;
    the stop goes the other way."""

    def __init__(self, parts: Sequence[Part], say: Callable[[str], None], left: Callable[[], bool] = _never) -> None:
        self._say, self._left = say, left
        self._runs = [_Run(part, say) for part in parts]
        self._stopping = 0

    def run(self) -> int:
        """Block until stopped; the parts have ended then, whatever happens. Call it from the main thread.

        0, or 2 where a part could not start for a setting, which it has named itself, or for a package that is not installed.
        """
        watched = {signal.SIGCHLD, *_watched_stops()}
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)  # none gets lost between a check and the wait that follows
        try:
            self._supervise(watched)
        except _Refused:
            return _WRONG_SETTING
        finally:
            self._say("stopping")
            for run in reversed(self._runs):
                run.stop(lambda left: self._wait(watched, left), self._stopping > 1)
            self._say("stopped")
        return 0

    def _supervise(self, watched: set[signal.Signals]) -> None:
        began, announced = time.monotonic(), False
        while not self._stopping and not self._left():
            for run in self._runs:
                run.step(time.monotonic())
            if not announced and all(run.ready for run in self._runs):
                announced = True
                self._say(f"all ready after {time.monotonic() - began:.1f} s; Ctrl-C stops")
            now = time.monotonic()
            self._wait(watched, min(run.wake_in(now) for run in self._runs))

    def _wait(self, watched: set[signal.Signals], seconds: float) -> bool:
        """Wait for a signal; True once a second stop signal says to hurry."""
        info = signal.sigtimedwait(watched, seconds)
        if info is not None and info.si_signo in _STOP:
            self._stopping += 1
        return self._stopping > 1


def _watched_stops() -> set[signal.Signals]:
    """The stop signals, without SIGHUP under nohup: a blocked signal arrives even where it is ignored."""
    return {sign for sign in _STOP if sign != signal.SIGHUP or signal.getsignal(sign) != signal.SIG_IGN}


def _cause(code: int) -> str:
    return f"with code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"


def get(host: str, port: int, path: str, patience_s: float = 1.0) -> tuple[int, bytes] | None:
    """What an HTTP GET is answered with: status and body; None without an answer."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(host.strip("[]"), port, timeout=patience_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def parts_of(settings: Settings, store: EmbeddedStore | None, demo: bool) -> list[Part]:
    """The parts of the whole system, in the order of the start; without `store` the settings name an external one."""
    environment = child_environment(settings)
    if not environment.get("PYTHON_EVENT_API_URL", "").strip():  # Nexus is to find the service that is started here
        environment["PYTHON_EVENT_API_URL"] = address(settings.api_host, settings.api_port)

    def python(*words: str) -> Callable[[], subprocess.Popen[bytes]]:
        return lambda: spawn([sys.executable, *words], environment, cwd=_ROOT)

    def has_store() -> bool:
        return store is None or is_serving(settings)

    def service_up() -> bool:
        return get(settings.api_host, settings.api_port, "/health") is not None

    def nexus_up() -> bool:
        return get(settings.nexus_host, settings.nexus_port, "/healthz") is not None

    def nexus_idle() -> str | None:
        answer = get(settings.nexus_host, settings.nexus_port, "/readyz", _PATIENCE_S)
        if answer is None or answer[0] not in (200, 503):
            return "GET /readyz is not answered"
        return None if answer[0] == 200 else str(json.loads(answer[1]).get("why", "GET /readyz answered 503"))

    def nexus_serves() -> bool:
        answer = get(settings.nexus_host, settings.nexus_port, "/readyz")
        return answer is not None and answer[0] == 200

    def lacks(module: str) -> Callable[[], str | None]:
        return lambda: missing_package(module, _ROOT)

    service, nexus = python("event_api.py"), python("app.py", "--no-banner")
    parts = [
        Part("Python service", service, service_up, has_store, grace=10, lacks=lacks("event_api")),
        Part("Nexus", nexus, nexus_up, has_store, grace=30, lacks=lacks("app"), idle=nexus_idle),
    ]
    if store is not None:
        parts.insert(0, Part("store", store.start, has_store, grace=30, lost=store.lost, why=store.trouble))
    if demo:
        parts.append(
            Part("demo", python("-m", "pipeline.tools.demo", "--url", settings.nexus_url), after=nexus_serves, grace=5)
        )
    return parts


def check_ports(settings: Settings, patience_s: float = 0.0) -> None:
    """Raises AlreadyRunning, naming port and setting, where a port that the parts need is taken for `patience_s`."""
    wanted = [
        ("NEXUS_PORT", settings.nexus_host, settings.nexus_port),
        ("API_PORT", settings.api_host, settings.api_port),
    ]
    if settings.embedded and settings.embedded_store_port:
        wanted.append(("EMBEDDED_STORE_PORT", "127.0.0.1", settings.embedded_store_port))
    deadline = time.monotonic() + patience_s
    with contextlib.ExitStack() as held:  # all at once, so that two settings with one port are noticed too
        for setting, host, port in wanted:
            while error := _listen(held, host, port):
                if time.monotonic() >= deadline:
                    raise AlreadyRunning(
                        f"port {port} on {host} cannot be opened: {error}; stop what holds it, or set {setting}"
                    )
                time.sleep(_PROBE_EVERY_S)


def _listen(held: contextlib.ExitStack, host: str, port: int) -> str | None:
    """Listen on the port, without SO_REUSEPORT: that would share it with its holder; the reason where it fails."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        server = held.enter_context(socket.socket(family, kind))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections just closed do not count
        server.bind(address)
        server.listen(1)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def banner(settings: Settings, colour: bool, alone: bool = False) -> str:
    """The addresses to know, one a line; without the Python service's where Nexus is started `alone`."""

    nexus = settings.nexus_host, settings.nexus_port
    rows = [
        ("Dashboard", address(*nexus, "/nexus")),
        ("Python service", address(settings.api_host, settings.api_port, "/docs")),
        ("Ingest", address(*nexus, "/api/ml/events/ingest")),
        (
            "Store",
            f"redis-cli -s {settings.socket_path}"
            if settings.embedded
            else "external, as REDIS_URL or REDIS_HOST says",
        ),
        ("Log", str(settings.log_dir / "nexus-ai.log")),
    ]
    if alone:
        del rows[1]
    bold, plain = ("\033[1;36m", "\033[0m") if colour else ("", "")
    return "\n".join(f"  {bold}{name:<15}{plain} {value}" for name, value in rows)


def say(text: str) -> None:
    """Print at once; a terminal or a pipe that is gone must not keep the parts from being stopped."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), f"{text}\n".encode(errors="replace"))


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after a stop, 1 where another process is in the way, 2 for a setting that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.supervisor", description=__doc__)
    parser.add_argument("--demo", action="store_true", help="send synthetic ride-hailing traffic too")
    parser.add_argument("--tied", action="store_true", help="stop when the process that started this one ends")
    given = parser.parse_args(arguments)
    if given.tied:
        tie_to_parent()
    store: EmbeddedStore | None = None
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        settings = load()
        make_folders(settings)
        store = EmbeddedStore(settings) if settings.embedded else None
        killed = store.lock() if store else False
        check_ports(settings, _AFTER_KILL_S if killed else 0.0)
        say(banner(settings, sys.stdout.isatty()))
        parts, left = parts_of(settings, store, given.demo), Starter().has_left if given.tied else _never
        return Supervisor(parts, lambda text: say(f"nexus: {text}"), left).run()
    except KeyboardInterrupt:  # before the first part was started
        return 0
    except SettingError as error:
        print(f"nexus: {error}", file=sys.stderr)
        return _WRONG_SETTING
    except (NexusError, OSError) as error:
        print(f"nexus: {error}", file=sys.stderr)
        return 1
    finally:
        if store:
            store.release()  # or the next start would take this one for killed, and wait for its ports


if __name__ == "__main__":
    sys.exit(main())
