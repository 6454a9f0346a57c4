"""Values that were read lately: whoever asks again is told what a reading of now would tell."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.catalogue import FEATURES
from pipeline.features.read_lately import MOST, ReadLately
from pipeline.windows import Windows
from tests.helpers import HOUR_MS, MINUTE_MS, NOON, parsed, payment, response

SECOND_MS = 1000
SOME = frozenset({"payments_1h", "event_count_5m"})
# Posted events: their type and how far their time lies from the clock; or so long passes.
_AGO = st.integers(-2 * HOUR_MS, HOUR_MS)
_PASS = st.sampled_from([1, SECOND_MS, 7 * SECOND_MS, MINUTE_MS, HOUR_MS, 25 * HOUR_MS])
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["payment", "response"]), st.one_of(st.just(0), _AGO)),
        st.tuples(st.just("pass"), _PASS),
    ),
    max_size=30,
)


@given(_STEPS)
@example([("payment", SECOND_MS), ("pass", 7 * SECOND_MS)])
@example([("payment", 1), ("pass", 1)])
def test_what_was_read_before_is_told_as_long_as_it_holds(steps):
    windows = Windows(FEATURES)
    lately, entity, now = ReadLately(windows), windows.new(), NOON
    for number, (step, size) in enumerate(steps):
        if step == "pass":
            now += size
        else:
            posted = payment(f"t{number}", number) if step == "payment" else response(response_time=number)
            stored, at = parsed([posted], now)[0].stored, now + size
            windows.add(entity, at, windows.extract(stored, stored.data, at), now)
            entity.position += 1
        for owner, names in (("all", None), ("some", SOME)):
            assert lately.values(owner, entity, now, names) == windows.values(entity, now, names)


def test_some_of_the_values_and_all_of_them_are_told_apart():
    windows = Windows(FEATURES)
    lately, entity = ReadLately(windows), windows.new()
    for names in (SOME, None, SOME):
        assert lately.values("u", entity, NOON, names).keys() == windows.values(entity, NOON, names).keys()


def test_values_are_not_read_again_until_an_event_comes_or_a_tile_may_leave(monkeypatch):
    windows = Windows(FEATURES)
    lately, entity, reads = ReadLately(windows), windows.new(), 0
    read = windows.values

    def counting(*asked):
        nonlocal reads
        reads += 1
        return read(*asked)

    monkeypatch.setattr(windows, "values", counting)
    start = NOON // windows.grain_ms * windows.grain_ms
    for at, position, expected in [
        (0, 1, 1),
        (0, 1, 1),
        (windows.grain_ms - 1, 1, 1),
        (windows.grain_ms, 1, 2),
        (windows.grain_ms, 2, 3),
    ]:
        entity.position = position
        lately.values("u", entity, start + at)
        assert reads == expected


def test_values_of_no_more_than_so_many_are_kept():
    windows = Windows(FEATURES)
    lately, entity = ReadLately(windows), windows.new()
    for number in range(MOST + 10):
        lately.values(f"u{number}", entity, NOON)
    assert len(lately._kept) <= MOST


def test_another_entity_of_the_same_name_is_read_itself():
    """As when one was let go of and came back."""
    windows = Windows(FEATURES)
    lately, first, second = ReadLately(windows), windows.new(), windows.new()
    for entity, amount in ((first, 1), (second, 2)):
        sent = parsed([payment("t", amount)], NOON)[0].stored
        windows.add(entity, NOON, windows.extract(sent, sent.data, NOON), NOON)
        entity.position = 1
    assert lately.values("u", first, NOON)["payment_sum_24h"] == 1
    assert lately.values("u", second, NOON)["payment_sum_24h"] == 2


def test_values_of_an_entity_whose_tiles_are_being_moved_are_not_kept():
    windows = Windows(FEATURES)
    lately, entity = ReadLately(windows), windows.new()
    entity.begun += 1
    lately.values("u", entity, NOON)
    assert not lately._kept
