"""The outbox of the publisher: who comes first, and up to where in the log no public key lacks an event."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.outbox import Outbox

USERS = st.lists(st.sampled_from("abcdef"), unique=True)


def test_user_who_waits_already_keeps_the_place_and_the_first_event_that_its_key_lacks():
    outbox = Outbox()
    outbox.add("ab", 10)
    outbox.add("ca", 20)
    assert (outbox.first(9), outbox.reached()) == (["a", "b", "c"], 10)
    outbox.take("ab")
    assert outbox.reached() == 20
    outbox.add("a")
    outbox.take("c")
    assert (outbox.first(9), outbox.reached()) == (["a"], 20)
    outbox.take("a")
    assert (len(outbox), outbox.reached()) == (0, None)


def test_users_who_could_not_be_published_come_first_again():
    outbox = Outbox()
    outbox.add("abc", 10)
    taken = outbox.take("ac")
    outbox.add("da", 20)
    outbox.put_back(taken)
    assert (outbox.first(9), outbox.first(1), outbox.reached()) == (["a", "c", "b", "d"], ["a"], 10)


@given(st.lists(st.tuples(st.sampled_from(("cut", "again", "publish", "fail")), USERS)))
def test_no_event_before_what_is_reached_is_lacked_by_any_key(steps):
    """`lacks` is the truth: of each user the ordinal of the first event that its key lacks."""
    outbox, ordinal = Outbox(), 0
    lacks: dict[str, int] = {}
    for step, users in steps:
        if step == "cut":
            ordinal += 10
            outbox.add(users, ordinal)
            lacks = {**dict.fromkeys(users, ordinal), **lacks}
        elif step == "again":
            outbox.add(users)
        else:
            taken = outbox.take(users)
            if step == "fail":
                outbox.put_back(taken)
            else:
                lacks = {user: at for user, at in lacks.items() if user not in users}
        assert set(lacks) <= set(outbox.first(9))
        reached = outbox.reached()
        assert (reached is None) == (len(outbox) == 0)
        assert reached is None or all(at >= reached for at in lacks.values())
