"""The rules of the house: imports point one way, importing starts nothing, every file says its job and stays short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT, clean_environment

# Each layer may import from those before it and from itself; what is not named here belongs to `parts`.
LEAVES = {"settings", "errors", "keys", "events"}
FOUNDATIONS = {"store", "log", "windows", "definitions"}
PARTS = {"feature_store", "partner"}  # and streams/, models/
FRONT = {"serving", "jobs", "ingest", "routes"}
ORDER = [LEAVES, FOUNDATIONS, PARTS, FRONT, {"runtime"}]
FORBIDDEN_ABOVE = {name: set().union(*ORDER[level + 1 :]) for level, layer in enumerate(ORDER) for name in layer}
MAX_LINES = 400
WHOLE = {"event_api"}  # one file on purpose: it can be taken away and run alone
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "pages").glob("*.py"), *(ROOT / "pipeline").rglob("*.py")])
MODULES = [path for path in SOURCES if path.is_relative_to(ROOT / "pipeline")]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def for_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker runs."""
    for child in ast.iter_child_nodes(tree):
        if not for_type_checking(child):
            yield child
            yield from nodes(child)


def imports(path: Path) -> set[str]:
    """The project's own modules that a file imports at run time, wherever in it: pipeline.log, pages._shell, app."""
    found: set[str] = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their whole path"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    known = {name_of(source) for source in SOURCES if source.stem != "__init__"}
    return {name for name in found if name in known}


GRAPH = {name_of(path): imports(path) for path in SOURCES}


def layer_word(module: str) -> str:
    """How the layers name a module: pipeline.log is log, pipeline.streams.runner is streams."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path))
def test_no_part_of_the_pipeline_imports_the_app_or_a_page(path):
    allowed = {"pages._shell"} if path.stem == "dashboard" else set()
    assert not {m for m in imports(path) if not m.startswith("pipeline.")} - allowed


@pytest.mark.parametrize("module", [m for m in GRAPH if m.startswith("pipeline.")])
def test_imports_point_from_later_layers_to_earlier_ones(module):
    word = "feature_store" if layer_word(module) in ("streams", "models") else layer_word(module)
    above = FORBIDDEN_ABOVE.get(word, {"runtime"} if word != "runtime" else set())
    assert not {layer_word(m) for m in GRAPH[module]} & above


def test_leaves_import_leaves_alone():
    for leaf in LEAVES:
        assert {layer_word(m) for m in GRAPH[f"pipeline.{leaf}"]} <= LEAVES, leaf


def test_no_modules_import_each_other_in_a_circle():
    seen: dict[str, str] = {}

    def visit(module: str, way: list[str]) -> None:
        assert seen.get(module) != "open", " imports ".join([*way[way.index(module) :], module])
        if module not in seen:
            seen[module] = "open"
            for imported in sorted(GRAPH[module]):
                visit(imported, [*way, module])
            seen[module] = "done"

    for module in sorted(GRAPH):
        visit(module, [])


def test_models_are_pure_and_know_no_store_and_no_stream():
    for module, imported in GRAPH.items():
        if module.startswith("pipeline.models."):
            assert not {layer_word(m) for m in imported} & {"store", "streams", "log", "keys", "settings"}, module


def test_pages_import_serving_and_what_pages_share_alone():
    for module, imported in GRAPH.items():
        if module.startswith("pages."):
            assert {m for m in imported if not m.startswith("pages._")} <= {"pipeline.serving"}, module


def test_nexus_imports_no_tool():
    tools = {module for module in GRAPH if module.startswith("pipeline.tools.")}
    for module in GRAPH.keys() - tools:
        assert not GRAPH[module] & tools, module


def test_event_api_imports_nothing_of_nexus():
    assert GRAPH["event_api"] == set()


def test_environment_is_read_by_the_settings_alone():
    """The supervisor and the processes hand it on to their children; the Python service reads its own."""
    readers = {
        name_of(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
    }
    assert readers <= {"pipeline.settings"}


@pytest.mark.parametrize("module", ["app", "event_api", "pipeline.runtime"])
def test_importing_starts_nothing(module, tmp_path):
    code = (
        "import os, threading, sys\n"
        "def watch(event, args):\n"
        "    if event in ('socket.connect', 'socket.bind', 'subprocess.Popen', 'os.fork', 'os.mkdir'):\n"
        "        print(event, args); os._exit(3)\n"
        "sys.addaudithook(watch)\n"
        f"import {module}\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    environment = clean_environment(NEXUS_DATA_DIR=str(tmp_path / "data"), NEXUS_LOG_DIR=str(tmp_path / "logs"))
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: name_of(path))
def test_file_says_its_job_in_its_first_line_and_has_at_most_400_lines(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text)) or ""
    first = docstring.split("\n")[0]
    assert text.startswith(('"""', "#!"))
    assert len(first) > 10
    assert name_of(path) in WHOLE or len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline" / "lua").glob("*.lua")), ids=lambda path: path.stem)
def test_script_says_its_job_in_its_first_comment(path):
    comment = next(line for line in path.read_text().splitlines() if line.startswith("--"))
    assert len(comment) > 20
