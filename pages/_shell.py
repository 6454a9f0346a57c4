"""The frame round every page: header, navigation, age of the data, theme switch, and the one-second tick."""

from __future__ import annotations

from typing import Any

import dash
import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, dcc, html

from pages import _controls
from pages._components import aria, data, glyph

TICK_MS = 1000

THEME: dict[str, Any] = {
    "fontFamily": "Geist, ui-sans-serif, system-ui, sans-serif",
    "headings": {"fontFamily": "Geist, ui-sans-serif, system-ui, sans-serif"},
    "primaryColor": "indigo",
    "primaryShade": {"light": 7, "dark": 5},
    "defaultRadius": "md",
    "autoContrast": True,
    "focusRing": "auto",
}


def layout(**_: object) -> dmc.MantineProvider:
    """The skeleton, without a figure in it: the browser fills it from the feed."""
    return dmc.MantineProvider(
        [
            html.A("Skip to the content", href="#content", className="skip-link"),
            _header(),
            html.Main(dash.page_container, id="content", tabIndex="-1"),
            dcc.Interval(id="tick", interval=TICK_MS),
            dmc.NotificationContainer(id="notifications", position="bottom-right", limit=4, autoClose=7000),
        ],
        id="mantine",
        theme=THEME,
        defaultColorScheme="auto",
    )


def register(dashboard: Dash) -> None:
    """The callbacks of the shell and of the controls, all of them in the browser."""
    dashboard.clientside_callback(ClientsideFunction("nexus", "tick"), Input("tick", "n_intervals"))
    _controls.register(dashboard)


def _header() -> html.Header:
    return html.Header(
        [
            dcc.Link(
                [
                    html.Span(
                        [html.Span(className="ring ring-nexus"), html.Span(className="ring ring-python")],
                        className="rings rings-logo",
                        **aria(hidden="true"),
                    ),
                    html.Span("Nexus", className="brand-name"),
                ],
                href=dash.get_relative_path("/"),
                className="brand",
            ),
            html.Nav(_links(), className="nav", **aria(label="Pages")),
            html.Span(className="header-space"),
            html.Span(
                [glyph("simulated"), "simulated traffic"],
                className="badge badge-simulated",
                hidden=True,
                title="Part of the last minute's events came from the simulator",
                **data(show="simulated"),
            ),
            html.Span(
                [
                    glyph(),
                    html.Span(
                        [html.Span(id="data-at"), html.Span("no data yet", id="data-ago")], className="age-words"
                    ),
                ],
                id="data-age",
                className="badge badge-age",
                **data(level="unknown"),
            ),
            dmc.ColorSchemeToggle(
                id="theme",
                variant="subtle",
                color="gray",
                size="lg",
                lightIcon=glyph("sun"),
                darkIcon=glyph("moon"),
                **aria(label="Switch between light and dark"),
            ),
        ],
        className="header",
    )


def _links() -> list[dcc.Link]:
    shown = [page for page in dash.page_registry.values() if page.get("order") is not None]
    pages = sorted(shown, key=lambda page: page["order"])
    return [dcc.Link(page["name"], href=page["relative_path"], className="nav-link") for page in pages]
