"""The dashboard at /nexus: builds the Dash application on the Flask server; the pages and assets do the rest."""

from __future__ import annotations

from pathlib import Path

from dash import Dash
from flask import Flask

from pages import _shell

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "/nexus/"

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
    return dashboard
