"""The HTTP routes of features: vectors with their provenance, definitions and their state, health, and a sync on demand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, request

from pipeline.definitions import Entity
from pipeline.errors import BadRequest, NotFound, PartnerError, TooLarge
from pipeline.events import rfc3339
from pipeline.feature_store import Combined
from pipeline.features.aggregations import error
from pipeline.web.answers import answer, few_and_short, json_object, require_own_page, strings

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

MAX_USERS, MAX_NAMES = 500, 1_000
MAX_VALUES = 50_000  # users times names in one answer
_WHERE_SET = ("share", "quantile", "half_life_s")


def feature_routes(nexus: Runtime) -> Blueprint:
    api = Blueprint("features", __name__)

    @api.get("/api/ml/features/<user_id>")
    def features(user_id: str) -> Response:
        return answer(vector(nexus, user_id, request.args))

    @api.post("/api/ml/features")
    def features_of_many() -> Response:
        body = json_object()
        users = strings(body, "user_ids", MAX_USERS)
        names = frozenset(strings(body, "names", MAX_NAMES)) if body.get("names") is not None else None
        if names is not None and len(users) * len(names) > MAX_VALUES:
            asked = f"{len(users)} users and {len(names)} names ask for {len(users) * len(names)} values"
            raise TooLarge("too_many_values", f"{asked}; at most {MAX_VALUES}: ask for fewer users at a time")
        found = nexus.features.combine(users, names)
        rows = {user: {"features": c.combined, "meta": c.meta, **c.notes()} for user, c in found.items()}
        return answer({"users": rows})

    @api.get("/api/ml/feature-definitions")
    def definitions() -> Response:
        return answer({"definitions": describe(nexus)})

    @api.get("/api/ml/feature-health")
    def health() -> Response:
        return answer(nexus.feature_health.snapshot())

    @api.post("/api/ml/features/sync")
    def sync() -> Response:
        require_own_page(nexus)
        return answer(nexus.sync_features())

    return api


def describe(nexus: Runtime) -> list[dict[str, Any]]:
    """Every definition with its state: ready, or how far its history is made from the stored events."""
    stream = nexus.features.stream
    states = stream.states()
    return [
        {
            "name": f.name, "entity": f.entity, "event_type": f.event_type, "aggregation": f.aggregation, "field": f.field,
            "where": f.where, "of": f.of, "window_s": f.window_s, "owner": f.owner, "merge": f.merge, "tolerance": f.tolerance,
            "fresh_s": f.fresh_s, "low": f.low, "high": f.high, "error": error(f), "description": f.description,
            "state": states[f.name],
            **{name: value for name in _WHERE_SET if (value := getattr(f, name)) is not None},
        }
        for f in stream.wanted
    ]  # fmt: skip


def vector(nexus: Runtime, user_id: str, query: Mapping[str, str]) -> dict[str, Any]:
    """The answer of GET /api/ml/features/{user_id}, by its query parameters. Raises BadRequest, TooLarge, NotFound, StoreError."""
    text, known, names = query.get("as_of"), query.get("known_at"), names_in(query)
    now = nexus.clock()
    if (entity := query.get("entity", "user")) != "user":
        return _of_entity(nexus, entity, user_id, names, past=bool(query.keys() & {"as_of", "known_at"}))
    if text is None and known is None:
        return vector_of_now(nexus, user_id, nexus.features.combine([user_id], names)[user_id], now)
    at = now if text is None else nexus.features.as_of(text)
    known_at = None if known is None else nexus.features.as_of(known, "known_at")
    if known_at is not None and known_at < at and text is None:
        raise BadRequest("no_as_of", "known_at goes with as_of; give both")
    values = nexus.features.past(user_id, at, known_at)
    if not values:
        raise NotFound("unknown_user", f"no event of {user_id} up to {rfc3339(at)} is retained")
    values = {name: values.get(name) for name in sorted(names if names is not None else values)}
    served = nexus.features.stream.definitions
    fresh = {"owner": "nexus", "computed_at": rfc3339(now), "age_s": 0.0, "verdict": "fresh"}
    missing = {"owner": None, "computed_at": None, "age_s": None, "verdict": "missing"}
    covers = nexus.features.covers_from(values, at)
    meta = {name: fresh if name in served else missing for name in values}
    meta |= {name: {**meta[name], "covers_from": since} for name, since in covers.items()}
    return {"user_id": user_id, "as_of": rfc3339(at), "features": values, "meta": meta}


def names_in(query: Mapping[str, str]) -> frozenset[str] | None:
    """The features that are asked for, None for all. Raises BadRequest, TooLarge."""
    wanted = query.get("names")
    return _names(wanted) if wanted else None


@lru_cache(maxsize=64)  # who asks for some features asks for the same ones again
def _names(text: str) -> frozenset[str]:
    return frozenset(few_and_short("names", [name.strip() for name in text.split(",")], MAX_NAMES))


def vector_of_now(nexus: Runtime, user_id: str, found: Combined, now: int) -> dict[str, Any]:
    """A user's merged vector as it is answered. Raises NotFound."""
    if not found.known:
        raise _unknown(nexus, user_id)
    stamp = rfc3339(now)
    return {"user_id": user_id, "as_of": stamp, "features": found.combined, "meta": found.meta, **found.notes()}


def of_partner_alone(nexus: Runtime, user_id: str) -> Combined:
    """The vector of a user whom Nexus does not know and of whom there is no key: the Python service writes those a moment after it
    has taken events, so it is asked itself. Raises NotFound."""
    partner = nexus.bridge.partner
    if not nexus.live["HYBRID_FEATURE_MODE"] or "features" not in partner.supports:
        raise _unknown(nexus, user_id)
    status = nexus.partner_status()
    try:
        if status["status"] != "online":
            raise PartnerError(f"the Python service is {status['status']}: {status['reason']}")
        said = nexus.in_bridge(partner.features(user_id))
    except PartnerError as error:
        raise NotFound("unknown_user", f"Nexus knows no user {user_id}, and {error.message}") from error
    found = nexus.features.told(user_id, said) if said is not None else None
    if found is None or not found.known:
        raise _unknown(nexus, user_id)
    return found


def _unknown(nexus: Runtime, user_id: str) -> NotFound:
    alone = f"Nexus knows no user {user_id}, and with HYBRID_FEATURE_MODE off the Python service is not asked"
    hybrid = nexus.live["HYBRID_FEATURE_MODE"]
    return NotFound("unknown_user", f"neither system knows a user {user_id}" if hybrid else alone)


def _of_entity(nexus: Runtime, entity: str, owner: str, names: frozenset[str] | None, past: bool) -> dict[str, Any]:
    """A payee's or a zone's own features, of now."""
    kinds: dict[str, Entity] = {"merchant": "merchant", "zone": "zone"}
    if (kind := kinds.get(entity)) is None:
        raise BadRequest("unknown_entity", f"entity is {entity!r}; it takes user, merchant or zone")
    if past:
        raise BadRequest("no_past", f"past values are those of users; a {entity}'s go into training sets")
    now = nexus.clock()
    found = nexus.features.of_entity(kind, owner, names)
    if not found.known:
        raise NotFound(f"unknown_{entity}", f"no event of a {entity} {owner} has been counted")
    return {"entity": entity, "id": owner, "as_of": rfc3339(now), "features": found.combined, "meta": found.meta}
