"""What keeps a part from its work, told in the log when it begins and when it is over, not at each attempt between."""

from __future__ import annotations

import logging
import time

from pipeline.errors import Fenced, StoreError

log = logging.getLogger(__name__)


class Trouble:
    """Of the part `of`, which tries again and again."""

    def __init__(self, of: str) -> None:
        self._of = of
        self._kind: type[Exception] | None = None
        self._since = 0.0

    def goes_on(self, error: Exception) -> str:
        """An attempt failed; answers why, in words. A line in the log where it is of another kind than the one before."""
        expected = isinstance(error, (StoreError, Fenced))
        why = error.message if isinstance(error, (StoreError, Fenced)) else f"{type(error).__name__}: {error}"
        if self._kind is None:
            self._since = time.monotonic()
        if self._kind is not type(error):
            self._kind = type(error)
            level = logging.WARNING if expected else logging.ERROR
            log.log(level, "%s is restarting", self._of, extra={"reason": why}, exc_info=None if expected else error)
        return why

    def is_over(self) -> None:
        """It does its work. Costs nothing where it did all the time."""
        if self._kind is not None:
            self._kind = None
            log.info("%s goes on", self._of, extra={"after_s": round(time.monotonic() - self._since, 1)})
