"""Stream three: aggregates for the dashboard. Events per second, minute and hour of event time, by type, source,
device and zone."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from pipeline import keys
from pipeline.store import Command, Store
from pipeline.streams.stream import Batch, Cut, Outcome, Stream

STEPS_S = {"1s": 1, "1m": 60, "1h": 3600}
DIMENSIONS = ("type", "source", "device", "zone")
SECONDS_KEPT_MS = 2 * 3_600_000  # counters per second are kept for events of the last two hours
MAX_VALUES = {"type": 1_000, "source": 1_000, "device": 1_000, "zone": 50_000}
OTHER = "~other"  # where values beyond the limit are counted: the key space stays bounded whatever clients send
RECENT_S = 60
_USERS_PER_COMMAND = 500
# Dimensions whose values are counted together, since they are few; they are told apart when they are written or asked for.
_TOGETHER = (("type", "source", "device"), ("zone",))
Counts = tuple[Counter[tuple[Any, ...]], ...]  # for each of these: (second of event time, values) -> events


class Aggregates(Stream):
    """Counts since the last checkpoint; the store adds them up. Values beyond a dimension's limit count as `~other`.

    They are kept by second; minutes and hours are added up when they are written or asked for.
    """

    name = "aggregates"

    def __init__(self, store: Store, retention_ms: int = 168 * 3_600_000) -> None:
        super().__init__(store)
        self._retention_ms = retention_ms
        self._pending, self._writing = _no_counts(), _no_counts()
        self._oldest = 0  # counters per second are kept after this one
        self._seen: dict[int, set[str]] = {}
        self._new: dict[int, set[str]] = {}
        self.recent: dict[
            int, Counter[str]
        ] = {}  # arrival second -> "type:..." and "source:..." of the last minute, for the dashboard
        self._known: dict[str, set[str | None]] = {name: {None} for name in DIMENSIONS}

    def process(self, batch: Batch, now: int) -> Outcome:
        if batch.canary:
            return batch.outcome()
        whole: tuple[Sequence[str | None], ...] = (batch.types, batch.sources, batch.devices, batch.zones)
        columns = {n: self._bounded(n, batch.counted(column)) for n, column in zip(DIMENSIONS, whole, strict=True)}
        seconds = [ts // 1000 for ts in batch.counted(batch.ts)]
        for counter, names in zip(self._pending, _TOGETHER, strict=True):
            counter.update(zip(seconds, *(columns[name] for name in names), strict=True))  # counts in C
        self._see(seconds, batch.counted(batch.users))
        self._note_arrivals(batch.counted(batch.arrivals), columns)
        self._oldest = (now - SECONDS_KEPT_MS) // 1000
        return batch.outcome()

    def _bounded(self, name: str, values: Sequence[str | None]) -> Sequence[str | None]:
        """A column in which values beyond the dimension's limit are `~other`."""
        known = self._known[name]
        if known.issuperset(values):
            return values
        room = MAX_VALUES[name] + 1 - len(known)  # None is known, but no value
        known.update(islice(dict.fromkeys(value for value in values if value not in known), room))
        return [value if value in known else OTHER for value in values]

    def _see(self, seconds: list[int], users: Sequence[str]) -> None:
        """Distinct users per hour of event time."""
        by_hour: dict[int, set[str]] = {}
        first, last = min(seconds, default=0) // 3600 * 3600, max(seconds, default=0) // 3600 * 3600
        if first == last:
            by_hour[first] = set(users)
        else:
            for second, user_id in zip(seconds, users, strict=True):
                by_hour.setdefault(second - second % 3600, set()).add(user_id)
        for hour, found in by_hour.items():
            fresh = found - self._seen.setdefault(hour, set())
            if fresh:
                self._seen[hour] |= fresh
                self._new.setdefault(hour, set()).update(fresh)

    def _note_arrivals(self, arrivals: Sequence[int], columns: dict[str, Sequence[str | None]]) -> None:
        """Counts of the last minute by type and source, for the dashboard."""
        at = 0
        while at < len(arrivals):  # which ascend
            second = arrivals[at] // 1000
            after = bisect_left(arrivals, (second + 1) * 1000, at)
            if second not in self.recent:
                self.recent[second] = Counter()
                for old in [known for known in self.recent if known < second - RECENT_S]:
                    del self.recent[old]
            for name in ("type", "source"):
                for value, n in Counter(columns[name][at:after]).items():
                    self.recent[second][f"{name}:{value}"] += n
            at = after

    def cut(self, now: int) -> Cut:
        self._writing, self._pending = self._pending, _no_counts()
        new, self._new = self._new, {}
        buckets: dict[str, int] = {}
        final: list[Command] = []
        totals = _by_field(self._writing)
        for step in STEPS_S.values():
            totals = _coarser(totals, step)
            for (start, field), count in totals.items():
                if step > 1 or start > self._oldest:
                    key = f"{keys.AGGREGATE}{step}:{start}"
                    buckets[key] = SECONDS_KEPT_MS if step == 1 else self._retention_ms
                    final.append(("HINCRBY", key, field, count))
        for hour, users in new.items():
            key = f"{keys.SEEN}{hour}"
            buckets[key] = self._retention_ms
            ordered = list(users)
            for at in range(0, len(ordered), _USERS_PER_COMMAND):
                final.append(("PFADD", key, *ordered[at : at + _USERS_PER_COMMAND]))
        final += [("PEXPIRE", key, kept) for key, kept in buckets.items()]
        return Cut(iter(()), final, self._written)

    def _written(self) -> None:
        self._writing = _no_counts()
        for hour in sorted(self._seen)[:-3]:  # only recent hours are worth remembering; PFADD forgives a repetition
            del self._seen[hour]

    def unwritten(self, step: int) -> Iterator[tuple[int, str, int]]:
        """(bucket start s, field, count) of what the store does not have yet."""
        for counts in (self._writing, self._pending):
            for (start, field), count in _coarser(_by_field(counts), step).items():
                if step > 1 or start > self._oldest:
                    yield start, field, count


def _no_counts() -> Counts:
    return tuple(Counter() for _ in _TOGETHER)


def _by_field(counts: Counts) -> Counter[tuple[int, str]]:
    """Counts by second and field; "all" has every event."""
    totals: Counter[tuple[int, str]] = Counter()
    for names, counter in zip(_TOGETHER, counts, strict=True):
        for (second, *values), n in list(counter.items()):  # list: another thread may be counting
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    totals[second, f"{name}:{value}"] += n
            if names == _TOGETHER[0]:
                totals[second, "all"] += n
    return totals


def _coarser(counts: Counter[tuple[int, str]], step: int) -> Counter[tuple[int, str]]:
    """The same by starts of longer steps (s)."""
    totals: Counter[tuple[int, str]] = Counter()
    for (start, field), n in counts.items():
        totals[start - start % step, field] += n
    return totals
