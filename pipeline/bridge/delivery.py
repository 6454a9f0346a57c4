"""Windows and parts: the next events of the log, cut into parts that go to the partner side by side, each user in one
part.

A window is finished when all of its parts are; windows are committed in the log's order. So a user's events reach the
partner in order, and the checkpoint never passes an event that is under way.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.bridge.suspects import MAX_ATTEMPTS, Suspect
from pipeline.commit_log.frames import BRIDGE_ONLY, CANARY, Frame, Position

READ_BYTES = 1 << 19  # of the log in one step
MOST_BYTES = 8 << 20  # about so many in a window: what waits in memory is bounded, whatever the events' size


@dataclass(slots=True)
class Part:
    """A window's events of one lane. `todo` holds what is still to be sent, as (from, to) pairs, the first one last."""

    lane: int
    lanes: int
    bodies: list[bytes]
    indexes: Sequence[int]  # their places in the window
    todo: list[tuple[int, int]]
    dead: list[tuple[int, str, int]] = field(default_factory=list)  # index in the window, reason, attempts
    failures: int = 0  # calls for the first slice that failed, perhaps for what it holds
    suspect: Suspect | None = None  # the first event, where it failed alone

    def next(self, most: int) -> tuple[int, int]:
        """The slice to send next, of at most so many events; it stays to be done until settled."""
        start, stop = self.todo[-1]
        if stop - start > most:
            self.todo[-1] = (start + most, stop)
            self.todo.append((start, start + most))
        return self.todo[-1]

    def settled(self, rejected: Sequence[tuple[int, str]]) -> None:
        """The slice has been taken, or (index in the slice, reason) refused."""
        start, _ = self.todo.pop()
        self.dead += [(self.indexes[start + index], f"refused: {reason}", 1) for index, reason in rejected]
        self._passed(start)

    def halve(self) -> None:
        """One event may spoil the slice: what is before it and behind it goes in calls of its own."""
        start, stop = self.todo.pop()
        middle = (start + stop) // 2
        self.todo += [(middle, stop), (start, middle)]

    def give_up(self, reason: str) -> None:
        """The slice's only event will never be taken."""
        start, _ = self.todo.pop()
        tried = self.suspect.failures if self.suspect is not None and self.suspect.index == start else 1
        self.dead.append((self.indexes[start], reason, tried))
        self._passed(start)

    def pull(self, index: int) -> None:
        """Let an event be the next, in a call of its own."""
        rest: list[tuple[int, int]] = []
        for start, stop in self.todo:
            pieces = ((index + 1, stop), (start, index)) if start <= index < stop else ((start, stop),)
            rest += [piece for piece in pieces if piece[0] < piece[1]]
        self.todo = [*rest, (index, index + 1)]

    def _passed(self, start: int) -> None:
        if self.suspect is not None and self.suspect.index == start:
            self.suspect = None
        self.failures = min(self.failures, MAX_ATTEMPTS - 1)  # what is left is not above suspicion


@dataclass(slots=True)
class Window:
    """Consecutive events of the log: pieces of frames, those for the partner in `bodies`, and the position behind
    them."""

    after: Position
    lanes: int
    bodies: list[bytes] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    unfinished: int = 0
    canaries: int = 0
    full: bool = False
    size: int = 0  # about, in bytes
    broken: list[tuple[Frame, int]] = field(default_factory=list)  # events that cannot be sent: frame and index
    _frames: list[tuple[Frame, int]] = field(default_factory=list)  # each with the index at which its piece begins
    _starts: list[int] = field(default_factory=list)
    _users: list[int] = field(default_factory=list)  # 32 bits for the user of each

    def event(self, index: int) -> tuple[Frame, int]:
        """The frame that holds an event of `bodies`, and the event's index in it."""
        piece = bisect_right(self._starts, index) - 1
        frame, first = self._frames[piece]
        return frame, first + index - self._starts[piece]

    def ordinal(self, index: int) -> int:
        frame, at = self.event(index)
        return frame.ordinal + at

    @property
    def last_arrival(self) -> int:
        return self._frames[-1][0].received_at

    def add(self, frame: Frame, start: int, stop: int) -> None:
        self._starts.append(len(self.bodies))
        self._frames.append((frame, start))
        self.bodies += [record[8:] for record in frame.records[start:stop]]  # behind the event time (frames.py)
        self._users += frame.user_hashes()[start:stop]
        if frame.to & CANARY:
            self.canaries += stop - start

    def divide(self) -> None:
        """Cut the events into parts, one per lane, each with all events of its users."""
        bodies, lanes = self.bodies, self.lanes
        if lanes == 1:
            self.parts = [Part(0, 1, bodies, range(len(bodies)), [(0, len(bodies))])] if bodies else []
        else:
            indexes: list[list[int]] = [[] for _ in range(lanes)]
            for index, user in enumerate(self._users):
                indexes[user % lanes].append(index)
            self.parts = [
                Part(lane, lanes, [bodies[i] for i in mine], mine, [(0, len(mine))])
                for lane, mine in enumerate(indexes)
                if mine
            ]
        self.unfinished = len(self.parts)

    def done_prefix(self) -> int:
        """How many of its events, from the first on, need no more sending."""
        if self.unfinished == 0:
            return len(self.bodies)
        return min(self.parts[0].todo)[0] if self.lanes == 1 and self.parts[0].todo else 0


def cut(
    frames: deque[Frame],
    position: Position,
    lanes: int,
    most: int,
    canaries: bool,
    edge: Callable[[int], bool] = lambda _: False,
) -> Window:
    """The next window from `position` on, of at most so many events, out of `frames`, which begin there and lose what
    it takes. Canaries are passed over where the partner does not take them. It ends before an event whose ordinal is
    an `edge`."""
    window = Window(position, lanes)
    room = MOST_BYTES
    while frames and len(window.bodies) < most and room > 0:
        frame, start = frames[0], window.after.index
        if edge(frame.ordinal + start) and window.after != position:
            break
        stop = len(frame.records)
        if frame.broken and frame.to & BRIDGE_ONLY:
            window.broken += [(frame, index) for index in range(start, stop)]
        elif frame.to & BRIDGE_ONLY and (canaries or not frame.to & CANARY):
            mean_bytes = (frame.next - frame.address) // len(frame.records) + 1
            stop = min(stop, start + most - len(window.bodies), start + 1 + room // mean_bytes)
            room -= mean_bytes * (stop - start)
            window.add(frame, start, stop)
        if stop == len(frame.records):
            window.after = frame.after()
            frames.popleft()
        else:
            window.after = Position(frame.address >> 24, frame.address & 0xFFFFFF, stop, frame.ordinal + stop)
    window.size = MOST_BYTES - room
    window.full = len(window.bodies) >= most or room <= 0
    window.divide()
    return window


class Ahead:
    """The log from the next window on, as far as it has been read. `read` gives whole frames from a position on, about so many
    bytes of them, none at the log's end."""

    def __init__(self, read: Callable[[Position, int], list[Frame]], position: Position) -> None:
        self._read, self._cursor, self._reading = read, position, position
        self._frames: deque[Frame] = deque()

    @property
    def waiting(self) -> int:
        """How many events have been read and not cut yet."""
        return sum(len(frame.records) for frame in self._frames) - (self._cursor.index if self._frames else 0)

    async def fill(self, most: int) -> int:
        """Have so many events waiting, or all that the log has; answers how many there are. Read in steps: calls that are answered
        meanwhile are followed by the next at once."""
        room = MOST_BYTES - sum(frame.next - frame.address for frame in self._frames)
        while self.waiting < most and room > 0 and (frames := self._read(self._reading, READ_BYTES)):
            self._frames.extend(frames)
            self._reading = frames[-1].after()
            room -= sum(frame.next - frame.address for frame in frames)
            await asyncio.sleep(0)
        return self.waiting

    def cut(self, lanes: int, most: int, canaries: bool, edge: Callable[[int], bool]) -> Window:
        """The next window; see cut()."""
        window = cut(self._frames, self._cursor, lanes, most, canaries, edge)
        self._cursor = window.after
        return window


def truncated(window: Window, position: Position) -> Window:
    """The finished beginning of an unfinished window that began at `position`."""
    count = 0 if window.broken else window.done_prefix()
    if count == 0:
        return Window(position, 1)
    frame, at = window.event(count - 1)
    stop = at + 1
    made = Window(
        frame.after()
        if stop == len(frame.records)
        else Position(frame.address >> 24, frame.address & 0xFFFFFF, stop, frame.ordinal + stop),
        1,
        window.bodies[:count],
    )
    made._frames, made._starts = window._frames, window._starts
    made.parts = window.parts
    made.canaries = sum(1 for i in range(count) if window.event(i)[0].to & CANARY) if window.canaries else 0
    return made
