"""The verdict of the overview, and what it leads to; the words are made in assets/verdict.js."""

from __future__ import annotations

from typing import Any

from dash import html

from pages._components import aria, data, glyph, tile


def verdict() -> html.Section:
    """The sentence, the rings that say it at a glance, and buttons for what it advises."""
    words = html.Div(
        [
            html.P("Waiting for the first figures", id="verdict-title", className="verdict-title", tabIndex="-1"),
            html.P("The page asks once a second.", id="verdict-detail", className="verdict-detail"),
        ],
        className="verdict-words",
    )
    # Spoken apart from what is shown: a figure that moves every second must not be read out every second.
    spoken = html.P(id="verdict-spoken", className="sr-only", role="status", **aria(live="polite"))
    rings = html.Div(
        [html.Span(className="ring ring-nexus"), html.Span(className="ring ring-python"), glyph()],
        className="rings rings-verdict",
        **aria(hidden="true"),
    )
    sample = html.Div(
        [
            html.Button("Send sample traffic", id="sample-send", className="sample-button", type="button"),
            html.Span("20 s of simulated rides, marked as such", id="sample-progress", className="sample-progress"),
        ],
        id="sample",
        className="sample",
        hidden=True,
    )
    acts = html.Div(
        [
            _act("Resume bridge", "resume"),
            _act("Reset circuit", "reset"),
            _act("Show dead letters", "letters", **aria(expanded="false", controls="letters")),
        ],
        className="acts",
    )
    return html.Section(
        [rings, words, acts, sample, spoken],
        id="verdict",
        className="verdict",
        **data(level="unknown", rings="unknown"),
    )


def _act(label: str, name: str, **more: Any) -> html.Button:
    """A button for what the verdict advises; assets/paint.js shows it while it does."""
    return html.Button(
        label, id=f"act-{name}", className="act-button", type="button", hidden=True, **data(act=name), **more
    )


def dead_letters() -> html.Section:
    """Empty until asked for: see assets/letters.js."""
    redrive = html.Button("Send all again", id="letters-redrive", className="act-button", type="button")
    rows = html.Ol(id="letters-list", className="letters")
    return tile("The newest dead letters", rows, id="letters", note=redrive, hidden=True, tabIndex="-1")
