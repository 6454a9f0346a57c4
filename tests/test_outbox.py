"""The outbox of the publisher: who comes first, and up to where in the log no public key lacks an event."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.commit_log.frames import Position
from pipeline.publishing.outbox import Outbox

CHECKPOINTS = [Position(1, 0, 0, 5 * n) for n in range(9)]
USERS = st.lists(st.sampled_from("abcdef"), unique=True)


def test_user_who_waits_already_keeps_the_place_and_the_first_event_that_its_key_lacks():
    outbox = Outbox()
    for checkpoint in CHECKPOINTS:
        outbox.saw(checkpoint)
    outbox.add("ab", 10)
    outbox.add("ca", 20)
    assert (outbox.first(9), outbox.advance()) == (["a", "b", "c"], CHECKPOINTS[2])
    outbox.take("a")
    assert outbox.advance() is None
    outbox.take("b")
    assert outbox.advance() == CHECKPOINTS[4]
    outbox.add("a")
    outbox.take("c")
    assert (outbox.first(9), outbox.advance()) == (["a"], None)
    outbox.take("a")
    assert (len(outbox), outbox.advance()) == (0, CHECKPOINTS[-1])


def test_users_who_could_not_be_published_come_first_again():
    outbox = Outbox()
    outbox.add("abc", 10)
    taken = outbox.take("ac")
    outbox.add("da", 20)
    outbox.put_back(taken)
    assert (outbox.first(9), outbox.first(1)) == (["a", "c", "b", "d"], ["a"])


@given(st.lists(st.tuples(st.sampled_from(("cut", "again", "publish", "fail")), USERS)))
def test_no_event_before_the_published_position_is_lacked_by_any_key(steps):
    """`lacks` is the truth: of each user the ordinal of the first event that its key lacks. A cut is checkpointed at once."""
    outbox, ordinal, published = Outbox(), 0, Position()
    lacks: dict[str, int] = {}
    for step, users in steps:
        if step == "cut":
            outbox.add(users, ordinal)
            lacks = {**dict.fromkeys(users, ordinal), **lacks}
            ordinal += 10
            outbox.saw(Position(1, 0, 0, ordinal))
        elif step == "again":
            outbox.add(users)
        else:
            taken = outbox.take(users)
            if step == "fail":
                outbox.put_back(taken)
            else:
                lacks = {user: at for user, at in lacks.items() if user not in users}
        assert set(lacks) <= set(outbox.first(9))
        published = outbox.advance() or published
        assert all(at >= published.ordinal for at in lacks.values())
        assert len(outbox) or published.ordinal == ordinal
