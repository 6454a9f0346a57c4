"""The peer that one would write by hand: FastAPI and pydantic take batches in, a consumer counts features per user.

    python -m benchmarks.peers.byhand serve --port 5000 --socket /tmp/valkey.sock
    python -m benchmarks.peers.byhand consume --socket /tmp/valkey.sock

With --once it also looks up ids: SET NX per event, kept for a week, before the XADD. A crash between the two loses the event, since
its id then counts as known.

Pipelined, with the fast loop and parsers, as a competent engineer would have it. What it does not do: idempotency
(but for --once), windows (its features count for ever), exactly-once (a crash between counting and XACK counts again), look-ups,
aggregates, scores, a partner, dead letters, memory limits.
"""

from __future__ import annotations

import argparse
import asyncio
from datetime import datetime
from typing import Annotated, Any

import redis.asyncio as redis
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field, TypeAdapter

STREAM, GROUP = "events", "features"


class Location(BaseModel):
    lat: float = Field(ge=-90, le=90)
    lng: float = Field(ge=-180, le=180)


class Event(BaseModel):
    event_type: Annotated[str, Field(min_length=1, max_length=64)]
    user_id: Annotated[str, Field(min_length=1, max_length=128)]
    event_id: str | None = None
    session_id: str | None = None
    timestamp: datetime | None = None
    app_version: str = "unknown"
    device_type: str = "unknown"
    location: Location | None = None
    data: dict[str, Any] = {}


class Batch(BaseModel):
    events: list[Event]
    source: str = "unknown"


def create_app(store: redis.Redis, once: bool) -> FastAPI:
    app = FastAPI()

    async def unknown(events: list[Event]) -> list[Event]:
        """Those whose id was not seen for a week."""
        pipe = store.pipeline(transaction=False)
        for event in events:
            pipe.set(f"seen:{event.event_id}", 1, nx=True, ex=604_800)
        return [event for event, new in zip(events, await pipe.execute(), strict=True) if new]

    @app.post("/events", status_code=202)
    async def take(batch: Batch) -> dict[str, int]:
        events = await unknown(batch.events) if once else batch.events
        pipe = store.pipeline(transaction=False)
        for event in events:
            pipe.xadd(STREAM, {"event": event.model_dump_json()})
        await pipe.execute()
        return {"accepted": len(events)}

    @app.get("/features/{user_id}")
    async def features(user_id: str) -> dict[str, Any]:
        sums = {k: float(v) for k, v in (await store.hgetall(f"features:{user_id}")).items()}
        answered = sums.get("accepted", 0) + sums.get("rejected", 0)
        return {
            "user_id": user_id,
            "events": sums.get("events", 0),
            "acceptance_rate": sums.get("accepted", 0) / answered if answered else None,
            "response_time": sums.get("response_time", 0) / answered if answered else None,
        }

    return app


async def consume(store: redis.Redis) -> None:
    """Count each event into its user's hash, and how many there have been into `processed`."""
    decode = TypeAdapter(Event).validate_json
    while True:
        found: Any = await store.xreadgroup(GROUP, "consumer", {STREAM: ">"}, count=500, block=100)
        if not found:
            continue
        entries = found[0][1]
        pipe = store.pipeline(transaction=False)
        for _, fields in entries:
            event = decode(fields["event"])
            key = f"features:{event.user_id}"
            pipe.hincrby(key, "events", 1)
            if event.event_type == "ride_request_response":
                pipe.hincrby(key, str(event.data.get("response")), 1)
                pipe.hincrbyfloat(key, "response_time", float(event.data.get("response_time", 0)))
        pipe.xack(STREAM, GROUP, *(entry for entry, _ in entries))
        pipe.incrby("processed", len(entries))
        await pipe.execute()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["serve", "consume"])
    parser.add_argument("--socket", required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--once", action="store_true")
    given = parser.parse_args()
    store = redis.Redis(unix_socket_path=given.socket, decode_responses=True, protocol=2)
    if given.part == "consume":
        await store.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        await consume(store)
    else:
        config = uvicorn.Config(create_app(store, given.once), port=given.port, log_level="warning", access_log=False)
        await uvicorn.Server(config).serve()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
