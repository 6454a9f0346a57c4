"""The hot routes: what is asked thousands of times a second is dispatched ahead of Flask, whose own dispatch costs as
much as the route's work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pipeline.routes import features_response, ingest_response

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

INGEST = "/api/ml/events/ingest"
FEATURES = "/api/ml/features/"
_STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class HotRoute:
    """A WSGI wrapper. The same routes are registered in Flask too, and both answer alike."""

    def __init__(self, app: Callable[..., Iterable[bytes]], nexus: Runtime) -> None:
        self._app, self._nexus = app, nexus

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if method == "POST" and path == INGEST:
            status, headers, body = ingest_response(self._nexus, environ)
        elif method == "GET" and (user_id := _user_of(path)):
            with self._nexus.precedence if _of_now(environ) else nullcontext():
                status, headers, body = features_response(self._nexus, environ, user_id)
        else:
            return self._app(environ, start_response)
        start_response(_STATUS[status], [*headers, ("Content-Length", str(len(body)))])
        return [body]


def is_read(environ: dict[str, Any]) -> bool:
    """Whether a request asks for one entity's features of now, which takes well under a millisecond; those of the past take as
    long as their events are many."""
    now = environ["REQUEST_METHOD"] == "GET" and _of_now(environ)
    return now and _user_of(environ["PATH_INFO"]) is not None


def _of_now(environ: dict[str, Any]) -> bool:
    return "as_of" not in environ.get("QUERY_STRING", "")


def _user_of(path: str) -> str | None:
    """The user whose features a path asks for, None where it is another path. WSGI gives its bytes as latin-1."""
    name = path[len(FEATURES) :] if path.startswith(FEATURES) else ""
    if not name or "/" in name:
        return None
    return name if name.isascii() else name.encode("latin-1").decode(errors="replace")
