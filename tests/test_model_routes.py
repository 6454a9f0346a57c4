"""The models' routes: predictions of both systems, versions and their figures, retraining and what it takes over."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest

from pipeline import keys
from pipeline.learning.labelled import examples
from pipeline.learning.registry import LOOKED_AT
from pipeline.models import backtest, demand, fraud, training
from pipeline.models.training import Example
from pipeline.streams.inference import Inference, Promoted, Score, stored_fraud
from tests.conftest import client_of
from tests.helpers import DAY_MS, NOON, FakePartner, batch_of, event, free_port, payment, report, until, write

STEP_MS = demand.STEP_S * 1000


class Predictor(FakePartner):
    """A partner that predicts; `says` is its answer, None a failure."""

    says: Any = {"model": "theirs", "score": 0.5, "status": "ready"}

    def __init__(self) -> None:
        self.questions: list[dict[str, Any]] = []
        super().__init__(("batch", "predict"))

    def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        if path != "/predict":
            return super().answer(path, headers, body)
        self.questions.append(msgspec.json.decode(body))
        return (200, self.says) if self.says is not None else (500, {"detail": "broken"})


def ready(nexus):
    """The instance once its inference stream has loaded."""
    until(lambda: nexus.stream("inference"), "the inference stream")
    return nexus


@pytest.fixture
def nexus(nexus):
    return ready(nexus)


@pytest.fixture
def predictor():
    fake = Predictor()
    yield fake
    fake.close()


@pytest.fixture
def predicting(start_nexus, predictor):
    nexus = ready(start_nexus(PYTHON_EVENT_API_URL=predictor.url))
    until(lambda: "predict" in nexus.bridge.partner.supports, "the partner's capabilities")
    return client_of(nexus), nexus


def ask(client, **body):
    return client.post("/api/ml/predict", json=body)


def test_partners_score_counts_while_nexus_model_is_warming_up(predicting, predictor):
    client, _ = predicting
    answer = ask(client, model="fraud", event=payment("t-1", 900.0, user="rider_9"))
    assert answer.status_code == 200
    body = answer.json
    assert body["python"] == predictor.says
    assert body["nexus"]["version"] == fraud.HABIT_VERSION
    assert body["unified"] == {"score": 0.5, "method": "precedence", "of": ["python"]}
    assert body["degraded"] is False
    assert predictor.questions[0]["event"]["data"]["amount"] == 900.0


def test_score_of_a_model_that_is_ready_stands_whatever_the_partner_says(predicting, predictor):
    client, nexus = predicting
    nexus.stream("inference").model.frauds = fraud.LABELS_NEEDED
    body = ask(client, model="fraud", event=payment("t-1", 900.0)).json
    assert (body["nexus"]["status"], body["python"]) == ("ready", predictor.says)
    assert body["unified"] == {"score": body["nexus"]["score"], "method": "precedence", "of": ["nexus"]}


def test_partner_that_is_warming_up_as_well_leaves_nexus_own_prior(predicting, predictor):
    client, _ = predicting
    predictor.says = {"status": "warming_up", "score": 0.5}
    body = ask(client, model="fraud", event=payment("t-1", 900.0)).json
    assert body["unified"] == {"score": body["nexus"]["score"], "method": "precedence", "of": ["nexus"]}


def test_prediction_leaves_no_trace_of_a_payment_that_was_not_made(predicting):
    client, nexus = predicting
    before = nexus.log.head().ordinal
    first = ask(client, model="fraud", event=payment("t-1", 900.0)).json["nexus"]
    assert ask(client, model="fraud", event=payment("t-1", 900.0)).json["nexus"] == first
    assert nexus.log.head().ordinal == before
    assert nexus.stream("inference").model.scored == 0


def test_partner_that_fails_leaves_nexus_alone_and_says_so(predicting, predictor):
    client, _ = predicting
    predictor.says = None
    body = ask(client, model="fraud", event=payment("t-1", 900.0)).json
    assert body["degraded"] is True
    assert "500" in body["python"]["error"]
    assert body["unified"]["of"] == ["nexus"]
    assert body["unified"]["score"] == body["nexus"]["score"]


def test_partner_without_predictions_is_not_asked(client, nexus):
    until(lambda: nexus.bridge.health is not None, "the partner's capabilities")
    body = ask(client, model="fraud", event=payment("t-1")).json
    assert body["degraded"] is True
    assert "does not say that it predicts" in body["python"]["error"]


def test_partner_that_is_not_there_is_not_said_to_predict_nothing(client, nexus):
    nexus.live.change({"PYTHON_EVENT_API_URL": f"http://127.0.0.1:{free_port()}"}, "a test", "test")
    until(lambda: nexus.partner_status()["status"] == "offline", "the new address asked")
    error = ask(client, model="fraud", event=payment("t-1")).json["python"]["error"]
    assert error.startswith("the Python service has not said yet whether it predicts: ")


def test_disabled_bridge_is_named_as_the_reason(start_nexus):
    client = client_of(ready(start_nexus(ENABLE_PYTHON_BRIDGE="false")))
    body = ask(client, model="fraud", event=payment("t-1")).json
    assert body["python"] == {"error": "the bridge is switched off"}


def test_partner_that_answers_something_else_counts_for_nothing(predicting, predictor):
    client, _ = predicting
    predictor.says = {"score": "high", "forecasts": [{"at": 7}, "x", {"at": "soon", "value": 1, "low": 0, "high": 2}]}
    assert ask(client, model="fraud", event=payment("t-1")).json["unified"]["of"] == ["nexus"]
    assert ask(client, model="demand").json["unified"]["forecasts"] == []


@pytest.mark.parametrize("score", [10**400, 1e300, -77, 1.0001, "high", True])
def test_partners_score_that_is_none_is_its_error_and_nexus_own_stands(predicting, predictor, score):
    client, _ = predicting
    predictor.says = {"score": score}
    answer = ask(client, model="fraud", event=payment("t-1"))
    assert answer.status_code == 200
    assert answer.json["degraded"] is True
    assert answer.json["python"] == {"error": "the Python service's score is not a number from 0 to 1"}
    assert answer.json["unified"] == {"score": answer.json["nexus"]["score"], "method": "precedence", "of": ["nexus"]}


@pytest.mark.parametrize("score", [0, 1, None])
def test_partners_score_at_the_bounds_or_not_yet_given_is_no_error(predicting, predictor, score):
    client, _ = predicting
    predictor.says = {"score": score}
    body = ask(client, model="fraud", event=payment("t-1")).json
    assert (body["degraded"], body["python"]) == (False, {"score": score})
    assert body["unified"]["of"] == (["nexus"] if score is None else ["python"])


@pytest.mark.parametrize("wrong", [10**400, -1, -0.5])
@pytest.mark.parametrize("part", ["value", "low", "high"])
def test_partners_forecast_that_is_none_is_its_error(predicting, predictor, part, wrong):
    client, _ = predicting
    sound = {"at": "2026-01-01T00:00:00Z", "value": 2, "low": 1, "high": 3}
    predictor.says = {"forecasts": [sound, {**sound, part: wrong}]}
    answer = ask(client, model="demand")
    assert answer.status_code == 200
    assert answer.json["degraded"] is True
    assert "below 0, or one beyond all bounds" in answer.json["python"]["error"]
    assert answer.json["unified"]["forecasts"] == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "weather"}, 400, "unknown_model"),
        ({"model": "fraud"}, 422, "not_an_object"),
        ({"model": "fraud", "event": event("ride_request")}, 422, "not_a_payment"),
        ({"model": "fraud", "event": event("payment", data={"transaction_id": "t"})}, 422, "malformed"),
        ({"model": "fraud", "event": {**payment("t"), "user_id": "a b"}}, 422, "invalid"),
        ({"model": "demand", "horizon": 0}, 400, "invalid_horizon"),
        ({"model": "demand", "zone": 7}, 400, "invalid_zone"),
    ],
)
def test_question_that_cannot_be_answered_names_what_is_wrong(client, body, status, code):
    answer = client.post("/api/ml/predict", json=body)
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)


def test_demand_without_a_zone_and_horizon_is_the_citys_next_step(predicting, predictor):
    client, _ = predicting
    absent = ask(client, model="demand").json["nexus"]
    null = ask(client, model="demand", zone=None, horizon=None)
    assert (null.status_code, null.json["nexus"]["zone"]) == (200, absent["zone"])
    assert predictor.questions == [{"model": "demand", "zone": None, "horizon": 1}] * 2


def test_nexus_forecast_of_a_step_stands_and_the_partners_fills_what_it_has_not(predicting, predictor, store):
    client, nexus = predicting
    plant_demand(store, nexus.clock())
    own = ask(client, model="demand", horizon=2).json["nexus"]["forecasts"]
    shifted, beyond = own[1]["at"].replace("Z", "+00:00"), "2100-01-01T00:00:00.000Z"
    theirs = {"value": own[1]["value"] + 10, "low": 0, "high": 99}
    predictor.says = {"forecasts": [{"at": at, **theirs} for at in (shifted, beyond)]}
    united = ask(client, model="demand", horizon=2).json["unified"]["forecasts"]
    assert united == [*({**f, "of": ["nexus"]} for f in own), {"at": beyond, **theirs, "of": ["python"]}]


def test_partners_forecasts_count_while_nexus_has_no_history(predicting, predictor):
    client, _ = predicting
    theirs = {"at": "2100-01-01T00:00:00.000Z", "value": 2, "low": 1, "high": 3}
    predictor.says = {"forecasts": [theirs]}
    body = ask(client, model="demand", horizon=2).json
    assert (body["nexus"]["state"], body["unified"]["forecasts"]) == ("warming_up", [{**theirs, "of": ["python"]}])


# ------------------------------------------------------------------------------------------- retraining


def plant_demand(store, now: int, days: int = 8) -> None:
    """A city's requests with a daily rhythm up to now."""
    counts: dict[str, dict[int, int]] = {}
    for i in range(days * 48):
        at = (now - i * STEP_MS) // STEP_MS * demand.STEP_S
        week = at // (7 * 86_400) * 7 * 86_400
        counts.setdefault(f"{keys.DEMAND}city:{week}", {})[at] = 40 + 30 * ((at // 3600) % 24 >= 12) + i % 5
    for key, steps in counts.items():
        store.client.hset(key, mapping=steps)


def plant_frauds(store, now: int, frauds: int = 60, served_well: bool = False) -> None:
    """Payments of the last days as the stream would have left them: in frauds the payee's record tells."""
    chance = random.Random(7)
    for i in range(frauds * 10):
        is_fraud = i % 10 == 0
        x = [chance.random() for _ in fraud.NAMES]
        x[fraud.NAMES.index("payee's fraud rate")] = chance.uniform(0.5, 1.0) if is_fraud else chance.uniform(0.0, 0.55)
        at = now - 3 * DAY_MS + i * 3 * DAY_MS // (frauds * 10)
        served = float(is_fraud) if served_well else chance.random()
        score = Score(served, fraud.HABIT_VERSION, at, [], x, "m")
        store.client.hset(f"{keys.SCORES}{at // DAY_MS}", f"t-{i}", msgspec.msgpack.encode(score))
        if is_fraud:
            store.client.hset(f"{keys.LABELS}{at // DAY_MS}", f"t-{i}", 1)


def test_better_version_takes_over_in_memory_and_store(client, nexus, store):
    plant_frauds(store, nexus.clock())
    before = nexus.stream("inference").model
    answer = client.post("/api/ml/models/fraud/retrain")
    assert answer.status_code == 200, answer.json
    body = answer.json
    assert (body["model"], body["version"], body["promoted"]) == ("fraud", "logistic-2", True)
    assert body["metrics"]["candidate"]["average_precision"] > body["metrics"]["current"]["average_precision"]
    model = nexus.stream("inference").model
    assert model is not before
    assert (model.version, stored_fraud(store).version) == ("logistic-2", "logistic-2")
    assert model.weights == stored_fraud(store).weights
    scored = ask(client, model="fraud", event=payment("t-new")).json["nexus"]
    assert (scored["version"], scored["status"]) == ("logistic-2", "ready")


def test_version_that_is_no_better_changes_nothing_and_is_on_record(client, nexus, store):
    plant_frauds(store, nexus.clock(), served_well=True)
    before = nexus.stream("inference").model
    body = client.post("/api/ml/models/fraud/retrain").json
    assert body["promoted"] is False
    assert nexus.stream("inference").model is before
    assert store.client.get(keys.MODEL + "fraud") is None
    listed = client.get("/api/ml/models").json["models"][0]
    assert [(v["version"], v["promoted"]) for v in listed["versions"]] == [("logistic-2", False)]
    assert client.post("/api/ml/models/fraud/retrain").json["version"] == "logistic-3"


def test_version_that_has_just_taken_over_is_not_judged_by_its_forerunners_scores(client, nexus, store):
    plant_frauds(store, nexus.clock())
    assert client.post("/api/ml/models/fraud/retrain").json["promoted"] is True
    answer = client.post("/api/ml/models/fraud/retrain")
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "too_few_labels")
    assert "logistic-2" in answer.json["error"]["message"]


def test_too_few_labels_are_named(client, nexus, store):
    plant_frauds(store, nexus.clock(), frauds=19)
    answer = client.post("/api/ml/models/fraud/retrain")
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "too_few_labels")
    assert answer.json["error"]["details"]["frauds"] == 19


def test_retraining_without_waiting_ends_with_the_verdict_on_record(client, nexus, store):
    plant_frauds(store, nexus.clock())
    answer = client.post("/api/ml/models/fraud/retrain?wait=false")
    assert (answer.status_code, answer.json) == (202, {"model": "fraud", "state": "training"})
    until(lambda: client.get("/api/ml/models").json["models"][0]["versions"], "the verdict")
    assert nexus.stream("inference").model.version == "logistic-2"


def test_one_model_trains_at_a_time(client, nexus):
    with nexus.models._training:
        answer = client.post("/api/ml/models/demand/retrain")
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "already_training")


def test_demand_is_retrained_against_the_version_in_force(client, nexus, store):
    plant_demand(store, nexus.clock())
    body = client.post("/api/ml/models/demand/retrain").json
    errors = {name: body["metrics"][name]["wape"] for name in ("candidate", "current")}
    assert body["promoted"] is (errors["candidate"] < errors["current"])
    in_force = body["version"] if body["promoted"] else demand.VERSION
    assert client.get("/api/ml/predictions/demand").json["model"] == in_force


def test_demand_without_history_is_not_trained(client):
    answer = client.post("/api/ml/models/demand/retrain")
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "too_little_history")


def test_unknown_model_and_unknown_wait_are_refused(client):
    assert client.post("/api/ml/models/weather/retrain").status_code == 404
    assert client.post("/api/ml/models/fraud/retrain?wait=perhaps").status_code == 400


def test_standby_refers_to_the_instance_that_runs_the_models(start_nexus, nexus, tmp_path):
    second = client_of(start_nexus("standby", tmp_path / "second"))
    for response in (second.post("/api/ml/models/fraud/retrain"), ask(second, model="fraud", event=payment("t"))):
        assert (response.status_code, response.get_json()["error"]["code"]) == (503, "fenced")
    assert second.get("/api/ml/models").status_code == 200


def test_models_are_listed_with_their_figures_and_baseline(client, nexus, store):
    plant_frauds(store, nexus.clock(), served_well=True)
    plant_demand(store, nexus.clock())
    nexus.models.look()
    by_name = {model["name"]: model for model in client.get("/api/ml/models").json["models"]}
    week = by_name["fraud"]["metrics"]["7d"]
    assert (week["average_precision"], week["auc"], week["frauds"], week["payments"]) == (1.0, 1.0, 60, 600)
    assert by_name["fraud"]["metrics"]["24h"]["frauds"] < 60
    assert by_name["fraud"]["baseline"]["metrics"]["7d"]["auc"] < 1.0
    assert by_name["demand"]["state"] == "ready"
    assert by_name["demand"]["baseline"]["metrics"]["24h"]["wape"] > 0


# -------------------------------------------------------------------------------- promotion in the stream


def test_promotion_is_written_with_the_checkpoint_that_covers_it(store, clock):
    stream = Inference(store)
    stream.promote(Promoted("fraud", fraud.Fraud(version="logistic-7"), b"{}"))
    assert stream.unsaved
    cut = stream.cut(clock())
    assert not stream.unsaved
    assert stored_fraud(store).version == fraud.VERSION  # not before the commit
    write(store, cut)
    assert stored_fraud(store).version == stream.model.version == "logistic-7"


def test_label_that_came_during_training_is_not_lost(store, clock):
    stream = Inference(store)
    stream.process(batch_of(store, [payment("t-1"), payment("t-2"), report("t-1"), report("t-2")], clock()), clock())
    stream.promote(Promoted("fraud", fraud.Fraud(frauds=1), b"{}", known=frozenset({"t-1"})))
    stream.cut(clock())
    assert stream.model.frauds == 2


def test_version_that_takes_over_goes_on_with_what_its_forerunner_saw_of_payments(store, clock):
    stream = Inference(store)
    stream.process(batch_of(store, [payment(f"t-{n}", 5 + n) for n in range(20)], clock()), clock())
    before = stream.model
    stream.promote(Promoted("fraud", fraud.Fraud(version="logistic-7"), b"{}"))
    write(store, stream.cut(clock()))
    for model in (stream.model, stored_fraud(store)):
        assert (model.version, model.scored) == ("logistic-7", 20)
        assert (model.recent, model.amounts) == (before.recent, before.amounts)
        assert (model.recent, model.amounts) != (fraud.Fraud().recent, fraud.Fraud().amounts)


def test_promotion_lost_with_its_stream_is_handed_over_again(client, nexus, store):
    plant_frauds(store, nexus.clock())
    stream = nexus.stream("inference")
    stream.promote = lambda version: setattr(stream, "process", fail)
    nexus.aside("events", lambda: until(lambda: stream.process is fail and client_post(nexus)))
    body = client.post("/api/ml/models/fraud/retrain").json
    assert body["promoted"] is True
    assert nexus.stream("inference") is not stream
    assert stored_fraud(store).version == "logistic-2"


def fail(batch: Any, now: int) -> Any:
    raise RuntimeError("broken on purpose")


def client_post(nexus: Any) -> bool:
    return bool(nexus.ingest.post(b'{"event_type":"t","user_id":"u"}', "application/json", "", {}))


# ------------------------------------------------------------------------------------------- arithmetic


def examples_of(rows: list[tuple[int, float, float]]) -> list[Example]:
    return [Example(f"t-{i}", i, [0.0] * len(fraud.NAMES), y, s, weight=w) for i, (y, s, w) in enumerate(rows)]


def test_average_precision_and_auc_are_those_counted_by_hand():
    found = examples_of([(1, 0.9, 1), (0, 0.8, 1), (1, 0.7, 1), (0, 0.1, 1)])
    measured = training.measure(training.served(found), found)
    assert measured == {"average_precision": pytest.approx((1 + 2 / 3) / 2, abs=1e-6), "auc": 0.75, "frauds": 2,
                        "payments": 4}  # fmt: skip


def test_sampled_payments_count_for_those_they_stand_for():
    sampled = examples_of([(1, 0.5, 1), (0, 0.8, 3), (0, 0.1, 1)])
    whole = examples_of([(1, 0.5, 1), *[(0, 0.8, 1)] * 3, (0, 0.1, 1)])
    by_sample, by_all = (training.measure(training.served(e), e) for e in (sampled, whole))
    assert by_sample == by_all


def test_equal_scores_tell_nothing():
    found = examples_of([(1, 0.5, 1), (0, 0.5, 1), (0, 0.5, 1)])
    assert training.measure(training.served(found), found)["auc"] == 0.5


def test_better_by_the_chance_of_which_payments_were_drawn_is_not_surely_better():
    chance = np.random.default_rng(5)
    found = examples_of([(int(i % 10 == 0), 0.0, 1) for i in range(300)])
    y = np.array([e.y for e in found])
    blind, other, seeing = chance.random(300), chance.random(300), y * 0.5 + chance.random(300)
    lucky, unlucky = sorted((blind, other), key=lambda given: -training.measure(given, found)["average_precision"])
    better, share = training.surely_better(lucky, unlucky, found)
    assert (better, 0.5 < share < 0.9) == (False, True)
    assert training.surely_better(seeing, blind, found) == (True, 1.0)
    assert training.surely_better(blind, seeing, found) == (False, 0.0)


def test_one_label_alone_has_no_figures():
    found = examples_of([(0, 0.5, 1), (0, 0.4, 1)])
    assert training.measure(training.served(found), found)["auc"] is None


def test_held_out_payments_are_later_than_all_trained_on():
    found = [Example(f"t-{i}", i, [0.0] * len(fraud.NAMES), int(i % 5 == 0), 0.0) for i in range(200)]
    earlier, later = training.split(found, fraud.VERSION) or ([], [])
    assert max(e.at for e in earlier) < min(e.at for e in later)
    assert sum(e.y for e in later) == 12


def test_only_payments_that_the_version_in_force_has_scored_are_held_out():
    found = [
        Example(f"t-{i}", i, [0.0] * len(fraud.NAMES), int(i % 5 == 0), 0.0, "logistic-1" if i < 170 else "logistic-2")
        for i in range(200)
    ]
    _, later = training.split(found, "logistic-2") or ([], [])
    assert (min(e.at for e in later), sum(e.y for e in later)) == (170, 6)
    assert training.split(found, "logistic-3") is None


def test_label_that_came_when_the_held_out_time_had_begun_is_not_trained_on():
    found = [Example(f"t-{i}", i, [0.0] * len(fraud.NAMES), int(i % 5 == 0), 0.0, known_at=i + 20) for i in range(200)]
    earlier, later = training.split(found, fraud.VERSION) or ([], [])
    edge = min(e.at for e in later)
    assert max(e.known_at for e in earlier) <= edge
    assert max(e.at for e in earlier) == edge - 20


def test_figures_of_the_version_in_force_are_of_what_it_has_scored_itself(client, nexus, store):
    plant_frauds(store, nexus.clock(), served_well=True)
    now = nexus.clock()
    for i in range(50):  # another version's scores, on a scale of their own
        score = Score(0.99, "logistic-9", now - i, [], [0.1] * len(fraud.NAMES), "m")
        store.client.hset(f"{keys.SCORES}{(now - i) // DAY_MS}", f"other-{i}", msgspec.msgpack.encode(score))
    nexus.models.look()
    week = client.get("/api/ml/models").json["models"][0]["metrics"]["7d"]
    assert (week["average_precision"], week["payments"]) == (1.0, 600)


def test_figures_of_unchanged_data_are_the_same_each_time(client, nexus, store):
    """Of more payments than are looked at, so that they are of a sample."""
    now, chance = nexus.clock(), random.Random(3)
    scored = {}
    for i in range(5 * LOOKED_AT):
        score = Score(chance.random(), fraud.HABIT_VERSION, now - i, [], [0.5] * len(fraud.NAMES), "m")
        scored[f"t-{i}"] = msgspec.msgpack.encode(score)
    day = now // DAY_MS
    store.client.hset(f"{keys.SCORES}{day}", mapping=scored)
    store.client.hset(f"{keys.LABELS}{day}", mapping={f"t-{i}": 1 for i in range(0, 2000, 40)})
    looked = [nexus.models.look()["models"][0]["metrics"] for _ in range(5)]
    assert looked == [looked[0]] * 5
    assert looked[0]["24h"]["payments"] == pytest.approx(5 * LOOKED_AT, rel=0.02)
    assert len(examples(store, now, 1, LOOKED_AT)) < 2 * LOOKED_AT
    assert {e.transaction for e in examples(store, now, 1)} == {e.transaction for e in examples(store, now, 1)}


def test_label_counts_as_known_from_the_end_of_the_day_it_came_on(store):
    score = Score(0.5, fraud.HABIT_VERSION, NOON, [], [0.5] * len(fraud.NAMES), "m")
    store.client.hset(f"{keys.SCORES}{NOON // DAY_MS}", "t-1", msgspec.msgpack.encode(score))
    store.client.hset(f"{keys.LABELS}{NOON // DAY_MS + 1}", "t-1", 1)
    [labelled] = examples(store, NOON + DAY_MS, 7)
    assert (labelled.y, labelled.known_at) == (1, (NOON // DAY_MS + 2) * DAY_MS)


def test_fit_finds_the_weights_that_made_the_labels():
    chance = np.random.default_rng(3)
    rows = chance.uniform(-1, 1, (4000, len(fraud.NAMES)))
    truth = np.resize([1.0, -2.0, 0.0, 0.5, 0.0, 3.0, 0.0], len(fraud.NAMES))
    labels = chance.uniform(size=4000) < 1 / (1 + np.exp(-(rows @ truth - 1.0)))
    found = [Example(str(i), i, row.tolist(), int(y), 0.0) for i, (row, y) in enumerate(zip(rows, labels, strict=True))]
    assert training.fit(found).weights == pytest.approx([-1.0, *truth], abs=0.35)


def test_fit_of_separable_data_stays_finite():
    found = [Example(str(i), i, [float(i > 50)] * len(fraud.NAMES), int(i > 50), 0.0) for i in range(100)]
    assert all(abs(w) < 50 for w in training.fit(found).weights)


def test_backtest_uses_nothing_from_after_its_origin():
    now = 1_800_000_000 // demand.STEP_S * demand.STEP_S
    counts = {now - i * demand.STEP_S: float(i % 48) for i in range(48 * 4)}
    origin = now - 10 * demand.STEP_S
    known = {at: n for at, n in counts.items() if at < origin}
    model = demand.Demand()
    assert demand.forecast(counts, origin, 5, model) == demand.forecast(known, origin, 5, model)
    assert origin in backtest.origins(counts, now)


def test_backtest_of_a_strict_rhythm_has_next_to_no_error():
    now = 1_800_000_000 // demand.STEP_S * demand.STEP_S
    counts = {at: 10_000.0 * (1 + at // demand.STEP_S % 48) for at in range(now - 5 * 86_400, now, demand.STEP_S)}
    at = [origin for origin in backtest.origins(counts, now) if origin >= now - 3 * 86_400]
    assert backtest.naive_error(counts, at) == 0.0
    assert (backtest.error(demand.Demand(), counts, at) or 0) < 0.001
