"""Joint work: requests that come while another is at work wait, and are then done together, by the first of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

A = TypeVar("A")
R = TypeVar("R")


class Joint(Generic[A, R]):
    """`work` answers each of some requests, in their order; what it raises is raised to all of them. Of requests beyond the
    first, as many are done at a time as weigh `most` together. It takes no thread of its own: who comes first leads, and
    passes the lead on to the first of those who have come meanwhile.
    """

    def __init__(
        self, work: Callable[[list[A]], Sequence[R]], most: int, weight: Callable[[A], int] = lambda _: 1
    ) -> None:
        self._work, self._most, self._weight = work, most, weight
        self._lock = threading.Lock()
        self.waiting: deque[_Ticket[A, R]] = deque()
        self._leading = False

    def ask(self, request: A, patience_s: float = -1) -> R:
        """Blocks until the request is done. Raises TimeoutError where it waited in vain for so long; -1 waits for ever."""
        ticket: _Ticket[A, R] = _Ticket(request, self._weight(request))
        with self._lock:
            self.waiting.append(ticket)
            ticket.leads, self._leading = not self._leading, True
        if not ticket.leads and not ticket.turn.acquire(timeout=patience_s):
            self._give_up(ticket)
        if ticket.leads:
            self._lead()
        if ticket.error is not None:
            try:
                raise ticket.error
            finally:
                del ticket  # the error refers to this frame by its traceback: a cycle, which may never be freed
        return ticket.answer[0]

    def _give_up(self, ticket: _Ticket[A, R]) -> None:
        """Raises TimeoutError, unless it was done or called just now."""
        with self._lock:
            if ticket.leads or ticket.answer or ticket.error is not None:
                return
            if ticket in self.waiting:
                self.waiting.remove(ticket)
        raise TimeoutError("what was begun before has not come to an end")

    def _lead(self) -> None:
        group: list[_Ticket[A, R]] = []
        with self._lock:
            size = 0
            while self.waiting and (not group or size + self.waiting[0].weight <= self._most):
                group.append(self.waiting.popleft())
                size += group[-1].weight
        try:
            for ticket, answer in zip(group, self._work([ticket.request for ticket in group]), strict=True):
                ticket.answer = (answer,)
        except Exception as error:  # noqa: BLE001  each waiting request is told, whatever it was
            for ticket in group:
                ticket.error = error
        with self._lock:
            heir = self.waiting[0] if self.waiting else None
            self._leading = heir is not None
            if heir is not None:
                heir.leads = True
        for ticket in group[1:]:
            ticket.turn.release()
        if heir is not None:
            heir.turn.release()
        del group, ticket, heir  # as in ask()


class _Ticket(Generic[A, R]):
    __slots__ = ("answer", "error", "leads", "request", "turn", "weight")

    def __init__(self, request: A, weight: int) -> None:
        self.request, self.weight = request, weight
        self.leads = False
        self.turn = threading.Lock()  # held until it is done or leads: cheaper than an Event, and used once
        self.turn.acquire()
        self.answer: tuple[R, ...] = ()
        self.error: Exception | None = None
