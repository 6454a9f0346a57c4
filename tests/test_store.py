"""The connection to the store: addresses, scripts, and the errors that come out of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pipeline import keys
from pipeline.commit_log.checkpoints import commit
from pipeline.errors import Fenced, StoreFull, StoreRefused, StoreUnavailable
from pipeline.pool import _Socket
from pipeline.settings import load
from pipeline.store import Store
from tests.helpers import DEADLINE_S, Cluster, free_port, until


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


def test_store_that_has_ended_and_come_back_between_two_calls_is_not_noticed(own_server):
    connection = Store(own_server.url)
    calls = [connection.begin("lease", (keys.OWNER,), ("take", name, 1, 10_000, 0)) for name in ("one", "two", "three")]
    assert [call.result() for call in calls] == [1, 0, 0]  # three connections, all of them idle now
    own_server.kill()
    own_server.start()
    calls = [connection.begin("lease", (keys.OWNER,), ("take", "four", 2, 10_000, 0)) for _ in range(3)]
    assert [call.result() for call in calls] == [0, 0, 0]
    assert connection.call("PING")
    connection.close()


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_store_that_stands_still_is_given_up_after_the_timeout_and_its_late_answer_is_nobodys(
    own_server, monkeypatch, scheme
):
    monkeypatch.setattr("pipeline.store._TIMEOUT_S", 0.3)
    port = free_port()
    own_server.client.config_set("port", port)
    connection = Store(own_server.url if scheme == "unix" else f"redis://127.0.0.1:{port}/0")
    assert connection.call("SET", "k", "v")
    os.kill(own_server.process.pid, signal.SIGSTOP)
    try:
        large = b"x" * (64 << 20)  # more than the sockets hold: the send itself has to be given up
        for call in (
            lambda: connection.call("GET", "k"),
            lambda: connection.lean("GET", "k"),
            lambda: connection.call("SET", "large", large),
        ):
            with pytest.raises(StoreUnavailable, match=r"[Tt]im"):
                call()
    finally:
        os.kill(own_server.process.pid, signal.SIGCONT)
    assert connection.call("PING") in (True, b"PONG")
    assert connection.lean("GET", "k") == b"v"
    assert connection.lean("GET", "large") is None
    connection.close()


def test_send_to_who_reads_nothing_is_given_up_after_the_timeout():
    ours, deaf = socket.socketpair()
    late = threading.Timer(DEADLINE_S, deaf.close)  # else who waits without end would end no test either
    late.start()
    with contextlib.closing(_Socket.of(ours, 0.2)) as connection, deaf, pytest.raises(TimeoutError):
        connection.sendall(b"x" * (16 << 20))
    late.cancel()


def test_calls_side_by_side_have_a_connection_each_and_leave_it_to_the_next(own_server):
    connection = Store(own_server.url)
    for _ in range(3):
        calls = [connection.begin("lease", (keys.OWNER,), ("renew", name, 1, 1, 0)) for name in "abcde"]
        for call in calls[:4]:
            call.result()
        calls[4].close()  # its answer is never read by another
        assert connection.call("ECHO", "mine") == b"mine"
    assert len(own_server.client.client_list()) <= 1 + 5
    connection.close()


def test_store_at_its_memory_limit_raises_store_full_and_a_commit_still_goes_through(own_server):
    connection = Store(own_server.url)
    epoch = connection.run("lease", (keys.OWNER,), ("take", "one", 1, 1, 0))
    connection.call("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(StoreFull):
        connection.call("SET", "ml:{p}:x", "y")
    commit(connection, epoch, [("SET", "ml:{p}:x", "y")])
    connection.call("CONFIG", "SET", "maxmemory", 0)
    assert connection.call("GET", "ml:{p}:x") == b"y"
    connection.close()


def test_commit_of_an_older_epoch_raises_fenced_and_writes_nothing(store):
    older = store.run("lease", (keys.OWNER,), ("take", "one", 1, 1, 0))
    store.run("lease", (keys.OWNER,), ("seize", "two", 2, 1, 0))
    with pytest.raises(Fenced):
        commit(store, older, [("SET", "ml:{p}:x", "y")])
    assert store.call("GET", "ml:{p}:x") is None


@pytest.mark.parametrize(
    ("command", "read", "size"),
    [
        (["HSET", *[word for n in range(20_000) for word in (f"f{n}", n)]], "HLEN", 20_000),
        (["ZADD", *[word for n in range(20_000) for word in (n, f"f{n}")]], "ZCARD", 20_000),
        (["LPUSH", *range(20_001)], "LLEN", 20_001),
        (["HDEL", *[f"f{n}" for n in range(20_001)]], "HLEN", 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commit_takes_a_command_of_any_length(store, command, read, size):
    epoch = store.run("lease", (keys.OWNER,), ("take", "one", 1, 1, 0))
    key = keys.PREFIX + "x"
    if size == 0:
        store.call("HSET", key, *[word for n in range(20_000) for word in (f"f{n}", n)])
    commit(store, epoch, [[command[0], key, *command[1:]], ("SET", keys.PREFIX + "y", "z")])
    assert (store.call(read, key), store.call("GET", keys.PREFIX + "y")) == (size, b"z")
    if read == "LLEN":
        assert store.call("LRANGE", key, 0, 1) == [b"20000", b"19999"]


@pytest.mark.parametrize("at_once", [True, False])
def test_store_that_is_busy_is_away_for_now_whichever_way_it_is_asked(own_server, at_once):
    own_server.client.config_set("busy-reply-threshold", 1)
    connection, stopped = Store(own_server.url), threading.Event()

    def work() -> None:
        with pytest.raises(redis.ResponseError, match="killed"):
            own_server.client.eval("while true do end", 0)
        stopped.set()

    threading.Thread(target=work).start()
    ask = (lambda: connection.many([("GET", "OOM")])) if at_once else (lambda: connection.call("GET", "OOM"))

    def busy() -> Any:
        try:
            return ask() and None
        except Exception as error:  # noqa: BLE001  looked at
            return [error]

    [error] = until(busy, "the store to be busy")
    with redis.Redis(unix_socket_path=str(own_server.socket)) as other:
        other.script_kill()
    assert stopped.wait(30)
    assert isinstance(error, StoreUnavailable)
    assert error.message.startswith("the store does not answer: BUSY ")
    connection.close()


def test_script_that_fails_is_told_as_refused_and_not_as_a_store_that_is_away(store):
    store.call("SET", keys.OWNER, "not a hash")
    with pytest.raises(StoreRefused, match="refuses what was asked: WRONGTYPE"):
        store.run("lease", (keys.OWNER,), ("take", "one", 1, 1, 0))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Store]:
    """A Cluster of one node."""
    server = Cluster(tmp_path, 1).start()
    connection = Store(server.url, cluster=True)
    yield connection
    connection.close()
    server.kill()


def test_node_of_a_cluster_that_is_not_told_to_be_one_is_refused_with_the_remedy(tmp_path):
    server = Cluster(tmp_path, 2)
    connection = Store(server.url)  # of the first node; Nexus's keys are on the second
    try:
        server.start()
        for ask in (
            lambda: connection.call("EXISTS", keys.HEAD),
            lambda: connection.many([("EXISTS", keys.HEAD)], atomic=True),
            lambda: connection.run("lease", (keys.OWNER,), ("take", "one", 1, 1, 0)),
        ):
            with pytest.raises(StoreRefused) as told:
                ask()
            assert told.value.message == "the store is a node of a Cluster: set REDIS_CLUSTER=true"
    finally:
        connection.close()
        server.kill()


def test_commands_of_one_step_are_answered_as_of_one_moment(store):
    done = threading.Event()

    def count() -> None:
        other = Store(store._url)
        while not done.is_set():
            other.call("INCR", "x")
        other.close()

    counting = threading.Thread(target=count)
    counting.start()
    try:
        until(lambda: store.call("GET", "x"), "the first count")
        for _ in range(20):
            assert len(set(store.many([("GET", "x")] * 2_000, atomic=True))) == 1
    finally:
        done.set()
        counting.join()


def test_of_many_hashes_and_fields_the_first_hash_that_has_a_field_decides_as_it_does_of_few(store):
    hashes, fields = [f"{keys.PREFIX}{n}" for n in range(25)], [f"f{n}" for n in range(300)]
    for n in (20, 9, 0):  # asked for in several pieces
        store.call("HSET", hashes[n], *[word for i in range(n, 300, 20) for word in (f"f{i}", f"{n}")])
    many = store.find(hashes, fields)
    assert many == [found for field in fields for found in store.find(hashes, [field])]
    assert (many[0], many[9], many[20], many[1]) == (b"0", b"9", b"0", None)
    store.call("HSET", hashes[24], "f0", "later", "f1", "last")
    assert store.find(hashes, fields)[:2] == [b"0", b"last"]


def test_commands_of_one_step_are_answered_on_a_cluster(cluster):
    cluster.call("HSET", keys.PREFIX + "a", "f", 1)
    [number, held, absent] = cluster.many(
        [("HGET", keys.PREFIX + "a", "f"), ("HGETALL", keys.PREFIX + "a"), ("HGETALL", keys.PREFIX + "b")], atomic=True
    )
    assert (number, list(held), list(absent)) == (b"1", [b"f"] if isinstance(held, dict) else [b"f", b"1"], [])


def test_commit_whose_answer_is_lost_is_not_repeated_on_a_cluster(cluster, monkeypatch):
    epoch = cluster.run("lease", (keys.OWNER,), ("take", "one", 1, 1, 0))
    commit(cluster, epoch, [("INCR", keys.PREFIX + "x")])  # the node knows the script
    answers = redis.connection.Connection.read_response
    lost: list[Any] = []

    def lose(self, *args, **kwargs):
        answer = answers(self, *args, **kwargs)
        if lost:
            return answer
        lost.append(answer)
        raise redis.ConnectionError("the connection broke")

    monkeypatch.setattr(redis.connection.Connection, "read_response", lose)
    with pytest.raises(StoreUnavailable) as told:
        commit(cluster, epoch, [("INCR", keys.PREFIX + "x")])
    assert (lost, told.value.lost) == ([b"OK"], True)
    assert cluster.call("GET", keys.PREFIX + "x") == b"2"


def test_cluster_that_goes_away_in_the_middle_of_a_request_leaves_open_whether_it_was_done(cluster, monkeypatch):
    cluster.call("PING")

    def broken(*_, **__):
        raise redis.ConnectionError("the connection broke")

    monkeypatch.setattr(redis.connection.Connection, "read_response", broken)
    with pytest.raises(StoreUnavailable) as told:
        cluster.call("INCR", keys.PREFIX + "x")
    assert told.value.lost
