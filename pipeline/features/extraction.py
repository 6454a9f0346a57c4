"""Extraction: what an event adds to each family, as one function per event type, written as source and compiled.

A field is read and judged once for all columns that look at it, of whatever entity, before anything is changed. Generated code
does so at a third of the cost of closures, and this is what every event goes through. It comes in two forms that share the
judging: one gives what an event adds as a list, the other counts a batch's events of the type in the newest tiles of their
entities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from math import gcd
from typing import Any, Protocol

from pipeline.definitions import ENVELOPE, Entity, Malformed
from pipeline.events import Event, Stored
from pipeline.features.aggregations import BUCKETS, LARGEST, SCALE, WEIGHT_SCALE, Column, sorting
from pipeline.features.families import Family
from pipeline.features.tiles import Entity as Tiles
from pipeline.features.tiles import Layout

Data = Mapping[str, Any]
Deltas = list[tuple[int, int]]  # (family's index, what the event adds)
Extract = Callable[[Data, Event | Stored, int], Deltas]  # data, event, event time (ms)
Dead = list[tuple[int, str]]  # index, reason
Match = tuple[str, tuple[Any, ...]] | None


@dataclass(slots=True)
class Owners:
    """Of one kind the entities that a batch's events are of: by index the id, None where there is none; by id the entities, all
    that are named; and those that an event was counted in, to which others are added."""

    ids: Sequence[str | None] | Mapping[int, str | None]
    entities: Mapping[str, Tiles]
    counted: dict[str, Tiles]


# indexes, events, event times, now (ms), ordinal of index 0, owners by kind, indexes of events that it passes over (ahead of
# the clock, or from before 1970), and of those that cannot be counted -> the latest event time that was, or 0
Count = Callable[
    [Sequence[int], Sequence[Event | Stored | None], Sequence[int], int, int, Mapping[Entity, Owners], list[int], Dead],
    int,
]


class Counting(Protocol):
    """The part of Windows that tiles other than the newest ones are counted by."""

    layout: Layout

    def ripen(self, entity: Tiles, now: int) -> None: ...

    def turn(self, entity: Tiles, group: int, tile: int, now: int) -> bool: ...

    def add_late(self, entity: Tiles, ts: int, deltas: Deltas, now: int) -> None: ...


def compile_extraction(layout: Layout, event_type: str | None) -> Extract:
    """The function for a type's events, None for the types that no family names. What it returns raises Malformed."""
    extract: Extract = _compiled_extraction(layout.families, event_type)
    return extract


def compile_counting(windows: Mapping[Entity, Counting], event_type: str | None, kinds: Collection[Entity]) -> Count:
    """The function that counts events of a type in the entities of these kinds. Each event counts in an entity unless that holds
    it already, by its position. Of one that has a field it cannot take nothing is counted."""
    chosen = {kind: some for kind, some in windows.items() if kind in kinds}
    families = tuple((kind, some.layout.families) for kind, some in chosen.items())
    methods = [method for some in chosen.values() for method in (some.ripen, some.turn, some.add_late)]
    count: Count = _compiled_counting(families, event_type)(*methods)
    return count


@lru_cache(maxsize=1_000)
def _compiled_extraction(families: tuple[Family, ...], event_type: str | None) -> Any:
    writer = _Writer([("e", Layout(families))], event_type)
    writer.write("def extract(data, event, ts):", 0)
    writer.judge(1)
    writer.write("out = []", 1)
    for i, _ in writer.families["e"]:
        writer.write(f"if e{i}: out.append(({i}, e{i}))", 1)
    writer.write("return out", 1)
    return writer.compile("extract")


@lru_cache(maxsize=1_000)
def _compiled_counting(families: tuple[tuple[Entity, tuple[Family, ...]], ...], event_type: str | None) -> Any:
    """Of the methods of each kind's windows a function; it holds no others, so that equal families share one."""
    layouts = [(kind, Layout(some)) for kind, some in families]
    writer = _Writer(layouts, event_type)
    methods = [f"{kind}_{method}" for kind, _ in layouts for method in ("ripen", "turn", "add_late")]
    writer.write(f"def bind({', '.join(methods)}):", 0)
    writer.write("def count(indexes, events, times, now, first, owners, apart, dead):", 1)
    writer.write("latest = 0", 2)
    for kind, _ in layouts:
        writer.write(f"of = owners[{kind!r}]", 2)
        writer.write(f"{kind}_ids, {kind}_all, {kind}_counted = of.ids, of.entities, of.counted", 2)
    writer.write("begins = ends = 0", 2)
    writer.write("for index in indexes:", 2)
    writer.write("ts = times[index]", 3)
    writer.write("if not 0 <= ts <= now:", 3)
    writer.write("apart.append(index)", 4)
    writer.write("continue", 4)
    # Most events of a batch are of one moment, and all tiles the same throughout a grain.
    grain = gcd(*(length for _, layout in layouts for length in layout.lengths)) or 1
    writer.write("if not begins <= ts < ends:", 3)
    writer.write(f"begins = ts - ts % {grain}", 4)
    writer.write(f"ends = begins + {grain}", 4)
    for kind, layout in layouts:
        for group, length in enumerate(layout.lengths):
            writer.write(f"{kind}_tile{group} = ts // {length}", 4)
    writer.write("event = events[index]", 3)
    writer.write("data = event.data", 3)
    writer.write("try:", 3)
    writer.write("pass", 4)
    writer.judge(4)
    writer.write("except Malformed as error:", 3)
    writer.write("dead.append((index, f'malformed: {error}'))", 4)
    writer.write("continue", 4)
    for kind, layout in layouts:
        writer.write(f"{kind}_id = {kind}_ids[index]", 3)
        writer.write(f"if {kind}_id is not None:", 3)
        writer.write(f"{kind} = {kind}_all[{kind}_id]", 4)
        writer.write(f"if first + index >= {kind}.position:", 4)
        writer.count(kind, layout, 5)
        writer.write(f"{kind}_counted[{kind}_id] = {kind}", 5)
    writer.write("if ts > latest: latest = ts", 3)
    writer.write("return latest", 2)
    writer.write("return count", 1)
    return writer.compile("bind")


class _Writer:
    """Lines of source, and the constants they name. What an event adds to a family is in a variable, its kind and index."""

    def __init__(self, layouts: Sequence[tuple[str, Layout]], event_type: str | None) -> None:
        self.families = {
            kind: [(i, f) for i, f in enumerate(layout.families) if f.event_type in (None, event_type)]
            for kind, layout in layouts
        }
        self._always: set[str] = set()  # variables that are never 0
        self._lines: list[str] = []
        self._constants: dict[str, Any] = {
            "sorting": sorting,
            "log": math.log,
            "digest": digest,
            "judge": judge,
            "Malformed": Malformed,
        }

    def compile(self, name: str) -> Any:
        exec(compile("\n".join(self._lines), "<extraction>", "exec"), self._constants)
        return self._constants[name]

    def write(self, line: str, depth: int) -> None:
        self._lines.append("    " * depth + line)

    def judge(self, depth: int) -> None:
        """Read the fields, and have in each family's variable what the event adds."""
        numbers: dict[tuple[str, Match], list[tuple[str, Family, Column, int]]] = {}
        tables: dict[str, dict[str, dict[Any, int]]] = {}
        names: dict[tuple[str, Match], list[tuple[str, Column]]] = {}
        sums: dict[str, int] = {}  # variables -> what every event adds
        for variable, family in self._variables():
            sums[variable] = 0
            for lane, column in enumerate(family.columns):
                shift = sum(family.widths[:lane])
                if column.kind == "bits":
                    names.setdefault((column.field or "", column.where), []).append((variable, column))
                elif column.kind != "ones":
                    numbers.setdefault((column.field or "", column.where), []).append((variable, family, column, shift))
                elif column.where is None:
                    sums[variable] += 1 << shift
                else:
                    table = tables.setdefault(column.where[0], {}).setdefault(variable, {})
                    for value in column.where[1]:
                        table[value] = table.get(value, 0) + (1 << shift)
        self._always = {variable for variable, constant in sums.items() if constant}
        if numbers or tables or names:
            self.write("get = data.get", depth)
        for constant in dict.fromkeys(sums.values()):
            self.write(" = ".join([v for v, c in sums.items() if c == constant] + [str(constant)]), depth)
        for field, by_variable in tables.items():
            self.write("try:", depth)
            self.write(f"v = {self._read(field)}", depth + 1)
            for variable, table in by_variable.items():
                self.write(f"{variable} += {self._constant(table)}.get(v, 0)", depth + 1)
            self.write("except TypeError: pass  # a list or an object", depth)
        for (field, where), columns in numbers.items():
            self._number(field, where, columns, depth)
        for (field, where), columns_ in names.items():
            self.write(f"v = {self._read(field)}", depth)
            self.write("if v is not None" + self._and(where) + ":", depth)
            self.write("h = digest(v if type(v) is str else repr(v))", depth + 1)
            for variable, column in columns_:
                self.write(f"{variable} = 1 << h % {column.bits}", depth + 1)

    def _variables(self) -> Iterator[tuple[str, Family]]:
        for kind, families in self.families.items():
            for i, family in families:
                yield f"{kind}{i}", family

    def _number(self, field: str, where: Match, columns: list[tuple[str, Family, Column, int]], depth: int) -> None:
        kinds = {column.kind for _, _, column, _ in columns}
        self.write(f"n = get({field!r})", depth)
        self.write("if n is not None" + self._and(where) + ":", depth)
        inner = depth + 1
        self.write(
            f"if type(n) is not float and type(n) is not int or not {-LARGEST!r} <= n <= {LARGEST!r}: judge(n, {field!r})",
            inner,
        )
        if kinds & {"total", "squares", "decayed"}:
            self.write(f"q = round(n * {SCALE})", inner)
        if kinds & {"greatest", "least", "latest"}:
            self.write("s = sorting(n)", inner)
        sums: dict[str, list[str]] = {}
        for variable, family, column, shift in columns:
            match column.kind:
                case "present":
                    sums.setdefault(variable, []).append(str(1 << shift))
                case "total":
                    sums.setdefault(variable, []).append(f"(q << {shift})")
                case "squares":
                    sums.setdefault(variable, []).append(f"(q * q << {shift})")
                case "greatest":
                    self.write(f"{variable} = s", inner)
                case "least":
                    self.write(f"{variable} = {2**64 - 1} - s", inner)
                case "latest":
                    self.write(f"{variable} = (ts if ts > 0 else 0) << 64 | s", inner)
                case "buckets":
                    low, high = column.more
                    # The first and the last bucket are for what lies outside.
                    place = f"log(n / {low!r}) / {math.log(high / low)!r} * {BUCKETS - 2}"
                    self.write(f"if n <= {low!r}: {variable} = 1", inner)
                    self.write(f"elif n >= {high!r}: {variable} = {1 << 32 * (BUCKETS - 1)}", inner)
                    self.write(f"else: {variable} = 1 << 32 * min(1 + int({place}), {BUCKETS - 2})", inner)
                case _:
                    half_ms, tile_ms = column.more[0] * 1000, family.tiles[0]
                    self.write(f"w = round(2.0 ** (ts % {tile_ms} / {half_ms}) * {WEIGHT_SCALE})", inner)
                    self.write(f"{variable} = w + (w * q << 64)", inner)
        for variable, parts in sums.items():
            self.write(f"{variable} += {' + '.join(parts)}", inner)

    def count(self, kind: str, layout: Layout, depth: int) -> None:
        """Add the variables of a kind to the newest tiles of its entity."""
        self.write(f"if {kind}.future: {kind}_ripen({kind}, now)", depth)
        self.write(f"tiles, values, touched = {kind}.tiles, {kind}.values, 0", depth)
        by_group: dict[int, list[tuple[int, Family]]] = {}
        for i, family in self.families[kind]:
            by_group.setdefault(layout.group[i], []).append((i, family))
        for group, families in by_group.items():
            inner = depth
            variables = [f"{kind}{i}" for i, _ in families]
            if self._always.isdisjoint(variables):
                self.write(f"if {' or '.join(variables)}:", inner)
                inner += 1
            tile = f"{kind}_tile{group}"
            self.write(f"if tiles[{group}] == {tile} or {kind}_turn({kind}, {group}, {tile}, now):", inner)
            for i, family in families:
                self._merge(f"{kind}{i}", i, family, sure=len(families) == 1, depth=inner + 1)
            late = ", ".join(f"({i}, {kind}{i})" for i, _ in families)
            self.write(f"else: {kind}_add_late({kind}, ts, ({late},), now)", inner)
        # Not before: whoever turns to another tile marks what it moves by the same bits.
        self.write(f"{kind}.touched |= touched", depth)

    def _merge(self, variable: str, i: int, family: Family, sure: bool, depth: int) -> None:
        """`sure`: the variable is known not to be 0."""
        match family.columns[0].kind:
            case "bits":
                self.write(f"v = values[{i}] | {variable}", depth)
                self.write(f"if v != values[{i}]: values[{i}] = v; touched |= {1 << i}", depth)
            case "greatest" | "least" | "latest":
                self.write(f"if {variable} > values[{i}]: values[{i}] = {variable}; touched |= {1 << i}", depth)
            case _:
                condition = "" if sure or variable in self._always else f"if {variable}: "
                self.write(f"{condition}values[{i}] += {variable}; touched |= {1 << i}", depth)

    def _and(self, where: Match) -> str:
        return "" if where is None else f" and {self._read(where[0])} in {self._constant(where[1])}"

    def _read(self, field: str) -> str:
        return f"event.{field}" if field in ENVELOPE else f"get({field!r})"

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name


def judge(number: Any, field: str) -> None:
    """Raises Malformed for what is no number, or too large to be summed."""
    takes = "a number" if type(number) not in (int, float) else f"a number up to {LARGEST:g} in size"
    raise Malformed(f"data.{field} is {number!r:.80}; it takes {takes}")


@lru_cache(maxsize=100_000)
def digest(name: str) -> int:
    """32 bits that stand for a name."""
    return int.from_bytes(blake2b(name.encode(errors="replace"), digest_size=4).digest(), "little")
