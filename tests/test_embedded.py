"""The embedded store: durability, its lock, its socket, its end with its parent."""

import dataclasses
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading

import pytest
import redis

from pipeline.embedded import EmbeddedStore, Rewriting, alive, is_serving, sync_to_disk
from pipeline.errors import AlreadyRunning, StoreUnavailable
from pipeline.settings import Settings, load
from tests.helpers import until


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def settings(tmp_path) -> Settings:
    return load(
        {"NEXUS_DATA_DIR": str(tmp_path / "data"), "NEXUS_LOG_DIR": str(tmp_path / "logs"), "STORE_MAX_MEMORY": "64mb"}
    )


@pytest.fixture
def store(settings):
    store = EmbeddedStore(settings)
    store.start()
    store.wait_ready()
    yield store
    store.stop()


def client(settings: Settings) -> redis.Redis:
    return redis.Redis.from_url(settings.store_url, decode_responses=True, protocol=2)


def test_store_serves_on_its_socket_and_opens_no_port(settings, store):
    assert is_serving(settings)
    with client(settings) as redis_client:
        assert redis_client.config_get("port") == {"port": "0"}


@pytest.mark.parametrize(("says", "serves"), [("-MISCONF its disk is full", True), ("-LOADING", False), ("", False)])
def test_store_that_answers_anything_but_that_it_is_loading_serves(settings, says, serves):
    settings.data_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(settings.socket_path))
        listener.listen(1)

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(64)
                connection.sendall(f"{says}\r\n".encode() if says else b"")

        answering = threading.Thread(target=answer)
        answering.start()
        assert is_serving(settings) is serves
        answering.join()


def test_store_whose_disk_is_full_serves(settings, store):
    resource.prlimit(store.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    with client(settings) as redis_client:
        redis_client.set("answered", "though not written")

        def refused() -> bool:
            try:
                return not redis_client.ping()
            except redis.ResponseError as error:
                return "MISCONF" in str(error)

        until(refused, "the store to notice that its disk is full")
        assert is_serving(settings)


def test_settings_reach_the_server(settings, store):
    with client(settings) as redis_client:
        held = redis_client.config_get("*")
    assert held["maxmemory"] == str(64 * 2**20)
    assert held["maxmemory-policy"] == "noeviction"
    assert held["appendonly"] == "yes"
    assert held["appendfsync"] == "no"  # no write waits for a sync that runs, unwritten but answered
    assert held["save"] == ""
    assert held["aof-load-truncated"] == "yes"


def test_store_fsync_always_syncs_each_write_before_its_answer(settings):
    store = EmbeddedStore(dataclasses.replace(settings, store_fsync="always"))
    argv = store.argv()
    assert argv[argv.index("--appendfsync") + 1] == "always"


def test_sync_to_disk_syncs_the_file_that_the_server_appends_to(settings, store, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))

    sync_to_disk(settings)

    with client(settings) as redis_client:
        name = redis_client.config_get("appendfilename")["appendfilename"]
    assert synced == [str(settings.data_dir / "appendonlydir" / f"{name}.1.incr.aof")]


def test_file_that_has_grown_is_written_anew_while_there_is_hardly_anything_to_do(settings, store):
    with client(settings) as redis_client:
        for _ in range(6):
            redis_client.set("overwritten", "x" * (8 << 20))
        rewriting = Rewriting(settings, redis_client.execute_command)
        rewriting.look(5.0)
        assert rewrites(redis_client) == (0, 0)
        rewriting.look(5.5)
        until(lambda: rewrites(redis_client) == (1, 0), "the file is written anew")
        files = (settings.data_dir / "appendonlydir").iterdir()
        assert sum(path.stat().st_size for path in files) < 9 << 20
        rewriting.look(6.0)
        assert rewrites(redis_client) == (1, 0)


def rewrites(redis_client: redis.Redis) -> tuple[int, int]:
    """How many were begun, and whether one is under way."""
    found = redis_client.info("persistence")
    return int(found["aof_rewrites"]), int(found["aof_rewrite_in_progress"])


def test_socket_is_for_its_user_alone(settings, store):
    assert stat.S_IMODE(settings.socket_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o700


def test_files_are_for_their_user_alone(settings, store):
    with client(settings) as redis_client:
        redis_client.set("k", "v")
    files = list(settings.data_dir.rglob("*"))
    assert any(path.suffix == ".aof" for path in files)
    assert [path for path in files if path.stat().st_mode & 0o077] == []


def test_embedded_store_port_opens_it_on_loopback_too(settings, free_port):
    store = EmbeddedStore(dataclasses.replace(settings, embedded_store_port=free_port))
    store.start()
    try:
        store.wait_ready()
        with redis.Redis("127.0.0.1", free_port) as redis_client:
            assert redis_client.ping()
            assert redis_client.config_get("bind") == {"bind": "127.0.0.1"}
    finally:
        store.stop()


def test_acknowledged_writes_survive_kill_9(settings, store):
    with client(settings) as redis_client:
        for number in range(200):
            redis_client.rpush("numbers", number)
        store.process.send_signal(signal.SIGKILL)
        store.process.wait()
    assert store.poll() == -signal.SIGKILL
    store.start()
    store.wait_ready()
    with client(settings) as redis_client:
        assert redis_client.llen("numbers") == 200


def test_data_survives_a_stop(settings, store):
    with client(settings) as redis_client:
        redis_client.set("kept", "yes")
    store.stop()
    assert store.poll() == 0
    assert not is_serving(settings)
    again = EmbeddedStore(settings)
    again.start()
    try:
        again.wait_ready()
        with client(settings) as redis_client:
            assert redis_client.get("kept") == "yes"
    finally:
        again.stop()


def test_torn_tail_of_the_log_file_loses_only_the_torn_record(settings, store):
    with client(settings) as redis_client:
        redis_client.set("whole", "yes")
        redis_client.set("torn", "no")
    store.stop()
    [log] = (settings.data_dir / "appendonlydir").glob("*.incr.aof")
    os.truncate(log, log.stat().st_size - 3)
    store.start()
    store.wait_ready()
    with client(settings) as redis_client:
        assert redis_client.get("whole") == "yes"
        assert redis_client.get("torn") is None


@pytest.mark.parametrize("torn", [0, 9, 150], ids=["whole", "in the last record", "in a step of several"])
@pytest.mark.parametrize("nuls", [1, 5000])
def test_nuls_at_the_end_of_the_log_file_are_cut_off(settings, store, monkeypatch, caplog, nuls, torn):
    monkeypatch.setattr("pipeline.embedded._BLOCK", 4096)
    with client(settings) as redis_client:
        redis_client.set("whole", "yes")
        with redis_client.pipeline(transaction=True) as together:
            together.set("one", "x" * 50).set("other", "x").execute()
        redis_client.set("last", "x\0\0")
    store.stop()
    [log] = (settings.data_dir / "appendonlydir").glob("*.incr.aof")
    end = log.stat().st_size - torn
    os.truncate(log, end)
    os.truncate(log, end + nuls)
    store.start()
    store.wait_ready()
    assert f"{log} ended in {nuls} NUL bytes, as after a power cut: cut off at {end}" in caplog.text
    with client(settings) as redis_client:
        assert redis_client.get("whole") == "yes"
        assert redis_client.exists("one", "other") == (0 if torn == 150 else 2)
        assert redis_client.get("last") == (None if torn else "x\0\0")


def test_log_file_of_nothing_but_nuls_is_empty(settings, store):
    store.stop()
    [log] = (settings.data_dir / "appendonlydir").glob("*.incr.aof")
    os.truncate(log, 0)
    os.truncate(log, 5000)
    store.start()
    store.wait_ready()
    assert is_serving(settings)


def test_second_store_on_a_folder_is_refused_in_one_line_that_names_it(settings, store):
    with pytest.raises(AlreadyRunning) as caught:
        EmbeddedStore(settings).start()
    assert str(settings.data_dir) in str(caught.value)
    assert str(os.getpid()) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lock_is_held_by_the_server_itself_until_it_ends(settings):
    """The owner is killed; the folder stays locked for as long as its stopped server has not ended."""
    owner, server = _owner_process(settings)
    os.kill(server, signal.SIGSTOP)
    owner.kill()
    owner.wait()
    try:
        with pytest.raises(AlreadyRunning):
            EmbeddedStore(settings).lock(patience_s=0)
    finally:
        os.kill(server, signal.SIGCONT)
    taker = EmbeddedStore(settings)
    assert taker.lock() is True
    taker.release()


def test_store_ends_when_its_parent_is_killed(settings):
    owner, server = _owner_process(settings)
    assert is_serving(settings)
    owner.kill()
    owner.wait()
    taker = EmbeddedStore(settings)
    assert taker.lock() is True  # waits for the server's end
    taker.release()
    assert not alive(server)


def _owner_process(settings: Settings) -> tuple[subprocess.Popen[str], int]:
    """A process that owns a store until its input is closed, and the server's id."""
    code = (
        "import sys; from pipeline.embedded import EmbeddedStore; from pipeline.settings import load\n"
        "store = EmbeddedStore(load()); store.start(); store.wait_ready()\n"
        "print(store.pid, flush=True); sys.stdin.read(); store.stop()"
    )
    environment = {**os.environ, "NEXUS_DATA_DIR": str(settings.data_dir), "NEXUS_LOG_DIR": str(settings.log_dir)}
    owner = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    return owner, int(owner.stdout.readline())


def test_lock_after_an_ordinary_stop_reports_no_killed_owner(settings):
    owner, _ = _owner_process(settings)
    owner.communicate()
    assert owner.returncode == 0
    again = EmbeddedStore(settings)
    assert again.lock() is False
    again.release()


def test_long_data_folder_is_served_through_a_private_short_socket(tmp_path):
    settings = load({"NEXUS_DATA_DIR": str(tmp_path / ("d" * 120)), "NEXUS_LOG_DIR": str(tmp_path / "logs")})
    store = EmbeddedStore(settings)
    store.start()
    try:
        store.wait_ready()
        assert stat.S_IMODE(settings.socket_path.parent.stat().st_mode) == 0o700
    finally:
        store.stop()
    assert not settings.socket_path.parent.exists()


def test_short_sockets_folder_that_others_can_enter_is_refused(tmp_path):
    settings = load({"NEXUS_DATA_DIR": str(tmp_path / ("d" * 120)), "NEXUS_LOG_DIR": str(tmp_path / "logs")})
    folder = settings.socket_path.parent
    folder.mkdir()
    folder.chmod(0o755)
    store = EmbeddedStore(settings)
    try:
        with pytest.raises(StoreUnavailable, match="not private"):
            store.start()
    finally:
        store.stop()
        folder.rmdir()


def test_short_sockets_folder_that_somebody_else_has_made_is_refused(tmp_path, monkeypatch):
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    settings = load({"NEXUS_DATA_DIR": str(tmp_path / ("d" * 120)), "NEXUS_LOG_DIR": str(tmp_path / "logs")})
    folder = settings.socket_path.parent
    folder.mkdir(mode=0o700)
    store = EmbeddedStore(settings)
    try:
        with pytest.raises(StoreUnavailable, match="not private"):
            store.start()
    finally:
        store.stop()
        folder.rmdir()


def test_server_that_ends_at_once_is_reported_with_its_log(settings):
    (settings.data_dir / "appendonlydir").mkdir(parents=True)
    (settings.data_dir / "appendonlydir" / "appendonly.aof.manifest").write_text("not a manifest\n")
    store = EmbeddedStore(settings)
    store.start()
    try:
        with pytest.raises(StoreUnavailable, match=r"ended with 1; see .*valkey\.log"):
            store.wait_ready()
    finally:
        store.stop()
