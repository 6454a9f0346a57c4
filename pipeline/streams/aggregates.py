"""Stream three: aggregates for the dashboard. Events per second, minute and hour of event time, by type, source,
device and zone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from pipeline import keys
from pipeline.events import CANARY_TYPE
from pipeline.store import Command, Store
from pipeline.streams.stream import UNDECODABLE, Batch, Cut, Outcome, Stream

STEPS_S = {"1s": 1, "1m": 60, "1h": 3600}
DIMENSIONS = ("type", "source", "device", "zone")
SECONDS_KEPT_MS = 2 * 3_600_000  # counters per second are kept for events of the last two hours
MAX_VALUES = {"type": 1_000, "source": 1_000, "device": 1_000, "zone": 50_000}
OTHER = "~other"  # where values beyond the limit are counted: the key space stays bounded whatever clients send
RECENT_S = 60
_USERS_PER_COMMAND = 500


class Aggregates(Stream):
    """Counts since the last checkpoint; the store adds them up. Values beyond a dimension's limit count as `~other`."""

    name = "aggregates"

    def __init__(self, store: Store, retention_ms: int = 168 * 3_600_000) -> None:
        super().__init__(store)
        self._retention_ms = retention_ms
        self._pending: Counter[tuple[int, int, str]] = Counter()
        self._writing: Counter[tuple[int, int, str]] = Counter()
        self._seen: dict[int, set[str]] = {}
        self._new: dict[int, set[str]] = {}
        self.recent: dict[
            int, Counter[str]
        ] = {}  # arrival second -> "type:..." and "source:..." of the last minute, for the dashboard
        self._known: dict[str, set[str]] = {name: set() for name in DIMENSIONS}

    def process(self, batch: Batch, now: int) -> Outcome:
        outcome = Outcome()
        wanted: list[int] = []
        for index, event in enumerate(batch.events):
            if event is None:
                outcome.dead.append((index, UNDECODABLE))
                continue
            outcome.done += 1
            if event.event_type != CANARY_TYPE:
                wanted.append(index)
        events, ts, sources, zones = batch.events, batch.ts, batch.sources, batch.zones
        seconds = [ts[i] // 1000 for i in wanted]
        columns: tuple[Sequence[str | None], ...] = (
            [events[i].event_type for i in wanted],  # type: ignore[union-attr]  # None was left out above
            [sources[i] for i in wanted],
            [events[i].device_type for i in wanted],  # type: ignore[union-attr]
            [zones[i] for i in wanted],
        )
        # Counter counts in C: equal pairs of second and value become one entry before any Python runs on them.
        counted: list[tuple[int, str, int]] = [(second, "all", n) for second, n in Counter(seconds).items()]
        for name, values in zip(DIMENSIONS, columns, strict=True):
            known = self._known[name]
            for (second, value), n in Counter(zip(seconds, values, strict=True)).items():
                if value is None:
                    continue
                if value not in known:
                    value = self._bounded(name, value)
                counted.append((second, f"{name}:{value}", n))
        pending, oldest = self._pending, (now - SECONDS_KEPT_MS) // 1000
        for second, field, n in counted:
            pending[60, second - second % 60, field] += n
            pending[3600, second - second % 3600, field] += n
            if second > oldest:
                pending[1, second, field] += n
        self._see(seconds, [events[i].user_id for i in wanted])  # type: ignore[union-attr]
        self._note_arrivals(batch, wanted, columns)
        return outcome

    def _bounded(self, name: str, value: str) -> str:
        known = self._known[name]
        if len(known) >= MAX_VALUES[name]:
            value = OTHER
        known.add(value)
        return value

    def _see(self, seconds: list[int], users: list[str]) -> None:
        """Distinct users per hour of event time."""
        by_hour: dict[int, set[str]] = {}
        for second, user_id in zip(seconds, users, strict=True):
            hour = second - second % 3600
            if hour not in by_hour:
                by_hour[hour] = set()
            by_hour[hour].add(user_id)
        for hour, found in by_hour.items():
            fresh = found - self._seen.setdefault(hour, set())
            if fresh:
                self._seen[hour] |= fresh
                self._new.setdefault(hour, set()).update(fresh)

    def _note_arrivals(self, batch: Batch, wanted: list[int], columns: tuple[Sequence[str | None], ...]) -> None:
        """Counts of the last minute by type and source, for the dashboard."""
        arrivals = [batch.arrivals[i] // 1000 for i in wanted]
        for name, values in zip(("type", "source"), columns, strict=False):
            for (arrival, value), n in Counter(zip(arrivals, values, strict=True)).items():
                if arrival not in self.recent:
                    self.recent[arrival] = Counter()
                    for old in [second for second in self.recent if second < arrival - RECENT_S]:
                        del self.recent[old]
                self.recent[arrival][f"{name}:{value}"] += n

    def cut(self, now: int) -> Cut:
        self._writing, self._pending = self._pending, Counter()
        new, self._new = self._new, {}
        buckets: dict[str, int] = {}
        final: list[Command] = []
        for (step, start, field), count in self._writing.items():
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
        self._writing = Counter()
        for hour in sorted(self._seen)[:-3]:  # only recent hours are worth remembering; PFADD forgives a repetition
            del self._seen[hour]

    def unwritten(self, step: int) -> Iterator[tuple[int, str, int]]:
        """(bucket start s, field, count) of what the store does not have yet."""
        for pending in (self._writing, self._pending):
            for (of, start, field), count in list(pending.items()):
                if of == step:
                    yield start, field, count
