"""Aggregations: the columns that features are made of, each a whole number with a merge that is exact in any order.

A column's state over some events is one integer, and two states merge by +, by | or by max. So late events, recovery, backfill
and a fold of the stored events give the same bits. Columns that add share one integer, each in its own lane of bits, so that
counting an event, and merging tiles, is one addition.

    ones, present   +     events that match; those that have the field
    total, squares  +     the field in billionths, and its square: sums, means and deviations are exact to 1e-9
    buckets         +     a count for each of 48 logarithmic buckets from low to high: quantiles to half a bucket (error())
    decayed         +     weight and weighted sum, relative to the start of a tile
    bits            |     linear counting: a bit per hashed name; exact to about 5 % up to as many names as bits (error())
    greatest, least, latest   max   a number as bits that sort like it; the latest has its time before it
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import add, or_
from typing import Any, Literal

from pipeline.definitions import Entity, Feature
from pipeline.events import Event, Stored

Kind = Literal["ones", "present", "total", "squares", "buckets", "decayed", "bits", "greatest", "least", "latest"]
Data = Mapping[str, Any]
Delta = Callable[
    [Data, Event | Stored, int], int
]  # data, event, event time (ms) -> what the event adds to a column or family

SCALE = 10**9  # of numbers: a total is kept in billionths
LARGEST = 1e15  # in size, that a number may have: its square fits its lane 2^31 times
BUCKETS = 48
BITS: Mapping[Entity, int] = {"user": 256, "merchant": 1024, "zone": 8192}
WEIGHT_SCALE = 2**30  # of the weights of decayed columns
_LANE_BITS = {"ones": 32, "present": 32, "total": 112, "squares": 192, "buckets": 32 * BUCKETS, "decayed": 64 + 160,
              "greatest": 64, "least": 64, "latest": 48 + 64}  # fmt: skip
_DOUBLE, _U64 = struct.Struct(">d"), struct.Struct(">Q")
_TOP = 1 << 63
_U64_MAX, _TOTAL_TOP = 2**64 - 1, 1 << 159


@dataclass(frozen=True, slots=True)
class Column:
    """One thing that is kept of the events of a family. `more`: low and high of buckets, half-life (s) of decayed, bits of bits."""

    kind: Kind
    field: str | None = None
    where: tuple[str, tuple[Any, ...]] | None = None
    more: tuple[float, ...] = ()

    @property
    def light(self) -> bool:
        """Shares a family with others of its event type; the heavy ones have one each."""
        return self.kind in ("ones", "present", "total", "squares")

    @property
    def bits(self) -> int:
        return int(self.more[0]) if self.kind == "bits" else _LANE_BITS[self.kind]

    @property
    def merge(self) -> Callable[[int, int], int]:
        return or_ if self.kind == "bits" else max if self.kind in ("greatest", "least", "latest") else add


def columns_of(f: Feature) -> tuple[Column, ...]:
    """What a feature is made of, in the order in which value_of takes it."""
    field, where = f.field, f.where
    moments = Column("present", field, where), Column("total", field, where)
    match f.aggregation:
        case "count":
            return (Column("ones", None, where),)
        case "rate":
            assert where is not None
            return Column("ones", None, (where[0], (f.share,))), Column("ones", None, where)
        case "sum":
            return (moments[1],)
        case "mean":
            return moments
        case "std":
            return *moments, Column("squares", field, where)
        case "deviation":
            return *moments, Column("squares", field, where), Column("latest", field, where)
        case "max":
            return (Column("greatest", field, where),)
        case "min":
            return (Column("least", field, where),)
        case "last":
            return (Column("latest", field, where),)
        case "distinct":
            return (Column("bits", field, where, (BITS[f.entity],)),)
        case "quantile":
            return (Column("buckets", field, where, (f.low or 0.0, f.high or 0.0)),)
        case "decayed_mean":
            return (Column("decayed", field, where, (f.half_life_s or 0, f.window_s)),)
        case _:
            return ()


def value_text(f: Feature, columns: Sequence[str]) -> str:
    """A feature's value as an expression over the states of its columns, named by these texts: counts of nothing are 0, all else
    of nothing is null. It means NAMES."""
    match f.aggregation:
        case "count":
            return columns[0]
        case "rate":
            return "{0} / {1} if {1} else None".format(*columns)
        case "sum":
            return f"{columns[0]} / {SCALE}"
        case "mean":
            return f"{columns[1]} / ({columns[0]} * {SCALE}) if {columns[0]} else None"
        case "std":
            return f"std({', '.join(columns)})"
        case "deviation":
            return f"deviation({', '.join(columns)})"
        case "max":
            return "from_sorting({0}) if {0} else None".format(*columns)
        case "min":
            return "from_sorting({1} - {0}) if {0} else None".format(*columns, _U64_MAX)
        case "last":
            return "from_sorting({0} & {1}) if {0} else None".format(*columns, _U64_MAX)
        case "distinct":
            return f"distinct({columns[0]}.bit_count(), {BITS[f.entity]})"
        case "quantile":
            return f"quantile({columns[0]}, {f.quantile!r}, {f.low!r}, {f.high!r})"
        case _:
            return "{0}[1] / {0}[0] if {0}[0] else None".format(*columns)


def value_of(f: Feature) -> Callable[[Sequence[Any]], float | int | None]:
    """A feature's value from the states of its columns."""
    names = [f"c{i}" for i in range(len(columns_of(f)))]
    value: Callable[..., float | int | None] = eval(f"lambda {', '.join(names)}: {value_text(f, names)}", dict(NAMES))
    return lambda columns: value(*columns)


def error(f: Feature) -> float | None:
    """The relative error of a sketch: of a quantile at most, of a distinct count typically at as many names as bits. Else None."""
    if f.aggregation == "quantile" and f.low and f.high:
        return float((f.high / f.low) ** (0.5 / (BUCKETS - 2)) - 1)
    if f.aggregation == "distinct":
        return math.sqrt(BITS[f.entity] * (math.e - 2)) / BITS[f.entity]
    return None


# ---------------------------------------------------------------------------------------------- what a state says


@lru_cache(maxsize=10_000)
def distinct(ones: int, bits: int) -> int:
    """Linear counting (Whang et al. 1990): how many names set so many of the bits."""
    return round(-bits * math.log(max(bits - ones, 0.5) / bits)) if ones else 0


def quantile(state: int, q: float, low: float, high: float) -> float | None:
    """The middle of the bucket in which the value of that rank lies."""
    counts = struct.unpack(f"<{BUCKETS}I", state.to_bytes(4 * BUCKETS, "little"))
    n = sum(counts)
    if not n:
        return None
    rank, seen, at = round(q * (n - 1)), 0, 0
    for at, count in enumerate(counts):  # noqa: B007
        seen += count
        if seen > rank:
            break
    if at == 0:
        return low
    return high if at == BUCKETS - 1 else float(low * (high / low) ** ((at - 0.5) / (BUCKETS - 2)))


def decayed(state: int, age_ms: float, half_life_s: float) -> tuple[float, float]:
    """Weight and weighted sum of a tile that began `age_ms` ago."""
    weight, total = state & _U64_MAX, (state >> 64) + _TOTAL_TOP & 2 * _TOTAL_TOP - 1
    faded = 2.0 ** (-age_ms / (half_life_s * 1000))
    return weight * faded, (total - _TOTAL_TOP) / SCALE * faded


def _std(count: int, total: int, squares: int) -> float | None:
    """The population's standard deviation, from exact sums: nothing is lost where values lie close together."""
    return math.sqrt(count * squares - total * total) / (count * SCALE) if count else None


def _deviation(count: int, total: int, squares: int, latest: int) -> float | None:
    spread = _std(count, total, squares)
    if not latest or not spread:
        return None
    return (_from_sorting(latest & _U64_MAX) - total / (count * SCALE)) / spread


def sorting(x: float) -> int:
    """64 bits, never 0, that sort as the numbers do."""
    raw: int = _U64.unpack(_DOUBLE.pack(x + 0.0))[0]
    return 2 * _TOP - 1 - raw if raw & _TOP else raw | _TOP


def _from_sorting(bits: int) -> float:
    raw = bits & ~_TOP if bits & _TOP else 2 * _TOP - 1 - bits
    found: float = _DOUBLE.unpack(_U64.pack(raw))[0]
    return found


NAMES: Mapping[str, Any] = {
    "std": _std,
    "deviation": _deviation,
    "from_sorting": _from_sorting,
    "distinct": distinct,
    "quantile": quantile,
}
