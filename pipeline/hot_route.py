"""The hot route: POST /api/ml/events/ingest is dispatched ahead of Flask, whose own dispatch costs more than the
route's work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pipeline.routes import ingest_response

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

PATH = "/api/ml/events/ingest"
_STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class HotRoute:
    """A WSGI wrapper. The same route is registered in Flask too, and both answer alike."""

    def __init__(self, app: Callable[..., Iterable[bytes]], nexus: Runtime) -> None:
        self._app, self._nexus = app, nexus

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == PATH and environ["REQUEST_METHOD"] == "POST":
            status, headers, body = ingest_response(self._nexus, environ)
            start_response(_STATUS[status], [*headers, ("Content-Length", str(len(body)))])
            return [body]
        return self._app(environ, start_response)
