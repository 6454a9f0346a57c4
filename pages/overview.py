"""The overview: one verdict in words, the flow as a picture, and the figures behind both."""

from __future__ import annotations

import dash
from dash import html
from dash.development.base_component import Component

from pages._components import aria, bind, data, glyph, graph, measure, pair, state, tile
from pages._controls import bridge_actions, controls
from pages._verdict import dead_letters, verdict

dash.register_page(__name__, path="/", name="Overview", title="Nexus", order=0)

STREAMS = {
    "features": "features of each user",
    "storage": "events, found again",
    "aggregates": "counts by second and minute",
    "inference": "fraud and demand",
    "bridge": "sends to the Python service",
}


def layout(**_: object) -> html.Div:
    """The skeleton of the page, without a figure in it."""
    return html.Div(
        [
            html.H1("Overview", className="sr-only"),
            html.Div(
                [
                    verdict(),
                    dead_letters(),
                    bridge_actions(),
                    _flow(),
                    html.Div(
                        [_throughput(), _response(), _freshness(), _conservation(), _errors(), _store()],
                        className="tiles",
                    ),
                    _streams(),
                ],
                className="overview-main",
            ),
            html.Div(
                [controls(), html.Div([_models(), _traffic(), _jobs()], className="rail-rest")],
                className="overview-rail",
            ),
        ],
        id="overview",
        className="overview",
    )


def _node(title: str, *children: Component, id: str, level_of: str, className: str = "") -> html.Div:
    return html.Div(
        [html.Div([glyph(), html.Span(title, className="node-title")], className="node-head"), *children],
        id=id,
        className=f"node {className}".strip(),
        **data(level_of=level_of),
    )


def _value(path: str, form: str, unit: str) -> html.Div:
    return html.Div([bind(path, form, "big"), html.Span(unit, className="unit")], className="node-value")


def _wires(name: str) -> html.Div:
    """A gap of the picture; assets/flow.js draws its wires."""
    return html.Div(className=f"wires wires-{name}", **data(wires=name), **aria(hidden="true"))


def _flow() -> html.Section:
    ingest = _node(
        "Ingest",
        _value("rates.ingest", "rate", "/s"),
        html.Div([bind("derived.ingest_words")], className="node-line"),
        id="node-ingest",
        level_of="derived.store",
    )
    log = _node(
        "Log",
        _value("totals.accepted", "compact", "accepted"),
        html.Div(["store ", bind("store.status", "state")], className="node-line"),
        id="node-log",
        level_of="store.status",
    )
    streams = html.Ol([_stream_node(name, what) for name, what in STREAMS.items()], className="flow-streams")
    nexus = _node(
        "Nexus",
        _value("rates.nexus", "rate", "/s"),
        html.Div(["features ", bind("freshness.nexus_s", "age"), " old"], className="node-line"),
        html.Div(["checkpoint ", bind("pipeline.checkpoint_age_s", "age"), " ago"], className="node-line"),
        state("derived.pipeline", "node-state"),
        id="node-nexus",
        level_of="derived.pipeline",
        className="node-nexus",
    )
    python = _node(
        "Python service",
        _value("rates.python", "rate", "/s"),
        html.Div([bind("derived.waiting", whole=True)], className="node-line"),
        state("python.status", "node-state"),
        id="node-python",
        level_of="python.status",
        className="node-python",
    )
    combined = _node(
        "Combined",
        html.Div(
            [html.Span(className="ring ring-nexus"), html.Span(className="ring ring-python")],
            className="rings rings-node",
            **aria(hidden="true"),
        ),
        html.Div([bind("derived.hybrid_words", "text")], className="node-line"),
        id="node-combined",
        level_of="derived.combined",
        className="node-combined",
    )
    ends = html.Div([nexus, python], className="flow-ends")
    return html.Section(
        [
            html.H2("The way of an event", className="sr-only"),
            html.Div(
                [ingest, _wires("in"), log, _wires("fan"), streams, _wires("merge"), ends, _wires("one"), combined],
                className="flow-picture",
            ),
        ],
        id="flow",
        className="flow",
    )


def _stream_node(name: str, what: str) -> html.Li:
    path = f"streams.{name}"
    return html.Li(
        [
            glyph(),
            html.Span(name, className="stream-name"),
            html.Span([bind(f"{path}.rate", "rate"), html.Span("/s", className="unit")], className="stream-rate"),
            html.Span([bind(f"derived.lags.{name}", "lag")], className="stream-lag"),
            bind(f"derived.states.{name}", "state", "stream-state"),
        ],
        id=f"stream-{name}",
        className="stream-node",
        title=what,
        **data(level_of=f"derived.states.{name}"),
    )


def _throughput() -> html.Section:
    return tile(
        "Throughput",
        html.Div(
            [
                measure("ingest, events/s", bind("rates.ingest", "rate"), "ingest"),
                measure("Nexus", bind("rates.nexus", "rate"), "nexus"),
                measure("Python", bind("rates.python", "rate"), "python"),
            ],
            className="measures",
        ),
        graph("chart-throughput", "Events per second of ingest, Nexus and the Python service, last five minutes"),
        html.P(id="throughput-peak", className="tile-foot peak", hidden=True),
        id="tile-throughput",
        className="tile-wide",
        note=html.Span(
            [glyph("simulated"), "simulated traffic"],
            className="badge badge-simulated",
            hidden=True,
            **data(show="simulated"),
        ),
    )


def _response() -> html.Section:
    return tile(
        "Python service",
        html.Div(
            [
                measure("response time", bind("python.response_time_ms", "ms"), "python"),
                measure("waiting", bind("backlog.pending", "compact")),
            ],
            className="measures",
        ),
        graph("chart-response", "Response time of the Python service in milliseconds, last five minutes"),
        html.P(bind("derived.python_words", whole=True), className="tile-foot"),
        id="tile-python",
        note=state("python.status"),
    )


def _freshness() -> html.Section:
    return tile(
        "Feature freshness",
        html.Div(
            [
                measure("Nexus", bind("freshness.nexus_s", "age"), "nexus"),
                measure("Python", bind("freshness.python_s", "age"), "python"),
            ],
            className="measures",
        ),
        graph("chart-freshness", "Age of the features of Nexus and the Python service in seconds, last five minutes"),
        html.P(
            [
                bind("freshness.nexus_users", "compact"),
                " users at work · ",
                bind("derived.delays"),
            ],
            className="tile-foot",
        ),
        id="tile-freshness",
        note=html.Span("age", className="tile-note", title="Behind the newest event"),
    )


def _conservation() -> html.Section:
    return tile(
        "Every event accounted for",
        html.Div(
            [
                html.Div(
                    [
                        bind("unexplained", "int", "huge"),
                        html.Span([glyph(), "unexplained"], className="measure-label"),
                    ],
                    id="unexplained",
                    className="unexplained",
                    **data(level_of="derived.unexplained"),
                ),
                html.Dl(
                    [
                        pair("accepted", bind("totals.accepted", "int")),
                        pair("duplicates", bind("totals.duplicates", "int")),
                        pair("rejected", bind("totals.rejected", "int")),
                    ],
                    className="pairs",
                ),
            ],
            className="split",
        ),
        html.Div(id="conservation-bars", className="bars", **data(list="conservation")),
        html.P(
            [
                "accepted = ",
                _part("done", "processed", "Processed, and held by a checkpoint"),
                " + ",
                _part("unsaved", "no checkpoint yet", "Processed, or under way for less than a second"),
                " + ",
                _part("pending", "unread", "Yet to be processed"),
                " + ",
                _part("dead", "dead", "Given up, and kept as dead letters"),
            ],
            className="tile-foot",
        ),
        id="tile-conservation",
    )


def _part(kind: str, word: str, meaning: str) -> html.Span:
    """A word of the accounts, with the colour of its part of the bars."""
    return html.Span(
        [html.Span(className=f"key bar-{kind}", **aria(hidden="true")), word], className="part", title=meaning
    )


def _errors() -> html.Section:
    return tile(
        "Bridge errors",
        html.Div(
            [
                measure("in the last minute", bind("bridge_errors.per_min", "int"), "errors"),
                measure("since the start", bind("bridge_errors.total", "compact")),
            ],
            className="measures",
        ),
        graph("chart-errors", "Errors of the bridge per second, last five minutes"),
        html.Div(
            className="error-list", tabIndex="0", role="region", **data(list="errors"), **aria(label="Recent errors")
        ),
        html.P(bind("derived.outage_words", whole=True), className="tile-foot"),
        id="tile-errors",
        note=state("circuit.state", form="circuit"),
    )


def _store() -> html.Section:
    return tile(
        "Store memory",
        html.Div(
            [
                measure("used", bind("store.used_bytes", "bytes")),
                measure("limit", bind("store.max_bytes", "bytes")),
            ],
            className="measures",
        ),
        html.Div(
            [html.Span(className="gauge-fill", **data(gauge="store")), html.Span(className="gauge-mark")],
            className="gauge",
            **data(level_of="derived.memory"),
        ),
        html.P([bind("derived.memory_words")], className="tile-foot"),
        html.Dl(
            [
                pair("dead letters", bind("derived.dead", "int")),
                pair("let go early", bind("derived.early")),
                pair("ingest p50", bind("latency.ingest_p50_ms", "ms")),
                pair("ingest p99", bind("latency.ingest_p99_ms", "ms")),
            ],
            className="pairs",
        ),
        id="tile-store",
        note=state("store.status"),
    )


def _streams() -> html.Section:
    columns = {
        "stream": None,
        "state": None,
        "events/s": None,
        "lag": "Accepted, and neither processed nor dead as of the stream's last checkpoint",
        "behind by": "Age of the oldest event that it has yet to process",
        "no checkpoint yet": "Processed, and part of the lag until a checkpoint holds them; the age of the oldest",
        "processed": None,
        "dead": None,
        "lag, last 5 min": None,
    }
    words = {"stream", "state", "lag, last 5 min"}
    head = html.Tr(
        [
            html.Th(name, scope="col", title=meaning, className="" if name in words else "number")
            for name, meaning in columns.items()
        ]
    )
    rows = [
        html.Tr(
            [
                html.Th(name, scope="row", title=what),
                html.Td(state(f"derived.states.{name}")),
                html.Td(bind(f"streams.{name}.rate", "rate"), className="number"),
                html.Td(bind(f"streams.{name}.lag", "int"), className="number"),
                html.Td(bind(f"streams.{name}.lag_s", "age"), className="number"),
                html.Td(bind(f"derived.unsaved.{name}"), className="number"),
                html.Td(bind(f"streams.{name}.processed", "int"), className="number"),
                html.Td(
                    bind(f"streams.{name}.failed", "int"),
                    className="number dead",
                    **data(level_of=f"derived.died.{name}"),
                ),
                html.Td(html.Span(className="spark", **data(spark=name), **aria(hidden="true"))),
            ]
        )
        for name, what in STREAMS.items()
    ]
    table = html.Table([html.Thead(head), html.Tbody(rows)], className="table")
    frame = html.Div(table, className="table-frame", tabIndex="0", role="region", **aria(label="Streams"))
    return tile("Streams", frame, id="tile-streams")


def _models() -> html.Section:
    def model(name: str) -> html.Div:
        return html.Div(
            [
                html.Span(name, className="model-name"),
                state(f"models.{name}.state"),
                html.Span([bind(f"models.{name}.scored", "compact"), " scored"], className="model-scored"),
                bind(f"models.{name}.detail", "note", "model-detail"),
            ],
            className="model",
        )

    return tile("Models", model("fraud"), model("demand"), id="tile-models")


def _traffic() -> html.Section:
    return tile(
        "Last minute",
        html.Div(className="rank", **data(list="types")),
        html.H3("by source"),
        html.Div(className="rank", **data(list="sources")),
        id="tile-traffic",
    )


def _jobs() -> html.Section:
    rows = html.Div(
        className="job-list",
        tabIndex="0",
        role="region",
        **data(list="jobs"),
        **aria(label="Jobs and their latest runs"),
    )
    return tile("Jobs", rows, id="tile-jobs")
