"""Extraction: what an event adds to each family, as one function per event type, written as source and compiled.

A field is read and judged once for all columns that look at it, and columns without anything to add cost nothing. Generated code
does so at a third of the cost of closures, and this is what every event goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from pipeline.aggregations import LARGEST, SCALE, WEIGHT_SCALE, Column, bucket_of, sorting
from pipeline.definitions import ENVELOPE, Malformed
from pipeline.events import Event, Stored
from pipeline.families import Family

Deltas = list[tuple[int, int, int]]  # (family's index, its finest tile, what the event adds)
Extract = Callable[[Mapping[str, Any], Event | Stored, int], Deltas]  # data, event, event time (ms)
Match = tuple[str, tuple[Any, ...]] | None


def compile_extraction(families: Sequence[tuple[int, Family]]) -> Extract:
    """The function for the families, with their indexes, that events of one type count in. What it returns raises Malformed."""
    return _Writer(families).compile()


class _Writer:
    """Lines of source, and the constants they name."""

    def __init__(self, families: Sequence[tuple[int, Family]]) -> None:
        self._families = families
        self._lines: list[str] = []
        self._constants: dict[str, Any] = {
            "sorting": sorting,
            "bucket_of": bucket_of,
            "mask_of": mask_of,
            "judge": judge,
        }

    def compile(self) -> Extract:
        numbers: dict[tuple[str, Match], list[tuple[int, Family, Column, int]]] = {}
        tables: dict[str, dict[int, dict[Any, int]]] = {}
        names: list[tuple[int, Column]] = []
        sums: dict[int, int] = {}  # families with lanes -> what every event adds
        for i, family in self._families:
            for lane, column in enumerate(family.columns):
                shift = sum(family.widths[:lane])
                if column.light:
                    sums.setdefault(i, 0)
                if column.kind == "bits":
                    names.append((i, column))
                elif column.kind != "ones":
                    numbers.setdefault((column.field or "", column.where), []).append((i, family, column, shift))
                elif column.where is None:
                    sums[i] += 1 << shift
                else:
                    table = tables.setdefault(column.where[0], {}).setdefault(i, {})
                    for value in column.where[1]:
                        table[value] = table.get(value, 0) + (1 << shift)
        variable = {i for of in tables.values() for i in of} | {
            i for group in numbers.values() for i, _, column, _ in group if column.light
        }
        tile = self._tiles()
        always = ", ".join(f"({i}, {tile[i]}, {c})" for i, c in sums.items() if c and i not in variable)
        self._write(f"out = [{always}]", 1)
        self._write("get = data.get", 1)
        for i in sums.keys() & variable:
            self._write(f"d{i} = {sums[i]}", 1)
        for field, by_family in tables.items():
            self._write(f"v = {self._read(field)}", 1)
            self._write("if v.__hash__ is not None:", 1)
            for i, table in by_family.items():
                self._write(f"d{i} += {self._constant(table)}.get(v, 0)", 2)
        for (field, where), group in numbers.items():
            self._number(field, where, group, tile)
        for i, column in names:
            self._name(i, column, tile)
        for i in sums.keys() & variable:
            self._write(f"if d{i}: out.append(({i}, {tile[i]}, d{i}))", 1)
        source = "def extract(data, event, ts):\n" + "\n".join([*self._lines, "    return out"])
        exec(compile(source, "<extraction>", "exec"), self._constants)
        made: Extract = self._constants["extract"]
        return made

    def _tiles(self) -> dict[int, str]:
        """For each family the variable that holds the event's tile; families with tiles of one length share it."""
        for length in dict.fromkeys(family.tiles[0] for _, family in self._families):
            self._write(f"t{length} = ts // {length}", 1)
        return {i: f"t{family.tiles[0]}" for i, family in self._families}

    def _number(
        self, field: str, where: Match, group: list[tuple[int, Family, Column, int]], tile: Mapping[int, str]
    ) -> None:
        kinds = {column.kind for _, _, column, _ in group}
        self._write(f"n = get({field!r})", 1)
        self._write("if n is not None" + self._and(where) + ":", 1)
        self._write(
            f"if type(n) is not float and type(n) is not int or not {-LARGEST!r} <= n <= {LARGEST!r}: judge(n, {field!r})",
            2,
        )
        if kinds & {"total", "squares", "decayed"}:
            self._write(f"q = round(n * {SCALE})", 2)
        if kinds & {"greatest", "least", "latest"}:
            self._write("s = sorting(n)", 2)
        for i, family, column, shift in group:
            match column.kind:
                case "present":
                    self._write(f"d{i} += {1 << shift}", 2)
                case "total":
                    self._write(f"d{i} += q << {shift}", 2)
                case "squares":
                    self._write(f"d{i} += q * q << {shift}", 2)
                case "greatest":
                    self._write(f"out.append(({i}, {tile[i]}, s))", 2)
                case "least":
                    self._write(f"out.append(({i}, {tile[i]}, {2**64 - 1} - s))", 2)
                case "latest":
                    self._write(f"out.append(({i}, {tile[i]}, (ts if ts > 0 else 0) << 64 | s))", 2)
                case "buckets":
                    low, high = column.more
                    self._write(f"out.append(({i}, {tile[i]}, 1 << 32 * bucket_of(n, {low!r}, {high!r})))", 2)
                case _:
                    half_ms, tile_ms = column.more[0] * 1000, family.tiles[0]
                    self._write(f"w = round(2.0 ** (ts % {tile_ms} / {half_ms}) * {WEIGHT_SCALE})", 2)
                    self._write(f"out.append(({i}, {tile[i]}, w + (w * q << 64)))", 2)

    def _name(self, i: int, column: Column, tile: Mapping[int, str]) -> None:
        self._write(f"v = {self._read(column.field or '')}", 1)
        self._write("if v is not None" + self._and(column.where) + ":", 1)
        self._write(f"out.append(({i}, {tile[i]}, mask_of(v if type(v) is str else repr(v), {column.bits})))", 2)

    def _and(self, where: Match) -> str:
        return "" if where is None else f" and {self._read(where[0])} in {self._constant(where[1])}"

    def _read(self, field: str) -> str:
        return f"event.{field}" if field in ENVELOPE else f"get({field!r})"

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _write(self, line: str, depth: int) -> None:
        self._lines.append("    " * depth + line)


def judge(number: Any, field: str) -> None:
    """Raises Malformed for what is no number, or too large to be summed."""
    takes = "a number" if type(number) not in (int, float) else f"a number up to {LARGEST:g} in size"
    raise Malformed(f"data.{field} is {number!r:.80}; it takes {takes}")


@lru_cache(maxsize=100_000)
def mask_of(name: str, bits: int) -> int:
    """The bit that stands for a name among so many."""
    digest = blake2b(name.encode(errors="replace"), digest_size=4).digest()
    return 1 << int.from_bytes(digest, "little") % bits
