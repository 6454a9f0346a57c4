"""Posts synthetic ride-hailing traffic of Metro Manila to a running Nexus: `python -m pipeline.tools.demo`.

`City` simulates riders, drivers and rides, in simulated time and without a network; the rest posts what it makes, as
source "simulator". Besides whole rides there is a little of what a real feed brings: payment fraud with late labels,
broken events, duplicates, and events that arrive late.
"""

import argparse
import heapq
import math
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from random import Random
from typing import Any, NoReturn

import msgspec

from pipeline.errors import SettingError
from pipeline.settings import load
from pipeline.tools.post import SLICE, Outbox, Poster, Refused, Unanswered

Event = dict[str, Any]
Place = tuple[float, float]  # lat, lng
Process = Iterator[float | Event]  # what somebody does: yields seconds to let pass, and events

MANILA = timezone(timedelta(hours=8))  # without daylight saving time
SPOTS: dict[str, tuple[Place, float]] = {  # place, share of leisure trips
    "makati": ((14.5547, 121.0244), 0.24),
    "bgc": ((14.5508, 121.0529), 0.20),
    "quezon_city": ((14.6510, 121.0486), 0.18),
    "ortigas": ((14.5866, 121.0614), 0.14),
    "naia": ((14.5123, 121.0165), 0.14),
    "manila": ((14.5995, 120.9842), 0.10),
}
SHIFTS = (5, 6, 7, 7, 8, 10, 12, 14, 15, 16, 18, 22)  # local hours at which they begin
APPS: list[dict[str, Any]] = [{"device": "android", "version": each} for each in ("5.1.0", "5.2.0", "5.2.1")]
APPS.append({"device": "ios", "version": "5.2.0"})
# Rides by local hour, from midnight, relative to the mean of the day.
WEEKDAY = (0.35, 0.25, 0.18, 0.15, 0.2, 0.5, 1.1, 1.8, 1.9, 1.3, 0.95, 0.95,
           1.05, 1.0, 0.95, 1.0, 1.3, 1.9, 2.1, 1.8, 1.35, 0.95, 0.6, 0.37)  # fmt: skip
WEEKEND = (0.8, 0.6, 0.4, 0.3, 0.2, 0.3, 0.5, 0.7, 0.9, 1.1, 1.2, 1.3,
           1.3, 1.3, 1.3, 1.3, 1.3, 1.4, 1.5, 1.5, 1.4, 1.3, 1.1, 1.0)  # fmt: skip
TOUCHES = (("home", "where_to"), ("home", "map"), ("estimate", "economy"), ("estimate", "premium"), ("promo", "banner"))
FRAUD_FACTOR = {None: 1.0, "stolen account": 4.5, "collusion": 9.0}  # on the fare
EVENTS_PER_RIDE = 6.05  # measured; all of a ride's events, labels and faults counted
RIDE_SECONDS = 1_500.0  # a driver's mean time for one, on real streets
BUSY_SHARE = 0.07  # of all drivers, on average over the day

BAD, DUPLICATE, LATE = 0.002, 0.003, 0.005  # shares of the events
FRAUD_BEGINS = 0.0021  # per honest payment; a case is 3 to 6 rides, so about 0.5 % of payments are fraud
CATCH_UP = 3_600.0  # s; what the city did earlier, while Nexus was away, is let go
BATCH = 500


@dataclass(kw_only=True)
class Person:
    id: str
    device: str
    version: str  # of the app
    busy: bool = False


@dataclass(kw_only=True)
class Rider(Person):
    home: Place
    work: Place
    leaves_home: float  # local hour
    generosity: float  # factor on the fare


@dataclass(kw_only=True)
class Driver(Person):
    place: Place
    acceptance: float  # probability
    answers_in: float  # s, mean
    shift_begins: float  # local hour


class City:
    """Riders, drivers and their rides. The same seed, start and size give the same events.

    seed:   people and their habits depend on it alone, what they do on the start too
    start:  epoch seconds at which the simulation begins
    rate:   events per second, the mean over a day
    """

    def __init__(
        self, seed: int = 1, start: float = 0.0, rate: float = 20.0, riders: int = 2_000, drivers: int = 400
    ) -> None:
        people = Random(seed)
        self._random = Random(f"{seed} {start}")
        self.now = start
        self.planned: Counter[str] = Counter()  # bad, duplicate, late, fraud: what a receiver should find
        self._riders = [_rider(people, number) for number in range(1, riders + 1)]
        self._drivers = [_driver(people, number) for number in range(1, drivers + 1)]
        self._rides_per_s = rate / EVENTS_PER_RIDE
        # A fleet too small for the rate drives faster than life: else most requests would find nobody.
        self._haste = min(1.0, BUSY_SHARE * drivers / (self._rides_per_s * RIDE_SECONDS))
        self._agenda: list[tuple[float, int, Process]] = []
        self._turn = 0  # of two at the same instant, the one that came first goes first
        self._begin(self._arrivals())

    def events(self, now: float) -> Iterator[Event]:
        """What happens up to `now`, epoch seconds, in the order it is sent. Lazy: ask again with a later time."""
        while self._agenda and self._agenda[0][0] <= now:
            self.now, _, process = heapq.heappop(self._agenda)
            for step in process:
                if isinstance(step, dict):
                    yield from self._send(step)
                else:
                    self._begin(process, step)
                    break
        self.now = max(self.now, now)

    def _begin(self, process: Process, after: float = 0.0) -> None:
        self._turn += 1
        heapq.heappush(self._agenda, (self.now + after, self._turn, process))

    def _send(self, event: Event) -> Iterator[Event]:
        """An event on its way: mostly it just arrives."""
        chance = self._random.random()
        if chance < LATE:
            self.planned["late"] += 1
            self._begin(iter([event]), self._random.uniform(30, 1_800))  # no signal; may meet its own fault again
            return
        yield event
        if chance < LATE + DUPLICATE:
            self.planned["duplicate"] += 1
            yield event
        elif chance < LATE + DUPLICATE + BAD:
            self.planned["bad"] += 1
            yield self._broken(event)

    def _broken(self, event: Event) -> Event:
        without_user = {key: event[key] for key in event if key != "user_id"}
        swapped = event | {"location": {"lat": 120.9842, "lng": 14.5995}}
        seconds = event | {"timestamp": int(self.now)}
        return self._random.choice([without_user, swapped, seconds]) | {"event_id": self._id()}

    def _arrivals(self) -> Process:
        while True:
            yield self._random.expovariate(self._rides_per_s * demand(self.now))
            if rider := self._next_rider():
                self._begin(self._ride(rider))

    def _next_rider(self) -> Rider | None:
        """Somebody who is free, rather one whose hour it is."""
        hour, free = local_hour(self.now), None
        for rider in self._random.choices(self._riders, k=6):
            if not rider.busy:
                free = rider
                if min(abs(hour - rider.leaves_home), abs(hour - rider.leaves_home - 10)) < 1.0:
                    break
        return free

    def _trip(self, rider: Rider) -> tuple[Place, Place]:
        hours = math.inf if is_weekend(self.now) else local_hour(self.now) - rider.leaves_home
        if abs(hours) < 1.5:
            return rider.home, rider.work
        if abs(hours - 10) < 2:
            return rider.work, rider.home
        places, shares = zip(*SPOTS.values(), strict=True)
        spot = near(self._random, self._random.choices(places, shares)[0], 1.0)
        return (rider.home, spot) if self._random.random() < 0.5 else (spot, rider.home)

    def _ride(self, rider: Rider, scheme: str | None = None, partner: Driver | None = None) -> Process:
        """One ride from the first touch to the payment; `scheme` is the fraud it serves, with `partner` its driver."""
        random, haste = self._random, self._haste
        session, request = f"session_{self._hex()}", f"req_{self._hex()}"
        phone = replace(rider, device="android", version="4.0.1") if scheme == "stolen account" else rider
        pickup, dropoff = self._trip(rider)
        if scheme == "collusion":
            dropoff = near(random, pickup, 0.5)
        km = max(0.6, distance_km(pickup, dropoff) * 1.35)

        def by_rider(kind: str, data: Event, place: Place | None = None) -> Event:
            return self._event(kind, phone, session, data, place or pickup)

        rider.busy = True
        try:
            for screen, element in random.sample(TOUCHES, random.randint(1, 3)):
                yield by_rider("ui_interaction", {"screen": screen, "element": element})
                yield random.uniform(1, 8)
            where = {"lat": pickup[0], "lng": pickup[1]}
            yield by_rider("ride_request", {"request_id": request, "pickup": where, "distance_km": round(km, 2)})
            driver = None
            for candidate in [partner] if partner else self._candidates(pickup):
                if candidate.busy:
                    continue
                candidate.busy = True
                took = 0.4 if partner else min(15.0, random.gammavariate(3, candidate.answers_in / 3))
                yield took
                accepted = partner is not None or random.random() < candidate.acceptance
                yield self._response(candidate, request, accepted, took)
                if accepted:
                    driver = candidate
                    break
                candidate.busy = False
            if driver is None:
                yield by_rider("ride_cancelled", {"request_id": request, "cancelled_by": "system"})
                return
            try:
                yield haste * (120 + 120 * distance_km(driver.place, pickup))
                if scheme is None and random.random() < 0.05:
                    by = random.choice(["rider", "rider", "driver"])
                    yield by_rider("ride_cancelled", {"request_id": request, "cancelled_by": by})
                    return
                yield haste * (180 + 150 * km * math.sqrt(demand(self.now)))
                driver.place = dropoff
            finally:
                driver.busy = False
            fare = round((45 + 17 * km) * rider.generosity * random.uniform(0.9, 1.15) * FRAUD_FACTOR[scheme], 2)
            done = {"request_id": request, "fare": fare, "distance_km": round(km, 2), "driver_id": driver.id}
            yield by_rider("ride_completed", done, dropoff)
        finally:
            rider.busy = False
        if scheme or random.random() < 0.9:  # the others pay cash
            yield random.uniform(1, 5)
            transaction = f"tx_{self._hex()}"
            paid = {"transaction_id": transaction, "amount": fare, "merchant_id": driver.id, "request_id": request}
            self._after_payment(rider, driver, session, transaction, scheme)
            yield by_rider("payment", paid, dropoff)

    def _after_payment(self, rider: Rider, driver: Driver, session: str, transaction: str, scheme: str | None) -> None:
        """The label, where one comes; and now and then the beginning of a case of fraud."""
        random = self._random
        self.planned["payment"] += 1
        self.planned["fraud"] += scheme is not None

        def report() -> Process:
            label = {"transaction_id": transaction, "is_fraud": int(scheme is not None)}
            yield self._event("fraud_report", rider, session, label, None)

        if random.random() < (0.95 if scheme else 0.02):
            self._begin(report(), min(43_200.0, max(300.0, random.lognormvariate(math.log(2_400), 0.9))))
        if scheme is None and random.random() < FRAUD_BEGINS:
            case = ("stolen account", None) if random.random() < 0.7 else ("collusion", driver)
            self._begin(self._fraud(rider, *case))

    def _fraud(self, rider: Rider, scheme: str, partner: Driver | None) -> Process:
        for _ in range(self._random.randint(3, 6)):
            yield self._random.uniform(60, 900)
            if not rider.busy:
                self._begin(self._ride(rider, scheme, partner))

    def _candidates(self, pickup: Place) -> list[Driver]:
        """The nearest few of the drivers who are free and on their shift."""
        hour = local_hour(self.now)
        some = self._random.choices(self._drivers, k=48)
        free = {d.id: d for d in some if not d.busy and (hour - d.shift_begins) % 24 < 10}.values()
        return sorted(free, key=lambda driver: distance_km(driver.place, pickup))[:4]

    def _response(self, driver: Driver, request: str, accepted: bool, took: float) -> Event:
        response = "accepted" if accepted else "rejected"
        data = {"request_id": request, "response": response, "response_time": round(took, 2)}
        shift = int((self.now / 3_600 + 8 - driver.shift_begins) // 24)
        return self._event("ride_request_response", driver, f"session_{driver.id}_{shift}", data, driver.place)

    def _event(self, kind: str, person: Person, session: str, data: Event, place: Place | None) -> Event:
        """An event as this person's app sends it: the Android app flat, the iOS app nested."""
        event: Event = {"event_id": self._id(), "event_type": kind, "user_id": person.id, "session_id": session}
        event |= {"app_version": person.version, "device_type": person.device}
        if place is not None:
            event["location"] = {"lat": place[0], "lng": place[1]}
        at = int(self.now * 1000)
        if person.device == "android":
            own = {"driver_id": person.id} if kind == "ride_request_response" else {}
            return event | own | data | {"timestamp": at}
        written = datetime.fromtimestamp(at / 1000, MANILA).isoformat(timespec="milliseconds")
        return event | {"timestamp": written, "data": data}

    def _hex(self) -> str:
        return f"{self._random.getrandbits(48):012x}"

    def _id(self) -> str:
        """A UUIDv7 of simulated time."""
        at, chance = int(self.now * 1000), self._random.getrandbits(74)
        return str(uuid.UUID(int=at << 80 | 7 << 76 | (chance >> 62) << 64 | 2 << 62 | chance & (1 << 62) - 1))


def duration_s(text: str) -> float:
    return float(text[:-1]) * {"m": 60, "h": 3_600, "d": 86_400}.get(text[-1:], math.nan)


def local_hour(at: float) -> float:
    return (at / 3_600 + 8) % 24


def is_weekend(at: float) -> bool:
    return (at / 3_600 + 8) // 24 % 7 in (2, 3)  # the epoch was a Thursday


def demand(at: float) -> float:
    """Rides at this moment relative to the mean of the day."""
    hour, by_hour = local_hour(at), WEEKEND if is_weekend(at) else WEEKDAY
    here, share = int(hour), hour % 1
    return by_hour[here] * (1 - share) + by_hour[(here + 1) % 24] * share


def distance_km(a: Place, b: Place) -> float:
    return math.hypot(a[0] - b[0], (a[1] - b[1]) * 0.968) * 111.2  # flat enough within a city


def near(random: Random, place: Place, km: float) -> Place:
    spread = km / 111.2
    return round(random.gauss(place[0], spread), 5), round(random.gauss(place[1], spread), 5)


def _rider(random: Random, number: int) -> Rider:
    home = near(random, SPOTS[random.choice(tuple(SPOTS))][0], 5.0)
    work = near(random, SPOTS[random.choice(tuple(SPOTS))][0], 1.0)
    habits: dict[str, Any] = {"leaves_home": random.gauss(7.8, 1.0), "generosity": random.lognormvariate(0, 0.15)}
    return Rider(id=f"rider_{number:05}", home=home, work=work, **habits, **random.choice(APPS))


def _driver(random: Random, number: int) -> Driver:
    place = near(random, SPOTS[random.choice(tuple(SPOTS))][0], 4.0)
    habits: dict[str, Any] = {"acceptance": random.betavariate(8, 2), "answers_in": random.uniform(2, 8)}
    shift_begins = random.choice(SHIFTS) + random.random()
    return Driver(id=f"driver_{number:04}", place=place, shift_begins=shift_begins, **habits, **random.choice(APPS))


def run(
    city: City,
    poster: Poster,
    say: Callable[[str], None],
    speedup: float | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> NoReturn:
    """Post what happens in the city, until interrupted: first what lies before now, then as it happens.

    Posting holds the simulation up, so that while Nexus is away no more than a batch or two is held in memory; the
    time since then is simulated when Nexus is back. Raises Refused, Unanswered.
    """
    began, start, live = clock(), city.now, False
    outbox = Outbox[str](poster, BATCH)
    try:
        while True:
            now = clock()
            until = now if speedup is None else min(now, start + (now - began) * speedup)
            if live and until - city.now > CATCH_UP:
                skipped = sum(1 for _ in city.events(until - CATCH_UP))
                say(f"Nexus was away for long: {skipped:,} events of before the last hour are let go")
            for event in city.events(until):
                outbox.add(msgspec.json.encode(event), event["event_type"])
            outbox.flush()
            live = live or until == now
            sleep(SLICE)
    finally:
        outbox.abandon()
        taken = f"accepted {outbox.accepted:,} + duplicates {outbox.duplicates:,} + rejected {outbox.rejected:,}"
        say(f"{taken} (planned: {city.planned['duplicate']:,} duplicates, {city.planned['bad']:,} bad)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pipeline.tools.demo", description=__doc__)
    add = parser.add_argument
    add("--url", help="where Nexus listens; default as the settings say")
    add("--rate", type=float, default=20.0, help="events per second, the mean over a day")
    add("--riders", type=int, default=2_000)
    add("--drivers", type=int, default=400)
    add("--seed", type=int, default=1, help="the same seed gives the same people")
    add("--history", type=duration_s, default=0.0, metavar="T", help="begin so long ago, such as 24h, 90m, 7d")
    add("--speedup", type=float, metavar="X", help="history at X times the pace of life; by default at once")
    args = parser.parse_args(argv)
    if args.rate <= 0 or args.riders < 1 or args.drivers < 1 or not args.history >= 0 or (args.speedup or 2) <= 1:
        parser.error("--rate, --riders and --drivers are positive, --history is not negative, --speedup is above 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C

    def say(text: str) -> None:
        print(f"demo: {text}", file=sys.stderr, flush=True)

    city = City(args.seed, time.time() - args.history, args.rate, args.riders, args.drivers)
    try:
        url = args.url or load().nexus_url
        say(f"{args.riders:,} riders and {args.drivers:,} drivers of Manila, {args.rate:g} events/s, to {url}")
        # One request at a time keeps the order of a ride's events.
        with Poster(url, "simulator", timeout=5.0, in_flight=1, on_change=say) as poster:
            run(city, poster, say, args.speedup)
    except KeyboardInterrupt:
        return 0
    except (Refused, Unanswered, SettingError) as error:
        say(str(error))
        return 2 if isinstance(error, SettingError) else 1


if __name__ == "__main__":
    sys.exit(main())
