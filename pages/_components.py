"""What the pages share: small building blocks whose figures the browser fills in from the feed.

An element says what it shows with attributes, and `assets/paint.js` keeps it true:
`data-bind` a path in the feed, `data-format` how to write it, `data-level-of` the path of a state that colours it.
"""

from __future__ import annotations

from typing import Any

from dash import dcc, html
from dash.development.base_component import Component

UNKNOWN = "–"


def data(**attributes: str) -> dict[str, Any]:
    """HTML's data attributes: `data(level_of="x")` is `data-level-of="x"`."""
    return {f"data-{name.replace('_', '-')}": value for name, value in attributes.items()}


def aria(**attributes: str) -> dict[str, Any]:
    """HTML's aria attributes, likewise."""
    return {f"aria-{name.replace('_', '-')}": value for name, value in attributes.items()}


def bind(path: str, form: str = "text", className: str = "", whole: bool = False) -> html.Span:
    """A figure of the feed at `path`, written in the form `form` (see assets/format.js); a dash while unknown. `whole`: it may
    be cut where it stands, and shows all of itself to the pointer."""
    more = data(whole="true") if whole else {}
    return html.Span(UNKNOWN, className=f"figure {className}".strip(), **data(bind=path, format=form), **more)


def glyph(name: str = "") -> html.Span:
    """An icon: a named one, or (without a name) the one of the level of the element around it."""
    return html.Span(className=f"glyph glyph-{name}" if name else "glyph", **aria(hidden="true"))


def state(path: str, className: str = "", form: str = "state") -> html.Span:
    """The state at `path` as icon, word and colour."""
    return html.Span([glyph(), bind(path, form)], className=f"state {className}".strip(), **data(level_of=path))


def tile(
    title: str, *children: Component, id: str, note: Component | None = None, className: str = "", **more: Any
) -> html.Section:
    """A titled panel; `note` stands at the right of the title."""
    heading = html.Div([html.H2(title, id=f"{id}-title"), note], className="tile-head")
    return html.Section(
        [heading, *children], id=id, className=f"tile {className}".strip(), **aria(labelledby=f"{id}-title"), **more
    )


def pair(label: str, figure: Component) -> html.Div:
    """A label and its figure on one line."""
    return html.Div([html.Dt(label), html.Dd(figure)], className="pair")


def measure(label: str, figure: Component, series: str = "") -> html.Div:
    """A large figure over its label; `series` names the colour of the line it belongs to in the graph below."""
    key = html.Span(className=f"key key-{series}", **aria(hidden="true")) if series else None
    return html.Div([figure, html.Span([key, label], className="measure-label")], className="measure")


def graph(id: str, label: str) -> html.Div:
    """An empty graph that assets/charts.js seeds and extends; `label` says what it shows to those who cannot see it."""
    empty: Any = {
        "data": [],
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": {"visible": False},
            "yaxis": {"visible": False},
        },
    }
    config: Any = {"displayModeBar": False, "responsive": True, "doubleClick": False, "showTips": False}
    return html.Div(
        dcc.Graph(id=id, figure=empty, config=config, className="graph", responsive=True),
        role="img",
        className="graph-frame",
        **aria(label=label),
    )
