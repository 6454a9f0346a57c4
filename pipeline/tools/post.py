"""Posts events to a running Nexus over HTTP, asking again until it has answered, and keeps the account."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx
import msgspec

MAX_EVENTS = 5_000
MAX_BODY = 5 * 1024 * 1024  # bytes
FIRST_PAUSE = 0.2  # s, the ceiling of the first pause; it doubles with each try
LONGEST_PAUSE = 5.0  # s
ASK_AGAIN = {408, 425, 429}  # and every 5xx
SLICE = 0.2  # s of wall time; at a chosen speed, events due within one are sent together
SPLIT = {400, 413}  # the body was refused as a whole: halving finds the event that is to blame

About = TypeVar("About")


class Rejection(msgspec.Struct, frozen=True):
    """One event Nexus would not take; `index` is its position in the posted batch."""

    index: int
    event_id: str | None = None
    field: str | None = None
    code: str = ""
    message: str = ""


class Receipt(msgspec.Struct):
    """What became of a batch: accepted + duplicates + len(rejected) is its length.

    An event whose first answer was lost on the way counts as a duplicate: Nexus has it once.
    """

    accepted: int = 0
    duplicates: int = 0
    rejected: list[Rejection] = []

    @property
    def total(self) -> int:
        return self.accepted + self.duplicates + len(self.rejected)


class Unanswered(Exception):
    """Given up, at the deadline or by stop(). Whether Nexus has the events is not known; posting them again is safe."""


class Refused(Exception):
    """An answer that no further try can mend: a wrong address, or not a Nexus."""


class Poster:
    """Posts batches of encoded events, a few at a time, each until it is answered.

    Every event must carry its `event_id`: each try sends the same bytes, so that Nexus knows again what it has taken.

    url:            where Nexus listens, e.g. http://localhost:4000
    source:         the name the events are counted under
    timeout:        s, of one try
    in_flight:      requests under way at once
    give_up_after:  s from a batch's first try; None: never
    on_change:      told once when Nexus stops answering, and once when it answers again
    wait:           pauses for so many seconds, true if it is time to stop; by default ends early at stop()
    """

    def __init__(
        self,
        url: str,
        source: str,
        timeout: float = 10.0,
        *,
        in_flight: int = 4,
        give_up_after: float | None = None,
        on_change: Callable[[str], None] = lambda text: None,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._url = url.rstrip("/") + "/api/ml/events/ingest"
        self._head = b'{"source":' + msgspec.json.encode(source) + b',"events":['
        limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
        self._client = httpx.Client(
            timeout=timeout, limits=limits, trust_env=False, headers={"Content-Type": "application/json"}
        )
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="poster")
        self._slots = threading.BoundedSemaphore(in_flight)
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._give_up_after = give_up_after
        self._on_change = on_change
        self._state = threading.Lock()
        self._away = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def submit(self, events: Sequence[bytes], future: Future[Receipt]) -> None:
        """post() in a thread, which settles `future`; blocks while `in_flight` batches are under way.

        The caller brings the future, so that it holds it whatever interrupts this call.
        """
        self._slots.acquire()
        self._pool.submit(self._settle, events, future)

    def _settle(self, events: Sequence[bytes], future: Future[Receipt]) -> None:
        try:
            future.set_result(self.post(events))
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)
        finally:
            self._slots.release()

    def post(self, events: Sequence[bytes]) -> Receipt:
        """Post encoded events and return their receipt. Raises Unanswered or Refused."""
        if not events:
            return Receipt()
        body = self._head + b",".join(events) + b"]}"
        too_large = len(events) > MAX_EVENTS or len(body) > MAX_BODY
        if too_large and len(events) > 1:
            return self._post_halves(events)
        response, receipt = self._ask(body)
        if receipt is not None:
            if receipt.total != len(events):
                raise Refused(f"the answer accounts for {receipt.total} of {len(events)} events")
            return receipt
        if response.status_code == 422:
            return _all_rejected(response, len(events))
        if response.status_code in SPLIT:
            return self._post_halves(events) if len(events) > 1 else _all_rejected(response, 1)
        raise Refused(f"HTTP {response.status_code} from {self._url}: {response.text[:200]}")

    def stop(self) -> None:
        """Try nothing again from now on; the tries under way may still be answered."""
        self._stopped.set()

    def finish(self) -> None:
        """Stop, and wait until nothing is under way."""
        self.stop()
        self._pool.shutdown(wait=True)

    def close(self) -> None:
        self.finish()
        self._client.close()

    def _post_halves(self, events: Sequence[bytes]) -> Receipt:
        middle = len(events) // 2
        first, second = self.post(events[:middle]), self.post(events[middle:])
        moved = [msgspec.structs.replace(each, index=each.index + middle) for each in second.rejected]
        return Receipt(first.accepted + second.accepted, first.duplicates + second.duplicates, first.rejected + moved)

    def _ask(self, body: bytes) -> tuple[httpx.Response, Receipt | None]:
        """Try until there is an answer; the receipt is None where the answer is not a 2xx."""
        began = time.monotonic()
        for tries in count():
            at_least = 0.0
            try:
                response = self._client.post(self._url, content=body)
                if response.status_code not in ASK_AGAIN and response.status_code < 500:
                    receipt = msgspec.json.decode(response.content, type=Receipt) if response.is_success else None
                    self._change(away=False, text="Nexus answers again")
                    return response, receipt
                trouble = f"HTTP {response.status_code}"
                at_least = _retry_after(response)
            except httpx.RequestError as error:
                trouble = str(error) or type(error).__name__
            except msgspec.DecodeError as error:  # cut off on the way: what it said is unknown
                trouble = f"an answer that cannot be read ({error})"
            # Full jitter: clients that lost the same server do not come back in step.
            pause = at_least + random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10)))
            self._change(away=True, text=f"Nexus does not take events at {self._url} ({trouble}); trying until it does")
            spent = time.monotonic() - began
            if self._give_up_after is not None and spent + pause > self._give_up_after:
                raise Unanswered(f"{trouble}; given up after {tries + 1} tries in {spent:.0f} s")
            if self._stopped.is_set() or self._wait(pause):
                raise Unanswered(f"{trouble}; stopped")
        raise AssertionError("unreachable")

    def _change(self, *, away: bool, text: str) -> None:
        with self._state:
            changed, self._away = away != self._away, away
        if changed:
            self._on_change(text)


class Outbox(Generic[About]):
    """Gathers events into batches, posts them, and keeps the account; each event goes with what it is `about`.

    on_rejected:  told of each event that Nexus would not take
    on_answered:  told of each batch that is settled
    """

    def __init__(
        self,
        poster: Poster,
        size: int,
        on_rejected: Callable[[About, Rejection], None] = lambda about, verdict: None,
        on_answered: Callable[[list[About]], None] = lambda batch: None,
    ) -> None:
        self._poster, self._size = poster, size
        self._on_rejected, self._on_answered = on_rejected, on_answered
        self._batch: list[tuple[bytes, About]] = []
        self._sent: list[tuple[Future[Receipt], list[About]]] = []
        self.accepted = self.duplicates = self.rejected = 0

    @property
    def answered(self) -> int:
        return self.accepted + self.duplicates + self.rejected

    @property
    def waiting(self) -> list[About]:
        """What has no answer yet."""
        return [about for _, batch in self._sent for about in batch] + [about for _, about in self._batch]

    def add(self, event: bytes, about: About) -> None:
        self._batch.append((event, about))
        if len(self._batch) >= self._size:
            self.flush()

    def flush(self) -> None:
        """Post what has gathered. Blocks while enough is under way; raises what an earlier batch ended with."""
        if self._batch:
            future: Future[Receipt] = Future()
            batch, abouts = [event for event, _ in self._batch], [about for _, about in self._batch]
            self._sent.append((future, abouts))  # before they are posted: an interrupt must find them here
            self._batch = []
            self._poster.submit(batch, future)
        self.settle(0)

    def settle(self, timeout: float | None) -> None:
        """Enter the receipts that have come, waiting at most `timeout` s for all; None: until they have come."""
        done, _ = wait([future for future, _ in self._sent], timeout)
        self._enter([each for each in self._sent if each[0] in done])

    def abandon(self) -> None:
        """Try nothing again, and enter what is still answered."""
        self._poster.finish()
        self._enter([each for each in self._sent if each[0].done() and each[0].exception() is None])

    def _enter(self, settled: list[tuple[Future[Receipt], list[About]]]) -> None:
        for sent in settled:
            future, batch = sent
            receipt = future.result()
            self._sent.remove(sent)
            self.accepted += receipt.accepted
            self.duplicates += receipt.duplicates
            self.rejected += len(receipt.rejected)
            for verdict in receipt.rejected:
                self._on_rejected(batch[verdict.index], verdict)
            self._on_answered(batch)


class Pace:
    """Recorded or simulated time, `speed` times faster, cut into slices: what is due within one is sent together."""

    def __init__(self, speed: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._speed, self._clock, self._slice = speed, clock, 0
        self._origin: tuple[int, float] | None = None  # the first event's time, ms, and the wall's then, s

    def moves_on(self, at: int) -> bool:
        """Whether an event of this time, ms, opens a later slice; one out of order belongs to the slice under way."""
        if self._origin is None:
            self._origin = at, self._clock()
        before = self._slice
        self._slice = max(before, int((at - self._origin[0]) / 1000 / self._speed / SLICE))
        return self._slice > before

    def due_in(self) -> float:
        """s until the slice under way begins."""
        return (self._origin[1] if self._origin else 0.0) + self._slice * SLICE - self._clock()


def _retry_after(response: httpx.Response) -> float:
    """The Retry-After header, seconds or a date, in s from now; 0 without one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (at.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def _all_rejected(response: httpx.Response, size: int) -> Receipt:
    """The receipt of a batch of which nothing was taken: the verdicts in the answer, else its error for every event."""
    try:
        answer: Any = msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    error = answer.get("error")
    error = error if isinstance(error, dict) else {}
    details = error.get("details")
    listed = answer.get("rejected") or (details.get("rejected") if isinstance(details, dict) else details)
    code = str(error.get("code") or f"http_{response.status_code}")
    message = str(error.get("message") or response.text[:200])
    verdicts = {index: Rejection(index, None, None, code, message) for index in range(size)}
    for each in listed if isinstance(listed, list) else []:
        try:
            verdict = msgspec.convert(each, Rejection)
        except msgspec.ValidationError:
            continue  # not a verdict: the error's own words stand for this event
        if verdict.index in verdicts:
            verdicts[verdict.index] = verdict
    return Receipt(rejected=list(verdicts.values()))
