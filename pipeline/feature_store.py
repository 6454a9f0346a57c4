"""The combined feature store: Nexus's own features, the Python service's, and the merged vector with its provenance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from pipeline import keys
from pipeline.definitions import Entity, Feature
from pipeline.errors import BadRequest
from pipeline.events import rfc3339
from pipeline.features import foreign, offline
from pipeline.features.foreign import Partner, read_moment
from pipeline.features.reading import Values
from pipeline.log import Log
from pipeline.operations.live_settings import LiveSettings
from pipeline.store import Store
from pipeline.streams.features import Features
from pipeline.streams.storage import EventStore

EXPIRED_S = 86_400.0  # a value of a feature that Nexus does not know is expired at this age
_ADOPT_S = 10.0
Meta = dict[str, dict[str, Any]]


@dataclass(slots=True)
class Combined:
    """One user's vector: each side's values, the merged ones, and per merged value where it comes from.

    `behind`: events of the user that the Python service has not been given yet, None where another instance runs the bridge.
    `malformed`: what is wrong with the Python service's key, and its name.
    """

    nexus: Values
    python: dict[str, Any]
    combined: dict[str, Any]
    meta: Meta
    behind: int | None = None
    malformed: str | None = None

    @property
    def known(self) -> bool:
        return bool(self.nexus or self.python)

    def notes(self) -> dict[str, Any]:
        """What belongs to the whole vector rather than to one value."""
        found: dict[str, Any] = {"completeness": {"python_events_behind": self.behind}}
        if self.malformed is not None:
            found["malformed"] = self.malformed
        return found


@dataclass(frozen=True, slots=True)
class _Side:
    """What one system says of a user: its values, their age in s (None unknown), and the part of `meta` that they share."""

    values: Mapping[str, Any]
    age_s: float | None
    meta: dict[str, Any] = field(default_factory=dict)


class FeatureStore:
    """Reads of one user or many. `live` gives the running features stream, None where another instance runs it.

    `lag_s` is how old Nexus's own values are, `behind` how many events of a user the Python service has yet to get.
    """

    def __init__(
        self,
        store: Store,
        events: EventStore,
        settings: LiveSettings,
        live: Callable[[], Features | None],
        clock: Callable[[], int],
        lag_s: Callable[[], float] = lambda: 0.0,
        behind: Callable[[str], int | None] = lambda user_id: None,
    ) -> None:
        self._store, self._events, self._settings = store, events, settings
        self._live, self._clock, self._lag_s, self._behind = live, clock, lag_s, behind
        self._log = Log(store)
        self._at_rest = Features(store)  # reads what the last checkpoint left, where the stream runs elsewhere
        self._adopted = 0.0
        # Of these definitions, from beyond one age up to another (s), the features of which Nexus's value is fresh.
        self._fresh: tuple[Mapping[str, Feature], float, float, frozenset[str]] = ({}, 0.0, 0.0, frozenset())

    @property
    def stream(self) -> Features:
        """The stream that answers: the running one, or one that only reads."""
        live = self._live()
        if live is not None:
            return live
        if time.monotonic() - self._adopted > _ADOPT_S:
            raw = self._store.call("GET", keys.DEFINITIONS)
            self._at_rest.adopt(raw, fresh=raw is None)
            self._adopted = time.monotonic()
        return self._at_rest

    def nexus(self, user_ids: Sequence[str], at: int) -> dict[str, Values]:
        """Nexus's features as of now, without the users it has no event of."""
        return self.stream.values(user_ids, at)

    def past(self, user_id: str, as_of: int, known_at: int | None = None, before: int | None = None) -> Values:
        """Nexus's features as of a past moment (epoch ms), folded from the stored events; empty for an unknown user."""
        tables = self.stream.fold.tables
        judges = [table.windows for kind, table in tables.items() if kind != "user"]
        return offline.past(self._events, tables["user"].windows, user_id, as_of, known_at, before, judges)

    def partner(self, user_ids: Sequence[str]) -> dict[str, Partner]:
        """What the Python service has in its public keys."""
        return foreign.read(self._store, user_ids, self._clock())[0]

    def combine(self, user_ids: Sequence[str], names: frozenset[str] | None = None) -> dict[str, Combined]:
        """The merged vectors of users as of now; of unknown users, empty ones. One round trip at most."""
        return dict(zip(user_ids, self.combine_each([(user_id, names) for user_id in user_ids]), strict=True))

    def combine_each(self, asked: Sequence[tuple[str, frozenset[str] | None]]) -> list[Combined]:
        """For each user, and the names that are asked of it (None: all), what combine() gives."""
        at, stream = self._clock(), self.stream
        hybrid = bool(self._settings["HYBRID_FEATURE_MODE"])
        of_names: dict[frozenset[str] | None, list[str]] = {}
        for user_id, names in asked:
            of_names.setdefault(names, []).append(user_id)
        user_ids = [user_id for user_id, _ in asked]
        absent = stream.absent(user_ids)
        prefix = stream.fold.tables["user"].prefix
        partners, found = foreign.read(self._store, user_ids if hybrid else (), at, [prefix + i for i in absent])
        hashes = dict(zip(absent, found, strict=True))
        nexus = {names: stream.values(some, at, hashes=hashes, names=names) for names, some in of_names.items()}
        lag_s, own = self._own(at)
        nothing = Partner()
        made = []
        for user_id, names in asked:
            partner = foreign.judged(partners.get(user_id, nothing), keys.PARTNER + user_id, stream.definitions)
            behind = self._behind(user_id) if hybrid else None
            ours = _Side(nexus[names].get(user_id, {}), lag_s, own)
            made.append(self._merge(stream, ours, partner, behind, at, names))
        return made

    def told(self, user_id: str, answer: dict[str, Any]) -> Combined:
        """The vector of a user of whom only the Python service knows, by its answer itself."""
        at, stream, name = self._clock(), self.stream, f"GET /features/{user_id}"
        partner = foreign.judged(foreign.told(answer, name, at), name, stream.definitions)
        return self._merge(stream, _Side({}, None), partner, self._behind(user_id), at, None)

    def of_entity(self, kind: Entity, owner: str, names: frozenset[str] | None = None) -> Combined:
        """A payee's or a zone's vector as of now: Nexus's own, since the Python service has none."""
        at, stream = self._clock(), self.stream
        ours = _Side(stream.values([owner], at, kind).get(owner, {}), *self._own(at))
        return self._merge(stream, ours, Partner(), None, at, names)

    def _own(self, at: int) -> tuple[float, dict[str, Any]]:
        """The age of Nexus's own values, s, and what it says in `meta`."""
        lag_s = self._lag_s()
        return lag_s, {"owner": "nexus", "computed_at": rfc3339(at - int(lag_s * 1000)), "age_s": round(lag_s, 3)}

    def covers_from(self, names: Iterable[str], as_of: int) -> dict[str, str]:
        """Of past values whose window begins before the oldest event that is still stored arrived: that moment."""
        oldest, known = offline.stored_since(self._log) or 0, self.stream.definitions
        reach = {
            name: max(part.window_s for part in (f, *(known[n] for n in f.of or ())))
            for name in names
            if (f := known.get(name)) is not None
        }
        return {name: rfc3339(oldest) for name, window_s in reach.items() if as_of - window_s * 1000 < oldest}

    def _merge(
        self, stream: Features, ours: _Side, partner: Partner, behind: int | None, at: int, names: frozenset[str] | None
    ) -> Combined:
        age_s = None if partner.computed_at is None else max(0.0, (at - partner.computed_at) / 1000)
        written = None if partner.computed_at is None else rfc3339(partner.computed_at)
        shared = {"owner": "python", "computed_at": written, "age_s": age_s, "events_behind": behind}
        theirs = _Side(partner.features, age_s, shared)
        wanted = sorted(ours.values.keys() | theirs.values.keys() if names is None else names)
        merged: dict[str, Any] = {}
        meta: Meta = {}
        known = stream.definitions
        fresh, plain = {**ours.meta, "verdict": "fresh"}, self._plain(known, ours.age_s or 0.0)
        for name in wanted:
            if name in plain and name in ours.values and name not in theirs.values:
                merged[name], meta[name] = ours.values[name], fresh  # nearly all of them
            elif name in ours.values or name in theirs.values:
                merged[name], meta[name] = self._choose(name, known.get(name), ours, theirs)
            elif ours.values or theirs.values:
                merged[name] = None
                meta[name] = {"owner": None, "computed_at": None, "age_s": None, "verdict": "missing"}
        return Combined(dict(ours.values), partner.features, merged, meta, behind, partner.malformed)

    def _plain(self, known: Mapping[str, Feature], age_s: float) -> frozenset[str]:
        """The features of which Nexus's value is taken, and fresh at this age, where the Python service has none."""
        of, over, up_to, found = self._fresh
        if of is not known or not over < age_s <= up_to:
            found = frozenset(name for name, f in known.items() if age_s <= f.fresh_s and _is_nexus_s(f))
            over = max((f.fresh_s for f in known.values() if f.fresh_s < age_s), default=-1.0)
            up_to = min((f.fresh_s for f in known.values() if f.fresh_s >= age_s), default=inf)
            self._fresh = (known, over, up_to, found)
        return found

    def _choose(self, name: str, feature: Feature | None, ours: _Side, theirs: _Side) -> tuple[Any, dict[str, Any]]:
        """One value by the feature's merge rule, with what `meta` says of it."""
        sides = {"nexus": ours, "python": theirs}
        verdicts = {
            "nexus": self._verdict(feature, ours) if name in ours.values else "missing",
            "python": self._verdict(feature, theirs) if name in theirs.values else "missing",
        }
        # What no definition names and Nexus has not is the partner's own, not a fallback for anything.
        first = "python" if feature is None and name not in ours.values else _preferred(feature, ours, theirs)
        second = "python" if first == "nexus" else "nexus"
        usable = {
            side: verdict in ("fresh", "stale") and sides[side].values[name] is not None
            for side, verdict in verdicts.items()
        }
        taken = first if usable[first] or not usable[second] else second
        if verdicts[taken] == "missing":
            taken = second if taken == first else first
        value, verdict = sides[taken].values[name], verdicts[taken]
        if taken != first and verdict != "expired":
            verdict = "fallback"
        meta = {**sides[taken].meta, "verdict": verdict}
        if verdict == "expired":
            meta["expired_value"], value = value, None  # its window has passed: never served as present
        other = "python" if taken == "nexus" else "nexus"
        if verdicts[other] != "missing" and (lost := sides[other].values[name]) != value:
            meta[f"{other}_value"] = lost
            meta["agrees"] = _agree(value, lost, feature.tolerance if feature is not None else 0.0)
        return value, meta

    def _verdict(self, feature: Feature | None, side: _Side) -> str:
        """fresh, stale or expired. Of unknown age is stale: a plain hash has no time in it."""
        if side.age_s is None:
            return "stale"
        sync_s = float(self._settings["FEATURE_SYNC_INTERVAL"])
        limit = feature.window_s if feature is not None else max(EXPIRED_S, 2 * sync_s)
        if side.meta["owner"] == "python":
            fresh_s = 2 * sync_s if feature is None or feature.owner != "python" else feature.fresh_s
        else:
            fresh_s = feature.fresh_s if feature is not None else 60.0
        return "fresh" if side.age_s <= min(fresh_s, limit) else "stale" if side.age_s <= limit else "expired"

    def as_of(self, text: str, name: str = "as_of") -> int:
        """A moment given as RFC 3339 or epoch ms. Raises BadRequest, also for one in the future."""
        at = read_moment(name, text)
        if not 0 <= at <= self._clock():
            code = "in_the_future" if at > 0 else "before_1970"
            raise BadRequest(code, f"{name} is {rfc3339(at)}; it takes a moment from 1970 up to now")
        return at


def _preferred(feature: Feature | None, ours: _Side, theirs: _Side) -> str:
    """Whose value a merge rule takes where both have one."""
    rule = feature.merge if feature is not None else "owner"
    if rule == "freshest":
        return (
            "python" if theirs.age_s is not None and ours.age_s is not None and theirs.age_s < ours.age_s else "nexus"
        )
    if rule == "owner":
        return "python" if feature is not None and feature.owner == "python" else "nexus"
    return rule


def _is_nexus_s(feature: Feature) -> bool:
    """Its merge rule takes Nexus's value, whatever the ages."""
    nobody = _Side({}, None)
    return feature.merge != "freshest" and _preferred(feature, nobody, nobody) == "nexus"


def _agree(a: Any, b: Any, tolerance: float) -> bool:
    if type(a) in (int, float) and type(b) in (int, float):
        try:
            return bool(abs(a - b) <= tolerance * max(abs(a), abs(b)))
        except OverflowError:  # a foreign whole number that no float can hold
            return False
    return bool(a == b)
