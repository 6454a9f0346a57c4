"""Whether those who started this process have been told to end, and have not passed it on."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_NOT_PASSED_ON = (signal.SIGHUP, signal.SIGINT)
_MASKS = ("SigBlk", "SigIgn", "SigCgt")


class Starter:
    """The make and the terminal that this process was started from.

    GNU make passes on SIGTERM alone: any other signal is to have come from the terminal, for all of the group, and it
    waits for its child. A terminal that is closed tells nobody but the leader of its session.
    """

    def __init__(self) -> None:
        self._make = Path(f"/proc/{os.getppid()}")
        self._terminal: int | None = None
        self._in_front = False  # a job that was put into the background, and left there, is to outlive its terminal
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            with contextlib.suppress(OSError):
                self._terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)

    def has_left(self) -> bool:
        """A signal has ended make but for its wait, or the terminal is gone."""
        return self._make_waits() or self._terminal_is_gone()

    def _make_waits(self) -> bool:
        """Whether it is in its handler: the signal is blocked there, and its default in force again."""
        try:
            if not (self._make / "comm").read_text().strip().endswith("make"):
                return False
            lines = (self._make / "status").read_text().splitlines()
        except OSError:  # it has ended, which comes as a signal
            return False
        masks = {name: int(value, 16) for name, _, value in (line.partition(":") for line in lines) if name in _MASKS}
        blocked, ignored, caught = (masks[name] for name in _MASKS)
        return any(blocked & ~ignored & ~caught & 1 << sign - 1 for sign in _NOT_PASSED_ON)

    def _terminal_is_gone(self) -> bool:
        if self._terminal is None:
            return False
        try:
            self._in_front = os.tcgetpgrp(self._terminal) == os.getpgrp()
        except OSError:
            return self._in_front
        return False
