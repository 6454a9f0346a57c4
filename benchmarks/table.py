"""Rows of figures, and the table made of them: Markdown to read, JSON to compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure.

    value      the median of the repetitions in `unit`; None where there is none, and then `note` says why
    spread     the least and the greatest of the repetitions
    target     what it has to reach at least; `aim`, what it is to reach. Which side is good: `more_is_better`
    ratio_to   for a ratio: what stands below the line
    note       what a reader must know: what a peer does not do, what was in the way
    """

    name: str
    value: float | None
    unit: str
    spread: tuple[float, float] | None = None
    target: float | None = None
    aim: float | None = None
    note: str = ""
    ratio_to: str | None = None
    more_is_better: bool = False

    @property
    def verdict(self) -> str:
        """aim, target or missed; empty where nothing is asked."""
        if self.value is None or (self.target is None and self.aim is None):
            return ""
        sign = 1 if self.more_is_better else -1
        for word, wanted in (("aim", self.aim), ("target", self.target)):
            if wanted is not None and sign * self.value >= sign * wanted:
                return word
        return "missed"


def of(name: str, values: Sequence[float], unit: str, **more: Any) -> Row:
    """The row of repeated measurements; without any, a row that has no value."""
    if not values:
        return Row(name, None, unit, **more)
    return Row(name, median(values), unit, (min(values), max(values)) if len(values) > 1 else None, **more)


def ratio(name: str, above: Sequence[float], below: Sequence[float], to: str, **more: Any) -> Row:
    """The row of a ratio, taken repetition by repetition, so that what slowed both falls out."""
    pairs = [a / b for a, b in zip(above, below, strict=False) if b]
    return of(name, pairs, "times", ratio_to=to, **more)


def missing(name: str, unit: str, why: str) -> Row:
    """The row of something that could not be measured."""
    return Row(name, None, unit, note=why)


def markdown(title: str, rows: Iterable[Row]) -> str:
    """One topic as a section with a table."""
    lines = [
        f"## {title}",
        "",
        "| what | median | least to most | at least | aim | reached | notes |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in rows:
        value = "not measured" if row.value is None else f"{figure(row.value)} {row.unit}"
        spread = "" if row.spread is None else f"{figure(row.spread[0])} to {figure(row.spread[1])}"
        asked = ["" if wanted is None else figure(wanted) for wanted in (row.target, row.aim)]
        name = row.name if row.ratio_to is None else f"{row.name}, over {row.ratio_to}"
        cells = [name, value, spread, *asked, row.verdict, row.note]
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def as_json(topics: Mapping[str, Sequence[Row]]) -> dict[str, list[dict[str, Any]]]:
    """Topics as plain objects."""
    return {name: [{**asdict(row), "reached": row.verdict} for row in rows] for name, rows in topics.items()}


def figure(value: float) -> str:
    """A number with three significant digits, whole from 100 on."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"
