"""The hot routes: what is asked thousands of times a second is dispatched ahead of Flask, whose own dispatch costs as
much as the route's work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pipeline.concurrency.joint import Joint
from pipeline.routes import Bare, features_response, features_responses, ingest_response, query_of

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

INGEST = "/api/ml/events/ingest"
FEATURES = "/api/ml/features/"
MOST_READS = 4  # that are answered together: more let those who come meanwhile wait longer
_LONG = {"/api/ml/events", "/api/ml/aggregates", "/api/ml/dead-letters/redrive"}
PATIENCE_S = 0.5  # so long a read waits for those before it
_STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class HotRoute:
    """A WSGI wrapper. The same routes are registered in Flask too, and both answer alike."""

    def __init__(self, app: Callable[..., Iterable[bytes]], nexus: Runtime) -> None:
        self._app, self._nexus = app, nexus

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if method == "POST" and path == INGEST:
            return _answer(start_response, ingest_response(self._nexus, environ))
        if method == "GET" and (user_id := _user_of(path)):
            with nullcontext() if _of_the_past(environ) else self._nexus.precedence:
                bare = features_response(self._nexus, environ, user_id)
            return _answer(start_response, bare)
        return self._app(environ, start_response)


class SharedReads:
    """A WSGI wrapper for reads of users' features of now: those that come while others are at work are answered together, in
    one trip to the store. Each on its own would take the interpreter from the others several times.

    They take no turns, which others may hold for long. Where they stand still nevertheless, since the store does, the next
    ones go the way of all others.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], nexus: Runtime) -> None:
        self._app, self._nexus = app, nexus
        self.reads = Joint[tuple[str, dict[str, Any]], Bare](self._work, MOST_READS)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "GET" and (user_id := _user_of(environ["PATH_INFO"])) and _of_now(environ):
            with suppress(TimeoutError):
                return _answer(start_response, self.reads.ask((user_id, environ), PATIENCE_S))
        return self._app(environ, start_response)

    def _work(self, asked: list[tuple[str, dict[str, Any]]]) -> list[Bare]:
        with self._nexus.precedence:
            return features_responses(self._nexus, asked)


def takes_long(environ: dict[str, Any]) -> bool:
    """Whether a request may take as long as there are events: it has to read, or to write, any number of them."""
    path: str = environ["PATH_INFO"]
    return path in _LONG or (path.startswith(FEATURES) and _of_the_past(environ))


def _answer(start_response: Callable[..., Any], bare: Bare) -> Iterable[bytes]:
    status, headers, body = bare
    start_response(_STATUS[status], [*headers, ("Content-Length", str(len(body)))])
    return [body]


def _of_now(environ: dict[str, Any]) -> bool:
    """Whether a request asks for a user's features of now, which takes well under a millisecond."""
    return "entity" not in _names(environ) and not _of_the_past(environ)


def _of_the_past(environ: dict[str, Any]) -> bool:
    """Such a read takes as long as the events are many."""
    names = _names(environ)
    return "as_of" in names or "known_at" in names


def _names(environ: dict[str, Any]) -> str | Mapping[str, str]:
    """In what a parameter's name is looked for: the query's text, at no cost, unless something in it is escaped."""
    text: str = environ.get("QUERY_STRING", "")
    return query_of(environ) if "%" in text else text


def _user_of(path: str) -> str | None:
    """The user whose features a path asks for, None where it is another path. WSGI gives its bytes as latin-1."""
    name = path[len(FEATURES) :] if path.startswith(FEATURES) else ""
    if not name or "/" in name:
        return None
    return name if name.isascii() else name.encode("latin-1").decode(errors="replace")
