"""The connection to the store: addresses, scripts, and the errors that come out of it."""

import pytest

from pipeline import keys
from pipeline.errors import Fenced, StoreFull, StoreUnavailable
from pipeline.settings import load
from pipeline.store import Store


def test_store_is_reached_through_a_unix_socket_given_as_redis_url(store_server):
    settings = load({"REDIS_URL": f"unix://{store_server.socket}"})
    connection = Store(settings.store_url)
    assert connection.call("PING")
    connection.close()


def test_script_that_the_store_has_forgotten_is_loaded_again(store):
    store.run("lease", (keys.OWNER,), ("take", "one", 1000, 10_000, 0))
    store.call("SCRIPT", "FLUSH")
    assert store.run("lease", (keys.OWNER,), ("renew", "one", 2000, 10_000, 0)) == 0


def test_store_that_is_away_raises_store_unavailable_at_every_kind_of_call(tmp_path):
    connection = Store(f"unix://{tmp_path}/nobody.sock")
    for call in (
        lambda: connection.call("PING"),
        lambda: connection.many([("PING",)]),
        lambda: connection.run("lease", (keys.OWNER,), ("take", "one", 1, 1, 0)),
    ):
        with pytest.raises(StoreUnavailable):
            call()


def test_store_at_its_memory_limit_raises_store_full_and_a_commit_still_goes_through(own_server):
    connection = Store(own_server.url)
    epoch = connection.run("lease", (keys.OWNER,), ("take", "one", 1, 1, 0))
    connection.call("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(StoreFull):
        connection.call("SET", "ml:{p}:x", "y")
    connection.run("commit", (keys.OWNER,), (epoch, 3, "SET", "ml:{p}:x", "y"))
    connection.call("CONFIG", "SET", "maxmemory", 0)
    assert connection.call("GET", "ml:{p}:x") == b"y"
    connection.close()


def test_commit_of_an_older_epoch_raises_fenced_and_writes_nothing(store):
    older = store.run("lease", (keys.OWNER,), ("take", "one", 1, 1, 0))
    store.run("lease", (keys.OWNER,), ("seize", "two", 2, 1, 0))
    with pytest.raises(Fenced):
        store.run("commit", (keys.OWNER,), (older, 3, "SET", "ml:{p}:x", "y"))
    assert store.call("GET", "ml:{p}:x") is None
