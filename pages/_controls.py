"""The controls of the overview: settings and bridge actions. The browser sends them; the feed shows the truth."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, html

from pages._components import UNKNOWN, aria, bind, data, glyph, state, tile

SWITCHES = {
    "ENABLE_PYTHON_BRIDGE": ("Bridge", "send events to the Python service"),
    "HYBRID_FEATURE_MODE": ("Hybrid mode", "combined features merge both systems"),
}
NUMBERS = {
    "FEATURE_SYNC_INTERVAL": ("Feature sync every", "s"),
    "PYTHON_SERVICE_TIMEOUT": ("Python service timeout", "ms"),
    "HEALTH_CHECK_INTERVAL": ("Health check every", "s"),
}
URL = "PYTHON_EVENT_API_URL"


def controls() -> html.Section:
    """Switches and bounded inputs; each setting says where its value comes from and can be reset."""
    return tile(
        "Controls",
        *[_switch(name, *words) for name, words in SWITCHES.items()],
        *[_field(name, *words) for name, words in NUMBERS.items()],
        _field(URL, "Python service address"),
        id="tile-controls",
    )


def bridge_actions() -> html.Section:
    """What can be done about the bridge: near the top, for it is wanted in trouble."""
    return html.Section(
        [
            html.H2("Bridge", id="tile-bridge-title"),
            state("circuit.state", form="circuit"),
            html.Div(
                [
                    _button("Pause bridge", "bridge-pause"),
                    _button("Resume bridge", "bridge-resume"),
                    _button("Reset circuit", "bridge-reset"),
                    _button("Open circuit …", "bridge-open"),
                    _button("Test the whole way", "bridge-test", False),
                ],
                className="buttons",
            ),
            html.P(
                [glyph(), bind("derived.canary_words", whole=True)],
                className="canary",
                **data(level_of="derived.canary"),
            ),
            html.P(id="test-summary", className="test-summary"),
            html.Ol(id="test-steps", className="test-steps", **aria(live="polite")),
            _confirm(),
        ],
        id="tile-bridge",
        className="tile bridge-actions",
        **aria(labelledby="tile-bridge-title"),
    )


def _button(label: str, id: str, disabled: bool = True) -> html.Button:
    return html.Button(label, id=id, className="button", type="button", disabled=disabled)


def _source(name: str, label: str) -> html.Div:
    """Where the value of a setting comes from, and the ways back to the environment's and to the one in force."""
    return html.Div(
        [
            html.Span(UNKNOWN, id=f"{name}-source", className="setting-source"),
            _link("reset", name, f"reset {label} to the environment's value, or the default"),
            _link("discard", name, f"discard what was typed as {label}"),
        ],
        className="setting-foot",
    )


def _link(does: str, name: str, what: str) -> html.Button:
    return html.Button(
        does,
        id=f"{name}-{does}",
        className="setting-link",
        type="button",
        hidden=True,
        title=what.capitalize(),
        **data(does=does, of=name),
        **aria(label=what),
    )


def _apply(name: str, label: str) -> html.Button:
    return html.Button(
        "Apply",
        id=f"{name}-apply",
        className="button",
        type="button",
        disabled=True,
        **data(does="apply", of=name),
        **aria(label=f"Apply {label}"),
    )


def _switch(name: str, label: str, what: str) -> html.Div:
    knob = dmc.Switch(id=name, label=label, description=what, checked=False, disabled=True, size="md", color="teal.7")
    return html.Div([knob, _source(name, label)], className="setting setting-switch")


def _field(name: str, label: str, unit: str | None = None) -> html.Div:
    """A line of text, for numbers too: what is typed stays, and assets/controls.js judges all of it."""
    field = dmc.TextInput(
        id=name,
        label=label,
        size="sm",
        className="setting-field",
        debounce=True,  # Dash is told when it is left: assets/controls.js reads the field itself
        rightSection=unit,
        inputProps=None if unit is None else {"inputMode": "numeric"},
        autoComplete="off",
        spellCheck=False,
    )
    line = html.Div([field, _apply(name, label)], className="setting-edit")
    return html.Div([line, _source(name, label)], className="setting")


def _confirm() -> dmc.Modal:
    return dmc.Modal(
        [
            html.P(
                "The bridge stops sending until the circuit is reset. Events wait in the log, nothing is lost; "
                "the Python service's features grow old."
            ),
            html.Div(
                [
                    dmc.Button("Leave it closed", id="open-circuit-no", variant="default", **data(autofocus="true")),
                    dmc.Button("Open the circuit", id="open-circuit-yes", color="red.8"),
                ],
                className="modal-buttons",
            ),
        ],
        id="open-circuit",
        title="Open the circuit to the Python service?",
        centered=True,
        opened=False,
        closeButtonProps={"aria-label": "Close, leave the circuit closed"},
    )


def register(dashboard: Dash) -> None:
    """The callbacks of the controls, all of them in the browser. Registered with the application rather than at import: a
    second application in the same process has them too."""

    def in_browser(name: str, *inputs: Input) -> None:
        dashboard.clientside_callback(ClientsideFunction("nexus", name), *inputs, prevent_initial_call=True)

    for name in SWITCHES:
        in_browser("toggleSetting", Input(name, "checked"))
    in_browser("sendSample", Input("sample-send", "n_clicks"))
    in_browser("showLetters", Input("act-letters", "n_clicks"))
    in_browser("redriveLetters", Input("letters-redrive", "n_clicks"))
