"""Feature definitions: what a feature is, and the rules a definition keeps. The features themselves are in catalogue.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from pipeline.errors import SettingError

Aggregation = Literal[
    "count", "sum", "mean", "rate", "min", "max", "last", "std", "deviation", "distinct", "quantile", "decayed_mean", "ratio"
]  # fmt: skip
Entity = Literal["user", "merchant", "zone"]
Owner = Literal["nexus", "python", "shared"]
Merge = Literal["owner", "freshest", "nexus", "python"]

MINUTE, HOUR, DAY = 60, 3600, 86_400
SHORTEST_S, LONGEST_S = MINUTE, 90 * DAY
ENVELOPE = (
    "user_id",
    "session_id",
    "app_version",
    "device_type",
)  # fields of the event itself; all others are in `data`
_NAME, _TYPE = re.compile(r"[a-z_][a-z0-9_]*").fullmatch, re.compile(r"[a-z0-9_.\-]{1,64}").fullmatch
NUMERIC = ("sum", "mean", "min", "max", "last", "std", "deviation", "quantile", "decayed_mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One feature of an entity over a sliding window of event time.

    entity       whose it is: a user (by user_id), a merchant (data.merchant_id; a fraud report counts for the merchant of the
                 payment it reports), or a zone (the H3 cell of the pickup or location)
    event_type   the events it is made of; None: all types
    field        the number, or for `distinct` the name, it looks at: a field of `data`, or one of ENVELOPE
    where        keeps the events whose field has one of the values
    share        `rate` only: the one value of `where` whose share it is
    of           `ratio` only: two features of the same entity, numerator and denominator
    window_s     60 s to 90 days, whole minutes
    quantile     0 to 1, for `quantile`, which also needs low and high: the range of the field that is told apart
    half_life_s  for `decayed_mean`: after so long a value weighs half
    low, high    what a sensible value lies between; outside it counts as out of range in the health of features
    owner        which system's value counts: nexus, python, or shared (both compute it, none is preferred)
    merge        where both have a value: the owner's, the freshest, nexus's or python's; with shared, owner means nexus
    tolerance    relative difference between the two systems' values that still counts as equal
    fresh_s      a value older than this is stale
    """

    name: str
    aggregation: Aggregation
    window_s: int
    description: str
    event_type: str | None = None
    field: str | None = None
    where: tuple[str, tuple[str | int | bool, ...]] | None = None
    share: str | int | bool | None = None
    of: tuple[str, str] | None = None
    quantile: float | None = None
    half_life_s: int | None = None
    low: float | None = None
    high: float | None = None
    entity: Entity = "user"
    owner: Owner = "nexus"
    merge: Merge = "owner"
    tolerance: float = 0.01
    fresh_s: float = 60.0


class WrongDefinition(SettingError):
    """A definition that cannot be computed: it stops the start, with the feature's name and the remedy."""

    def __init__(self, name: str, held: object, takes: str) -> None:
        super().__init__(f"feature {name}", held, takes)
        self.code = "wrong_definition"


class Malformed(ValueError):
    """A data field that a definition reads holds something it cannot take."""


def check(features: Sequence[Feature]) -> None:
    """Raises WrongDefinition for the first definition that breaks a rule."""
    by_name: dict[str, Feature] = {}
    for feature in features:
        _check_types(feature)
        if feature.name in by_name:
            raise WrongDefinition(feature.name, "a name that is taken", "a name of its own")
        by_name[feature.name] = feature
    for feature in features:
        for wrong, held, takes in _problems(feature, by_name):
            if wrong:
                raise WrongDefinition(feature.name, held, takes)


def _check_types(f: Feature) -> None:
    """Raises WrongDefinition where a field holds something else than it declares: the rules below rely on that."""
    hints = get_type_hints(Feature)
    for field in fields(f):
        held, kind = getattr(f, field.name), hints[field.name]
        try:
            right = msgspec.convert(held, kind) == held  # not so for a list in a tuple's place, and what is no number
        except msgspec.ValidationError:
            right = False
        if not right:
            choice = f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else field.type
            raise WrongDefinition(f.name, held, f"as {field.name} {choice}")


def _problems(f: Feature, others: dict[str, Feature]) -> list[tuple[bool, object, str]]:
    kind, of = f.aggregation, f.of or ()
    partners = [others.get(name) for name in of]
    return [
        (not _NAME(f.name), f.name, "a name of a-z, 0-9 and _"),
        (f.event_type is not None and not _TYPE(f.event_type), f.event_type, "an event_type of a-z, 0-9, _, . and -"),
        (f.field == "" or (f.where is not None and f.where[0] == ""), "no name", "a name in field and where"),
        (f.window_s % MINUTE != 0, f.window_s, "window_s in whole minutes (a multiple of 60)"),
        (not SHORTEST_S <= f.window_s <= LONGEST_S, f.window_s, f"window_s from {SHORTEST_S} to {LONGEST_S} (90 days)"),
        (not f.description, "no description", "one line of description"),
        (f.fresh_s <= 0, f.fresh_s, "fresh_s above 0"),
        (f.tolerance < 0, f.tolerance, "tolerance of at least 0"),
        (kind in NUMERIC and f.field is None, "no field", f"field, the number that {kind} looks at"),
        (kind in NUMERIC and f.field in ENVELOPE, f.field, "a field of data; those of the envelope are no numbers"),
        (kind == "distinct" and f.field is None, "no field", "field, the name whose distinct values it counts"),
        (kind in ("count", "rate", "ratio") and f.field is not None, f.field, f"no field: {kind} looks at none; use where"),
        (kind == "rate" and f.where is None, "no where", "where, the values among which it is a share"),
        (kind == "rate" and (f.where is None or f.share not in f.where[1]), f.share, "as share one of the values of where"),
        (kind != "rate" and f.share is not None, f.share, "no share: only a rate has one"),
        (f.where is not None and not f.where[1], f.where, "where with at least one value"),
        ((kind == "ratio") != (len(of) == 2), f.of, "of, two names, with the aggregation ratio and with no other"),
        (any(p is None for p in partners), f.of, "in of the names of two other features"),
        (any(p is not None and (p.entity != f.entity or p.aggregation == "ratio") for p in partners), f.of,
         "in of two features of the same entity that are no ratios themselves"),
        ((kind == "quantile") != (f.quantile is not None), f.quantile, "quantile with the aggregation quantile and with no other"),
        (f.quantile is not None and not 0 <= f.quantile <= 1, f.quantile, "quantile from 0 to 1"),
        (kind == "quantile" and not (f.low is not None and f.high is not None and 0 < f.low < f.high), (f.low, f.high),
         "low and high, 0 < low < high: the range in which the quantile is told apart"),
        ((kind == "decayed_mean") != (f.half_life_s is not None), f.half_life_s,
         "half_life_s with the aggregation decayed_mean and with no other"),
        (f.half_life_s is not None and f.half_life_s * 60 < f.window_s, f.half_life_s, "half_life_s of at least 1/60 of the window"),
        (f.low is not None and f.high is not None and f.low > f.high, (f.low, f.high), "low below high"),
    ]  # fmt: skip


def to_object(feature: Feature) -> dict[str, Any]:
    """A definition as JSON; from_object is its inverse."""
    return {name: value for name, value in asdict(feature).items() if value is not None}


def from_object(kept: dict[str, Any]) -> Feature:
    where, of = kept.get("where"), kept.get("of")
    return Feature(
        **{
            **kept,
            **({"where": (where[0], tuple(where[1]))} if where else {}),
            **({"of": tuple(of)} if of else {}),
        }
    )
