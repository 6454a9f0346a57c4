"""Watches the store: whether it is there, how full it is, and whether ingest must refuse until there is room again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from typing import Any

from pipeline.errors import StoreError, StoreRefused
from pipeline.ingest import Ingest
from pipeline.settings import Settings
from pipeline.store import Store

MIN_FREE_DISK = 64 << 20  # bytes
REFUSE_AT = 0.85  # of the store's memory limit
_NO_AOF = "append-only file is off: a crash of the store loses acknowledged events; set appendonly yes"
_NO_INFO = "how full it is and what it keeps is not seen, so ingest refuses nothing before it is full: grant Nexus's user +info"
log = logging.getLogger(__name__)


class StoreWatch:
    """What the store said of itself at the last look: status (online, degraded, full, readonly, loading, offline; unknown where it
    does not let itself be asked), bytes, and whether it keeps what it has acknowledged (`durable`, None where it has not said)."""

    def __init__(self, store: Store, settings: Settings, ingest: Ingest, of_events: Callable[[], float | None]) -> None:
        """`of_events`: bytes that stored events take just now, where that is known."""
        self._store, self._settings, self._ingest, self._of_events = store, settings, ingest, of_events
        self._told: str | None = None  # the status that the log was told last
        self.status: dict[str, Any] = {
            "status": "offline",
            "detail": "not asked yet",
            "used_bytes": None,
            "max_bytes": None,
            "durable": None,
            "full_of": None,
        }

    @property
    def memory_used(self) -> float:
        """The share of the memory limit that was used, 0 without a limit."""
        used, limit = self.status["used_bytes"], self.status["max_bytes"]
        return used / limit if used and limit else 0.0

    def look(self) -> None:
        """Ask the store; close ingest near its memory limit and open it again. Raises StoreError when it is away."""
        try:
            info = self._store.info("memory", "persistence", "replication")
        except StoreRefused as error:
            unknown = dict.fromkeys(("used_bytes", "max_bytes", "full_of", "durable"))
            self.status = {**self.status, **unknown, "status": "unknown", "detail": f"{error.message}; {_NO_INFO}"}
            self._close(None)
            self._tell()
            return
        except StoreError as error:
            self.status.update(status=_why_away(str(error)), detail=error.message, full_of=None)
            self._tell()
            raise
        used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
        status, detail = _condition(info)
        full_of = "disk" if status == "full" else None
        if (full := self._no_disk()) is not None:
            status, detail, full_of = "full", full, "disk"
        elif (full := self._no_memory(used, limit)) is not None:
            status, detail, full_of = "full", full, "memory"
        self._close(full)
        self.status = {
            "status": status,
            "detail": detail,
            "used_bytes": used,
            "max_bytes": limit or None,
            "embedded": self._settings.embedded,
            "full_of": full_of,
            "durable": info.get("aof_enabled") != "0" and not _evicts(info),
        }
        self._tell()

    def _tell(self) -> None:
        """A line in the log for each change of the status."""
        status = self.status["status"]
        if status != self._told:
            level = logging.INFO if status == "online" else logging.WARNING
            log.log(level, "store is %s", status, extra={"reason": self.status["detail"]})
        self._told = status

    def _close(self, why: str | None) -> None:
        """Have ingest refuse, or with None take events; a line in the log for each change."""
        before, self._ingest.closed = self._ingest.closed, why
        if why is not None and before is None:
            log.warning("ingest is closed", extra={"reason": why})
        elif why is None and before is not None:
            log.info("ingest is open again")

    def _no_disk(self) -> str | None:
        """Why ingest must refuse. The write that first meets a full disk is still answered by the store, so it is refused
        before it comes to that."""
        folder = self._settings.data_dir
        if self._settings.embedded and (free := shutil.disk_usage(folder).free) < MIN_FREE_DISK:
            return f"{free >> 20} MiB are free in {folder}; ingest refuses below {MIN_FREE_DISK >> 20}"
        return None

    def _no_memory(self, used: int, limit: int) -> str | None:
        """Why ingest must refuse, and what fills the memory where that is not the events. Raises StoreError."""
        if limit > 0 and used > limit * REFUSE_AT:
            refuses = f"{used / limit:.0%} of the memory limit is used; ingest refuses from {REFUSE_AT:.0%} on"
            of_events = self._of_events()
            if of_events is None or of_events > used / 2:
                return refuses
            return (
                f"{refuses}. Stored events are {of_events / limit:.0%}, the rest is mostly users' state, which retention "
                f"does not let go of: raise {'STORE_MAX_MEMORY' if self._settings.embedded else 'the maxmemory of its server'}"
            )
        return None


def _why_away(error: str) -> str:
    if "loading" in error.lower():
        return "loading"
    return "readonly" if "READONLY" in error else "offline"


def _condition(info: dict[str, str]) -> tuple[str, str | None]:
    if info.get("loading") == "1":
        return "loading", "the store is reading its data from disk; it takes requests once it has done so"
    if info.get("role") == "slave" and info.get("slave_read_only") == "1":
        return "readonly", "the store is a replica and takes no writes; point REDIS_URL at its primary"
    if info.get("aof_enabled") == "0":
        return "degraded", _NO_AOF
    if info.get("aof_last_write_status") == "err":
        return "full", "the store cannot write its append-only file: is its disk full?"
    if _evicts(info):
        return (
            "degraded",
            "at its memory limit the store evicts what Nexus keeps: set maxmemory-policy noeviction, not "
            + info["maxmemory_policy"],
        )
    return "online", None


def _evicts(info: dict[str, str]) -> bool:
    return info.get("maxmemory_policy", "noeviction") != "noeviction" and info.get("maxmemory", "0") != "0"
