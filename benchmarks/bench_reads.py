"""Reads: the combined features of one user and of 100, idle and under load, beside Feast and the bare store."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from random import Random

from benchmarks import table
from benchmarks.hammer import TOOL, Closed, hammer
from benchmarks.harness import Options, System, running
from benchmarks.load import apart, load, open_loop, percentile
from benchmarks.peers import launch
from benchmarks.six_features import SIX
from benchmarks.table import Row
from benchmarks.traffic import Traffic, get, name_of, request

TITLE = "Reads: combined features of both systems"
USERS = 10_000
LOAD = 5_000  # events/s beside the reads
_FEAST_NOTE = "the same six features; Feast looks up finished values of one origin, without age, verdict or window"


def run(options: Options) -> list[Row]:
    seconds = options.pick(1, 3, 10)
    found: dict[str, list[Closed]] = {}

    def measure(label: str, port: int, requests: list[bytes], clients: int) -> None:
        found.setdefault(label, []).append(hammer(port, requests, clients, seconds))

    with contextlib.ExitStack() as stack:
        system = stack.enter_context(running(options.data))
        bring_in(system, USERS)
        feast = None
        if not launch.unavailable("feast"):
            store = stack.enter_context(launch.store(options.data))
            folder = launch.feast_apply(store)
            launch.feast_push(folder, USERS, 100, 300)
            feast = stack.enter_context(launch.feast_server(folder))
        everyone = [name_of(user) for user in Random(3).sample(range(USERS), 2_000)]
        for _ in range(options.repetitions):
            for clients in (1, 8):
                measure(f"one user, {_clients(clients)}", system.port, ones(everyone), clients)
                measure(f"one user, six features, {_clients(clients)}", system.port, ones(everyone, SIX), clients)
                if feast is not None:
                    measure(f"Feast, one user, six features, {_clients(clients)}", feast, feast_ones(everyone), clients)
                measure(f"100 users, {_clients(clients)}", system.port, hundreds(everyone), clients)
            with loaded(system, seconds * 4 + 2):
                for clients in (1, 8):
                    label = f"{_clients(clients)}, during {LOAD:,} events/s"
                    measure(f"one user, {label}", system.port, ones(everyone), clients)
                    measure(f"100 users, {label}", system.port, hundreds(everyone), clients)
            system.quiet()
        bare = store_gets(system, everyone)
    return [Row("load generator", None, "", note=TOOL), *_rows(found), *bare]


def _rows(found: dict[str, list[Closed]]) -> list[Row]:
    asked = {
        "one user, 1 client": (1.5, 0.5),
        "one user, 8 clients": (4, 1.5),
        f"one user, 1 client, during {LOAD:,} events/s": (8, 3),
    }
    rows = []
    for label, seen in found.items():
        target, aim = asked.get(label, (None, None))
        rows += [
            table.of(f"requests, {label}", [closed.rps for closed in seen], "/s"),
            table.of(f"p50, {label}", [closed.p50 for closed in seen], "ms"),
            table.of(f"p99, {label}", [closed.p99 for closed in seen], "ms", target=target, aim=aim),
        ]
    why = launch.unavailable("feast")
    for clients in (1, 8):
        label = f"one user, six features, {_clients(clients)}"
        if why:
            rows.append(table.missing(f"requests, {label}, over Feast's server", "times", why))
            continue
        mine, other = ([closed.rps for closed in found[name]] for name in (label, f"Feast, {label}"))
        more = {"target": 3, "aim": 10, "more_is_better": True, "note": _FEAST_NOTE}
        rows.append(table.ratio(f"requests, {label}", mine, other, "Feast's server (--max-requests 0)", **more))
    return rows


def bring_in(system: System, users: int) -> None:
    """Every user once and the busy ones often, known to both systems."""
    load(open_loop, system.port, Traffic(users=users, first=0, requests=users // 100), 40, users / 100 / 40)
    load(open_loop, system.port, Traffic(users=users, requests=200), 40, 5).only(202)
    system.quiet()  # the public keys of both systems are written


@contextlib.contextmanager
def loaded(system: System, seconds: float) -> Iterator[None]:
    """Load by the clock in the background, which has to be answered without a failure."""
    beside = apart(open_loop, system.port, Traffic(users=USERS), LOAD / 100, seconds)
    time.sleep(1)
    yield
    beside.result().only(202)


def ones(users: list[str], names: tuple[str, ...] = ()) -> list[bytes]:
    tail = f"?names={','.join(names)}" if names else ""
    return [get(f"/api/ml/features/{user}{tail}") for user in users]


def hundreds(users: list[str]) -> list[bytes]:
    groups = [users[at : at + 100] for at in range(0, len(users), 100)]
    return [request("/api/ml/features", json.dumps({"user_ids": group}).encode()) for group in groups]


def feast_ones(users: list[str]) -> list[bytes]:
    wanted = [f"driver:{name}" for name in SIX]
    return [
        request("/get-online-features", json.dumps({"features": wanted, "entities": {"user_id": [user]}}).encode())
        for user in users
    ]


def store_gets(system: System, users: list[str]) -> list[Row]:
    """A bare GET of the public key by one client in this process: what no server can be faster than."""
    times = []
    for user in users:
        began = time.perf_counter()
        system.store.get(f"ml:serving:features:{user}")
        times.append(time.perf_counter() - began)
    note = "redis-py over the unix socket, one finished value, no HTTP"
    return [
        Row("p50, bare GET of the store, 1 client", percentile(times, 0.5) * 1000, "ms", note=note),
        Row("p99, bare GET of the store, 1 client", percentile(times, 0.99) * 1000, "ms"),
    ]


def _clients(number: int) -> str:
    return "1 client" if number == 1 else f"{number} clients"
