"""The HTTP routes of the models: predictions of both systems side by side, the versions in force, and retraining."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from flask import Blueprint, Response, request

from pipeline.errors import BadRequest, Fenced, NexusError, PartnerError, Unprocessable
from pipeline.events import Rejected, decode, parse, parse_rfc3339, rfc3339
from pipeline.learning.demand_history import demand_counts
from pipeline.learning.registry import NAMES
from pipeline.models import demand
from pipeline.streams.inference import CITY, Inference, Malformed, Score
from pipeline.web.answers import answer, json_object, number, require_own_page

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

_encode = msgspec.json.Encoder().encode
_PARTS = ("value", "low", "high")  # of a forecast
# As of features: Nexus's own where both have a value, the partner's where Nexus's model is still warming up. A mean of a good and a
# poor prediction is a poor one, and one of two intervals says nothing of either.
_METHOD = "precedence"
log = logging.getLogger(__name__)


def model_routes(nexus: Runtime) -> Blueprint:
    api = Blueprint("models", __name__)

    @api.post("/api/ml/predict")
    def predict() -> Response:
        body = json_object()
        model = body.get("model")
        if model == "fraud":
            return answer(_fraud(nexus, body.get("event")))
        if model == "demand":
            horizon = body.get("horizon")
            return answer(_demand(nexus, body.get("zone"), 1 if horizon is None else horizon))
        raise BadRequest("unknown_model", f"model is {model!r}; it takes {' or '.join(NAMES)}")

    @api.get("/api/ml/models")
    def models() -> Response:
        return answer(nexus.models.described if nexus.models.described["models"] else nexus.models.look())

    @api.post("/api/ml/models/<name>/retrain")
    def retrain(name: str) -> Response:
        require_own_page(nexus)
        wait = request.args.get("wait", "true")
        if wait not in ("true", "false"):
            raise BadRequest("invalid_wait", f"wait is {wait!r}; it takes true or false")
        if wait == "true":
            return answer(nexus.models.retrain(name))
        nexus.models.check(name)
        nexus.aside(f"retrain-{name}", lambda: _quietly(nexus, name))
        return answer({"model": name, "state": "training"}, 202)

    return api


def _quietly(nexus: Runtime, name: str) -> None:
    """Retrain for nobody who waits: the verdict is in GET /api/ml/models, and what went wrong in the log."""
    try:
        nexus.models.retrain(name)
    except NexusError as error:
        log.warning("not retrained: %s", error.message, extra={"model": name})


def _fraud(nexus: Runtime, posted: Any) -> dict[str, Any]:
    """What both systems say to a payment that need not have been made. Raises Unprocessable, Fenced."""
    try:
        event = parse(posted, nexus.clock())
    except Rejected as error:
        raise Unprocessable(error.code, error.message, details={"field": error.field}) from error
    kept = decode(event.body)
    if kept["event_type"] != "payment":
        raise Unprocessable("not_a_payment", f"fraud is told of payments; event_type is {kept['event_type']!r}")
    stream = nexus.stream("inference")
    if not isinstance(stream, Inference):
        raise Fenced("the inference stream does not run in this instance; ask the one that runs the pipeline")
    try:
        score = stream.assess(kept["user_id"], event.ts, kept["data"])
    except Malformed as error:
        raise Unprocessable("malformed", str(error)) from error
    own = _own_score(score, stream)
    theirs, failed = _ask(nexus, {"model": "fraud", "event": kept}, _fraud_flaw)
    told = theirs.get("score") if own["status"] == "warming_up" and theirs.get("status") != "warming_up" else None
    of, chosen = ("nexus", float(own["score"])) if told is None else ("python", float(told))
    unified = {"score": round(chosen, 6), "method": _METHOD, "of": [of]}
    return {"nexus": own, "python": theirs, "unified": unified, "degraded": failed}


def _own_score(score: Score, stream: Inference) -> dict[str, Any]:
    status = "ready" if stream.model.ready else "warming_up"
    return {
        "model": "fraud", "version": score.version, "status": status,
        "score": round(score.score, 6), "reasons": score.reasons,
    }  # fmt: skip


def _demand(nexus: Runtime, zone: Any, horizon: Any) -> dict[str, Any]:
    """Both systems' forecasts of a zone, of the city without one, for `horizon` half hours."""
    if zone is not None and not isinstance(zone, str):
        raise BadRequest("invalid_zone", "zone is an H3 cell as a text, or absent")
    own = demand_answer(nexus, zone, str(horizon))
    theirs, failed = _ask(nexus, {"model": "demand", "zone": zone, "horizon": int(horizon)}, _demand_flaw)
    # Nexus forecasts nothing while it warms up.
    steps = {
        f["at"]: {"at": f["at"], **{part: round(float(f[part]), 3) for part in _PARTS}, "of": [name]}
        for name, said in (("python", theirs), ("nexus", own))
        for f in _forecasts(said)
    }
    unified = {"forecasts": [forecast for _, forecast in sorted(steps.items())], "method": _METHOD}
    return {"nexus": own, "python": theirs, "unified": unified, "degraded": failed}


def _forecasts(said: dict[str, Any]) -> list[dict[str, Any]]:
    """The forecasts of an answer that are whole; a foreign partner may answer anything."""
    listed = said.get("forecasts")
    return [
        {**forecast, "at": at}
        for forecast in (listed if isinstance(listed, list) else [])
        if isinstance(forecast, dict)
        and (at := _moment(forecast.get("at"))) is not None
        and all(type(forecast.get(part)) in (int, float) for part in _PARTS)
    ]


def _fraud_flaw(said: dict[str, Any]) -> str | None:
    """Why an answer's score is none; it may have no score yet."""
    score = said.get("score")
    if score is None or (type(score) in (int, float) and 0 <= score <= 1):
        return None
    return "the Python service's score is not a number from 0 to 1"


def _demand_flaw(said: dict[str, Any]) -> str | None:
    """Why an answer's forecasts are none."""
    if all(0 <= f[part] <= sys.float_info.max for f in _forecasts(said) for part in _PARTS):
        return None
    return "the Python service forecasts a number below 0, or one beyond all bounds"


def _moment(text: Any) -> str | None:
    """An instant in the one form by which the two systems' steps are matched."""
    try:
        return rfc3339(parse_rfc3339(text)[0]) if isinstance(text, str) else None
    except Rejected:
        return None


def _ask(
    nexus: Runtime, question: dict[str, Any], flaw: Callable[[dict[str, Any]], str | None]
) -> tuple[dict[str, Any], bool]:
    """The Python service's own prediction; where it has none to give, or it has the `flaw` named, {"error"} and True."""
    bridge = nexus.bridge
    why = None
    if bridge.halted is not None:
        why = bridge.halted
    elif bridge.partner.unknown:
        reason = nexus.partner_status()["reason"]
        why = "the Python service has not said yet whether it predicts" + (f": {reason}" if reason else "")
    elif "predict" not in bridge.partner.supports:
        why = "the Python service does not say that it predicts"
    if why is None:
        try:
            said = nexus.in_bridge(bridge.partner.predict(_encode(question)))
            why = flaw(said)
            if why is None:
                return said, False
        except PartnerError as error:
            why = error.message
    return {"error": why}, True


def demand_answer(nexus: Runtime, zone: str | None, horizon: str | None) -> dict[str, Any]:
    steps = 5
    if horizon is not None:
        if not 1 <= number(horizon) <= demand.WEEK_STEPS:
            raise BadRequest(
                "invalid_horizon",
                f"horizon is {horizon!r}; it takes a number of half hours from 1 to {demand.WEEK_STEPS}",
            )
        steps = int(horizon)
    now_s = nexus.clock() // 1000
    counts = demand_counts(nexus, zone or CITY, now_s)
    why, model = demand.warming_up(counts, now_s), nexus.models.demand_in_force()
    made = [] if why is not None else demand.forecast(counts, now_s, steps, model)
    return {
        "zone": zone or CITY,
        "step_s": demand.STEP_S,
        "forecasts": [
            {"at": rfc3339(f.at * 1000), "value": round(f.value, 3), "low": round(f.low, 3), "high": round(f.high, 3)}
            for f in made
        ],
        "made_at": rfc3339(now_s * 1000),
        "model": model.version,
        "state": "ready" if why is None else "warming_up",
        "detail": why,
    }
