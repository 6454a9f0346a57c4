"""The documentation names what there is: settings, routes, store keys, features, jobs, commands; and nothing of a machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import event_api
from pipeline import keys
from pipeline.catalogue import FEATURES
from pipeline.runtime import VERSION, Runtime
from pipeline.settings import SPECS
from pipeline.web.openapi import OPERATIONS
from tests.helpers import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
README = PAGES["README.md"]
DOCS = "\n".join(PAGES.values())
KEYS = sorted(value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str))
TRACKED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
# Written in halves, so that this file does not name what no file may name.
OF_A_MACHINE = re.compile(
    "/wo"
    + r"rk/(main|shared)|/opt/"
    + r"pypi|/ro"
    + r"ot/|/ho"
    + r"me/\w|(files\.)?"
    + r"pythonhosted\.org|://pypi\.|artifac"
    + r"tory"
)
FIGURE = re.compile(r"\d[\d,.]* ?(events/s|µs|ms\b|B per|requests/s)")
COMMAND = re.compile(r"make (bench|chaos|test|demo)|python -m \w+|curl |requirepass|pytest")


def named_in_docs(word: str) -> bool:
    return re.search(rf"(?<![\w:]){re.escape(word)}(?![\w])", DOCS) is not None


@pytest.mark.parametrize("name", SPECS)
def test_setting_is_in_the_readme_with_its_default(name: str):
    row = next((line for line in README.splitlines() if line.startswith("|") and f"`{name}`" in line), None)
    assert row is not None
    default = SPECS[name].default
    assert f"`{default}`" in row or (default is None and "unset" in row)


@pytest.mark.parametrize("path", sorted({path for _, path in OPERATIONS}))
def test_route_is_in_the_readmes_table(path: str):
    table = README[README.index("## Routes") : README.index("## Store keys")]
    assert f"`{path}`" in table


def test_readme_names_no_route_that_there_is_not():
    known = [re.sub(r"\{\w+\}", "[^/]+", path) for _, path in OPERATIONS]
    for path in re.findall(r"localhost:4000(/(?:api|metrics|healthz|readyz|openapi)[^\s'\"?|;]*)", README):
        assert any(re.fullmatch(pattern, path) for pattern in known), path


@pytest.mark.parametrize("key", KEYS)
def test_store_key_is_in_the_docs(key: str):
    name = key.removeprefix(keys.PREFIX) or keys.PREFIX
    assert f"`{name}" in DOCS


@pytest.mark.parametrize("name", [feature.name for feature in FEATURES])
def test_feature_is_in_the_docs(name: str):
    assert named_in_docs(name)


def test_every_job_is_in_the_docs(nexus: Runtime):
    assert not [name for name in nexus.scheduler.jobs if f"`{name}`" not in PAGES["docs/architecture.md"]]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^|' )make ([a-z]+)", DOCS, re.MULTILINE))))
def test_command_in_the_docs_exists_in_the_makefile(target: str):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", DOCS))))
def test_module_in_the_docs_exists(module: str):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize(
    ("page", "link"),
    [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)],
)
def test_link_leads_to_a_file(page: str, link: str):
    assert link.startswith("http") or ((ROOT / page).parent / link).exists()


@pytest.mark.parametrize("page", sorted(PAGES))
def test_page_with_figures_says_which_command_makes_them(page: str):
    assert not FIGURE.search(PAGES[page]) or COMMAND.search(PAGES[page])


def test_every_command_of_the_tour_is_one_that_bash_can_read():
    for block in re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, (block, checked.stderr)


def test_tracked_files_name_no_place_on_a_machine():
    found = []
    for name in filter(None, TRACKED.split("\0")):
        path = ROOT / name
        try:
            text = path.read_text()
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # an image; a file that is being removed
        found += [f"{name}: {match[0]}" for match in OF_A_MACHINE.finditer(text)]
    assert not found


def test_licence_is_mit_of_the_authors():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert "The Nexus authors" in text


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert VERSION == event_api.VERSION == project["version"]


def test_changelog_begins_with_the_version_that_runs():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] in (VERSION, "Unreleased")


def test_screenshot_is_a_real_picture():
    picture = ROOT / re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", README)[0]
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
