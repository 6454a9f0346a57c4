"""Stream three: aggregates for the dashboard. Events per second, minute and hour of event time, by type, source,
device and zone."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from pipeline import keys
from pipeline.store import Command, Store
from pipeline.streams.stream import Batch, Cut, Outcome, Stream
from pipeline.streams.unwritten import Unwritten, stored

STEPS_S = {"1s": 1, "1m": 60, "1h": 3600}
DIMENSIONS = ("type", "source", "device", "zone")
SECONDS_KEPT_MS = 2 * 3_600_000  # counters per second are kept for events of the last two hours
MAX_VALUES = {"type": 1_000, "source": 1_000, "device": 1_000, "zone": 50_000}
OTHER = "~other"  # where values beyond the limit are counted: the key space stays bounded whatever clients send
RECENT_S = 60
_VALUES_AT_ONCE = 500  # in one command
_BUCKETS_AT_ONCE = 20  # are read in one step, which nothing else may interrupt
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
        self._counts = Unwritten(_no_counts)
        self._oldest = 0  # counters per second are kept from this one on
        self._seen: dict[int, set[str]] = {}
        self._new: dict[int, set[str]] = {}
        self.recent: dict[
            int, Counter[str]
        ] = {}  # arrival second -> "type:..." and "source:..." of the last minute, for the dashboard
        self._known: dict[str, set[str | None]] = {name: {None} for name in DIMENSIONS}
        self._unlisted: dict[str, list[str | None]] = {name: [] for name in DIMENSIONS}  # known, but not to the store

    def load(self, now: int) -> None:
        found = self.store.many([("SMEMBERS", keys.VALUES + name) for name in DIMENSIONS])
        for name, values in zip(DIMENSIONS, found, strict=True):
            self._known[name].update(value.decode() for value in values)

    def process(self, batch: Batch, now: int) -> Outcome:
        if batch.canary:
            return batch.outcome()
        whole: tuple[Sequence[str | None], ...] = (batch.types, batch.sources, batch.devices, batch.zones)
        columns = {n: self._bounded(n, batch.counted(column)) for n, column in zip(DIMENSIONS, whole, strict=True)}
        seconds = [ts // 1000 for ts in batch.counted(batch.ts)]
        for counter, names in zip(self._counts.count_from(batch.first_ordinal), _TOGETHER, strict=True):
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
        room = max(0, MAX_VALUES[name] + 1 - len(known))  # None is known, but no value
        new = list(islice(dict.fromkeys(value for value in values if value not in known), room))
        known.update(new)
        self._unlisted[name] += new
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
        new, self._new = self._new, {}
        kept: dict[str, int] = {}  # key -> ms
        final: list[Command] = []
        totals = _by_field(self._counts.cut())
        for step in STEPS_S.values():
            totals = _coarser(totals, step)
            for (start, field), count in totals.items():
                if step > 1 or start >= self._oldest:
                    key = f"{keys.AGGREGATE}{step}:{start}"
                    kept[key] = kept_ms(step, self._retention_ms) + _ahead(start + step, now)
                    final.append(("HINCRBY", key, field, count))
        for hour, users in new.items():
            key = f"{keys.SEEN}{hour}"
            kept[key] = self._retention_ms + _ahead(hour + 3600, now)
            final += _in_pieces("PFADD", key, users)
        for name, values in self._unlisted.items():
            if values:
                key = keys.VALUES + name
                kept[key] = self._retention_ms
                final += _in_pieces("SADD", key, values)
                self._unlisted[name] = []
        final += [("PEXPIRE", key, ms) for key, ms in kept.items()]
        return Cut(iter(()), final, self._written)

    def _written(self) -> None:
        self._counts.written()
        for hour in sorted(self._seen)[:-3]:  # only recent hours are worth remembering; PFADD forgives a repetition
            del self._seen[hour]

    def unwritten(self, step: int) -> Iterator[tuple[int, int, str, int]]:
        """(first ordinal, bucket start s, field, count) of what is not in the store as long as the position there is not beyond that."""
        for ordinal, counts in self._counts.parts():
            for (start, field), count in _coarser(_by_field(counts), step).items():
                if step > 1 or start >= self._oldest:
                    yield ordinal, start, field, count


def kept_ms(step: int, retention_ms: int) -> int:
    """How long counts of a step (s) are kept, from the end of their bucket on at least."""
    return SECONDS_KEPT_MS if step == 1 else retention_ms


def counted(
    store: Store, stream: Aggregates | None, by: str, step: int, starts: Sequence[int]
) -> dict[str, dict[int, int]]:
    """Events in the buckets of a step (s) that begin at `starts`: value of the dimension -> start -> count. `stream` is the
    running one, None where another instance runs it."""
    prefix = f"{by}:"
    begins, length = prefix.encode(), len(prefix)
    found: dict[str, dict[int, int]] = {}
    unwritten: dict[int, list[tuple[int, str, int]]] = {}
    for first, start, field, count in stream.unwritten(step) if stream is not None else ():
        if field.startswith(prefix):
            unwritten.setdefault(start, []).append((first, field[length:], count))
    for at in range(0, len(starts), _BUCKETS_AT_ONCE):
        some = starts[at : at + _BUCKETS_AT_ONCE]
        ordinal, buckets = stored(store, Aggregates.name, [f"{keys.AGGREGATE}{step}:{start}" for start in some])
        for start, bucket in zip(some, buckets, strict=True):
            for raw, number in bucket:
                if raw.startswith(begins):
                    found.setdefault(raw[length:].decode(), {})[start] = int(number)
            for first, value, count in unwritten.get(start, ()):
                if first >= ordinal:
                    points = found.setdefault(value, {})
                    points[start] = points.get(start, 0) + count
    return found


def _ahead(end_s: int, now: int) -> int:
    """How long from now (epoch ms) until a bucket ends."""
    return max(0, end_s * 1000 - now)


def _in_pieces(command: str, key: str, values: Iterable[Any]) -> Iterator[Command]:
    ordered = list(values)
    return ((command, key, *ordered[at : at + _VALUES_AT_ONCE]) for at in range(0, len(ordered), _VALUES_AT_ONCE))


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
