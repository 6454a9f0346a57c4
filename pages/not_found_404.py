"""What stands at an address under /nexus that has no page."""

from __future__ import annotations

import dash
from dash import dcc, html

dash.register_page(__name__, path="/404", name="Not found", title="Not found · Nexus")


def layout(**_: object) -> html.Section:
    return html.Section(
        [
            html.H1("There is no page at this address"),
            html.P(dcc.Link("To the overview", href=dash.get_relative_path("/"))),
        ],
        className="tile not-found",
    )
