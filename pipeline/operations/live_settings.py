"""The settings that change while Nexus runs: the environment gives the first value, the store keeps the later ones. And the
audit of all that people order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from pipeline import keys
from pipeline.commit_log import checkpoints
from pipeline.errors import SettingError, StoreError, Unprocessable
from pipeline.events import rfc3339
from pipeline.settings import RUNTIME, SPECS, Settings, masked
from pipeline.store import Command, Store

AUDIT_LENGTH = 1_000
MAX_REASON = 500
log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class LiveSettings:
    """The values in force. Reading one costs nothing; `refresh` fetches what another instance may have changed."""

    def __init__(self, store: Store, settings: Settings, clock: Callable[[], int]) -> None:
        self._store, self._clock = store, clock
        self._environment = {name: getattr(settings, SPECS[name].field) for name in RUNTIME}
        self._overrides: dict[str, Any] = {}
        self._lock = threading.Lock()  # a refresh must not put back what it read before a change
        self.changed: list[Callable[[], None]] = []  # called after any change, by whoever noticed it

    def __getitem__(self, name: str) -> Any:
        overrides = self._overrides
        return overrides[name] if name in overrides else self._environment[name]

    def refresh(self) -> None:
        """Read the overrides again; one that this version cannot take is left out, the environment's value stands."""
        with self._lock:
            found = self._read()
            changed = found != self._overrides
            self._overrides = found
        if changed:
            log.debug("settings taken over: %s", "; ".join(self.overridden()) or "none overrides the environment")
            self._tell()

    def _read(self) -> dict[str, Any]:
        flat = self._store.call("HGETALL", keys.SETTINGS)
        pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
        found: dict[str, Any] = {}
        for raw_name, raw in pairs:
            name = raw_name.decode()
            if name in RUNTIME:
                try:
                    found[name] = SPECS[name].parse(msgspec.json.decode(raw))
                except (SettingError, msgspec.DecodeError):
                    continue
        return found

    def change(self, wanted: Mapping[str, Any], reason: str | None, by: str) -> None:
        """Set values, null goes back to the environment's; all or none. Raises SettingError, Unprocessable,
        StoreError."""
        if reason is not None and len(reason) > MAX_REASON:
            raise Unprocessable(
                "reason_too_long", f"a reason has at most {MAX_REASON} characters, this one {len(reason)}"
            )
        parsed: dict[str, Any] = {}
        for name, value in wanted.items():
            if name not in RUNTIME:
                raise Unprocessable("unknown_setting", f"{name} is no run-time setting; there are {', '.join(RUNTIME)}")
            parsed[name] = None if value is None else self._meant(name, SPECS[name].parse(value))
        with self._lock:
            self._write(parsed, reason, by)
        self._tell()

    def _meant(self, name: str, value: Any) -> Any:
        """A value that is given back as it is shown, its password masked, is the one in force."""
        if not isinstance(value, str) or ":***@" not in value:
            return value
        if value != masked(self[name]):
            raise Unprocessable("masked_password", f"{name} holds *** for a password; give the password itself")
        return self[name]

    def _write(self, parsed: Mapping[str, Any], reason: str | None, by: str) -> None:
        commands: list[Command] = []
        changes: list[tuple[str, Any, Any]] = []
        for name, value in parsed.items():
            before = self[name]
            after = self._environment[name] if value is None else value
            commands.append(
                ("HDEL", keys.SETTINGS, name) if value is None else ("HSET", keys.SETTINGS, name, _encode(value))
            )
            if after != before:
                changes.append((name, _shown(before), _shown(after)))
        if commands:
            self.keep(commands, changes, reason, by)
        self._overrides = {
            **{name: value for name, value in self._overrides.items() if name not in parsed},
            **{name: value for name, value in parsed.items() if value is not None},
        }

    def keep(
        self, commands: list[Command], changes: Sequence[tuple[str, Any, Any]], reason: str | None, by: str
    ) -> None:
        """Write what a person ordered, and in the same step its record in the audit; then tell it in the log. `changes` are
        names with what was and what is."""
        at = rfc3339(self._clock())
        told = {name: {"from": was, "to": now, "reason": reason, "by": by} for name, was, now in changes}
        audit: list[Command] = [
            ("LPUSH", keys.AUDIT, _encode({"at": at, "name": name, **what})) for name, what in told.items()
        ]
        checkpoints.write(self._store, [*commands, *audit, ("LTRIM", keys.AUDIT, 0, AUDIT_LENGTH - 1)])
        for name, what in told.items():
            log.info("%s was changed", name, extra=what)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Each setting with its value, bounds and where the value comes from. `environment` is what null goes back to: the
        default where the variable is unset."""
        return {
            name: {
                "value": _shown(self[name]),
                "default": SPECS[name].default_value,
                "environment": _shown(self._environment[name]),
                "source": "store" if name in self._overrides else "environment",
                "min": SPECS[name].minimum,
                "max": SPECS[name].maximum,
                "unit": SPECS[name].unit,
                "meaning": SPECS[name].meaning,
            }
            for name in RUNTIME
        }

    def overridden(self) -> list[str]:
        """One line for each value of the store that overrides the environment's."""
        return [
            f"{n} is {_shown(v)!r}, set at run time (the environment says {_shown(self._environment[n])!r})"
            for n, v in self._overrides.items()
        ]

    def audit(self, limit: int = 100) -> list[dict[str, Any]]:
        """The latest changes, newest first."""
        return [msgspec.json.decode(raw) for raw in self._store.call("LRANGE", keys.AUDIT, 0, limit - 1)]

    def refresh_quietly(self) -> None:
        """As refresh, keeping the values in force while the store is away."""
        try:
            self.refresh()
        except StoreError:
            return

    def _tell(self) -> None:
        for listener in self.changed:
            listener()


def _shown(value: Any) -> Any:
    return masked(value) if isinstance(value, str) else value
