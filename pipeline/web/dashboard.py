"""The dashboard at /nexus: builds the Dash application on the Flask server; the pages and assets do the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import dash
from dash import Dash
from dash.exceptions import PreventUpdate
from flask import Flask, request
from werkzeug.exceptions import BadRequest, HTTPException, NotFound

from pages import _shell

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "/nexus/"
# Where Dash takes for granted what its own page asks for. Of Nexus only the pages' layouts are called there.
_TRUSTING = (f"{PREFIX}_dash-update-component", f"{PREFIX}_dash-component-suites")
log = logging.getLogger(__name__)

# The inline script sets the colour scheme before the first paint, so that a dark room sees no white flash.
INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<meta name="color-scheme" content="light dark">
<title>{%title%}</title>
<link rel="icon" id="favicon" type="image/svg+xml" href="__PREFIX__assets/icons/favicon-idle.svg">
<link rel="preload" as="font" type="font/woff2" crossorigin href="__PREFIX__assets/fonts/geist.woff2">
<script>(function () {
  var kept = null;
  try { kept = localStorage.getItem("mantine-color-scheme-value"); } catch (blocked) { kept = null; }
  var dark = kept === "dark" || (kept !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.setAttribute("data-mantine-color-scheme", dark ? "dark" : "light");
})();</script>
{%css%}
</head>
<body>
<noscript>This dashboard is drawn by JavaScript, which is switched off.
The same facts are at /api/ml/events/ingest?check=health.</noscript>
<div id="watchdog" role="alert" hidden>The dashboard could not be loaded; perhaps something between here and Nexus keeps its
scripts back. Reload the page. The same facts are at <a href="/api/ml/events/ingest?check=health">the health check</a>.</div>
<script>setTimeout(function () {
  if (!(window.nexus && window.nexus.painted)) document.getElementById("watchdog").hidden = false;
}, 15000);</script>
{%app_entry%}
<footer>{%config%}{%scripts%}{%renderer%}</footer>
</body>
</html>
""".replace("__PREFIX__", PREFIX)


def create_dashboard(flask_app: Flask) -> Dash:
    """Mount the dashboard under /nexus/ and return it. Everything it needs is served from here: no network, no CDN.

    After the first load the browser asks for `GET /nexus/feed.json` alone, once a second; no Dash callback
    runs on the server while the page is idle.
    """
    dashboard = Dash(
        __name__,
        server=flask_app,  # type: ignore[arg-type]  # Dash takes any server; its stub says bool or factory
        use_pages=True,
        pages_folder=str(ROOT / "pages"),
        assets_folder=str(ROOT / "assets"),
        url_base_pathname=PREFIX,
        title="Nexus",
        update_title="",
        index_string=INDEX,
        serve_locally=True,
        suppress_callback_exceptions=True,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )
    dashboard.layout = _shell.layout
    _shell.register(dashboard)
    for endpoint, view in flask_app.view_functions.items():
        if endpoint.startswith(_TRUSTING):
            flask_app.view_functions[endpoint] = _refusing(view)
    endpoint = f"{PREFIX}<path:path>"  # Dash's own, for any address: the browser is to find the page
    flask_app.view_functions[endpoint] = _telling(flask_app.view_functions[endpoint])
    return dashboard


def _telling(view: Callable[..., Any]) -> Callable[..., Any]:
    """The view, whose status says whether there is a page at the address."""

    @wraps(view)
    def telling(path: str) -> Any:
        pages = [page["path"].strip("/") for page in dash.page_registry.values() if page.get("order") is not None]
        return view(path), 200 if path.strip("/") in pages else 404

    return telling


def _refusing(view: Callable[..., Any]) -> Callable[..., Any]:
    """The view, for which what its own page would not send is an error of the one who asks."""

    @wraps(view)
    def refusing(*args: Any, **named: Any) -> Any:
        try:
            return view(*args, **named)
        except (HTTPException, PreventUpdate):
            raise
        except Exception as error:
            log.info("request not understood", extra={"path": request.path, "error": repr(error)[:200]})
            raise (BadRequest() if request.method == "POST" else NotFound()) from error

    return refusing
