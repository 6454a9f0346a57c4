"""The settings: defaults, bounds, what is refused and in which words."""

import os
import re
from pathlib import Path

import pytest

import event_api
from pipeline import settings
from pipeline.errors import SettingError
from pipeline.settings import RUNTIME, SPECS, Settings, load, make_folders, masked


def test_empty_environment_gives_the_documented_defaults():
    loaded = load({})
    assert loaded.python_event_api_url == "http://localhost:8000"
    assert loaded.python_service_timeout_ms == 5000
    assert loaded.enable_python_bridge is True
    assert loaded.hybrid_feature_mode is True
    assert loaded.feature_sync_interval_s == 300
    assert loaded.health_check_interval_s == 30
    assert loaded.redis_url is None
    assert loaded.embedded
    assert loaded.redis_cluster is False
    assert loaded.embedded_store_port is None
    assert (loaded.nexus_host, loaded.nexus_port) == ("127.0.0.1", 4000)
    assert (loaded.api_host, loaded.api_port) == ("127.0.0.1", 8000)
    assert loaded.event_retention_hours == 168
    assert loaded.store_fsync == "everysec"
    assert loaded.data_dir == Path.cwd() / ".nexus"
    assert loaded.log_dir == Path.cwd() / "logs" / "ml"
    assert loaded.store_max_memory == int(settings.total_memory() * 0.4)
    assert loaded.cors_origins == ("http://localhost:4000",)


def test_runtime_settings_are_the_six_that_the_dashboard_changes():
    assert RUNTIME == (
        "PYTHON_EVENT_API_URL",
        "PYTHON_SERVICE_TIMEOUT",
        "ENABLE_PYTHON_BRIDGE",
        "HYBRID_FEATURE_MODE",
        "FEATURE_SYNC_INTERVAL",
        "HEALTH_CHECK_INTERVAL",
    )


def test_every_field_of_settings_has_one_spec():
    fields = [spec.field for spec in SPECS.values() if spec.field]
    assert sorted(fields) == sorted(Settings.__slots__)


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_says_what_it_means_and_takes(name):
    assert SPECS[name].meaning
    assert SPECS[name].accepts


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("PYTHON_EVENT_API_URL", "localhost:8000"),
        ("PYTHON_EVENT_API_URL", "ftp://localhost"),
        ("PYTHON_EVENT_API_URL", "http://"),
        ("PYTHON_EVENT_API_URL", "http://a b/"),
        ("PYTHON_SERVICE_TIMEOUT", "soon"),
        ("PYTHON_SERVICE_TIMEOUT", "0"),
        ("PYTHON_SERVICE_TIMEOUT", "5s"),
        ("ENABLE_PYTHON_BRIDGE", "maybe"),
        ("HYBRID_FEATURE_MODE", "2"),
        ("FEATURE_SYNC_INTERVAL", "0"),
        ("HEALTH_CHECK_INTERVAL", "-1"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "unix://"),
        ("REDIS_URL", "redis://host:6379/abc"),
        ("REDIS_URL", "rediss://host/0/"),
        ("REDIS_URL", "redis://host/-1?ssl_ca_certs=/etc/ca.crt"),
        ("REDIS_HOST", "redis://host"),
        ("REDIS_PORT", "65536"),
        ("REDIS_CLUSTER", "perhaps"),
        ("EMBEDDED_STORE_PORT", "none"),
        ("NEXUS_HOST", "http://localhost"),
        ("NEXUS_PORT", "0"),
        ("EVENT_RETENTION_HOURS", "a week"),
        ("STORE_MAX_MEMORY", "lots"),
        ("STORE_MAX_MEMORY", "120%"),
        ("STORE_MAX_MEMORY", "1kb"),
        ("STORE_FSYNC", "never"),
        ("API_HOST", "two words"),
        ("API_PORT", "http"),
        ("API_HOST", "[::1"),
        ("CORS_ORIGINS", "localhost:4000"),
        ("CORS_ORIGINS", "http://a, http://b/"),
        ("CORS_ORIGINS", ","),
    ],
)
def test_unknown_value_is_refused_naming_variable_value_and_what_it_takes(name, held):
    with pytest.raises(SettingError) as caught:
        load({name: held})
    message = str(caught.value)
    assert message == f"{name} holds {held!r}; it takes {SPECS[name].accepts}"
    assert "\n" not in message


@pytest.mark.parametrize("held", ["http://host:99999", "https://[::1]:0/base", "http://u@host:65536?x"])
def test_a_port_that_is_none_is_named_as_what_is_wrong_with_a_url(held):
    with pytest.raises(SettingError) as caught:
        load({"PYTHON_EVENT_API_URL": held})
    assert str(caught.value).endswith("it takes a port from 1 to 65535 in the URL")


def test_message_hides_the_password_of_a_url():
    with pytest.raises(SettingError) as caught:
        load({"REDIS_URL": "reddis://user:secret@host:6379"})
    assert "secret" not in str(caught.value)
    assert "reddis://user:***@host:6379" in str(caught.value)


@pytest.mark.parametrize(
    "held", ["redis://:pa/ss@host:6379", "redis://u:pa:ss@host:x", "u:pass@host", "http://u:pa@ss@"]
)
def test_message_hides_a_password_that_makes_no_url(held):
    with pytest.raises(SettingError) as caught:
        load({"REDIS_URL": held})
    assert ":***@" in str(caught.value)
    assert not {"pa", "ss"} & set(re.findall(r"[a-z]{2}", str(caught.value).partition(";")[0]))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:secret@host:8000/a", "http://user:***@host:8000/a"),
        ("http://user:s:e@host", "http://user:***@host"),
        ("http://:secret@[::1]:8000", "http://:***@[::1]:8000"),
        ("http://token@host:8000/a:b@c", "http://token@host:8000/a:b@c"),
        ("http://host:8000/user:1@x", "http://host:8000/user:1@x"),
    ],
)
def test_password_of_a_url_is_shown_masked_and_nothing_else(url, shown):
    assert masked(url) == shown


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("true", True),
        ("1", True),
        ("Yes", True),
        ("on", True),
        ("FALSE", False),
        ("0", False),
        ("no", False),
        ("off", False),
    ],
)
def test_booleans_are_read_in_the_usual_words(word, value):
    assert load({"ENABLE_PYTHON_BRIDGE": word}).enable_python_bridge is value


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("ENABLE_PYTHON_BRIDGE", False, False),
        ("ENABLE_PYTHON_BRIDGE", 1, True),
        ("PYTHON_SERVICE_TIMEOUT", 250, 250),
        ("PYTHON_SERVICE_TIMEOUT", 250.0, 250),
        ("PYTHON_EVENT_API_URL", "https://ml.example:8443/base/", "https://ml.example:8443/base"),
    ],
)
def test_json_values_are_parsed_too(name, given, value):
    assert SPECS[name].parse(given) == value


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("PYTHON_SERVICE_TIMEOUT", True),
        ("PYTHON_SERVICE_TIMEOUT", 1.5),
        ("PYTHON_SERVICE_TIMEOUT", None),
        ("PYTHON_SERVICE_TIMEOUT", [5000]),
        ("PYTHON_SERVICE_TIMEOUT", float("inf")),
        ("ENABLE_PYTHON_BRIDGE", {}),
        ("ENABLE_PYTHON_BRIDGE", 2),
        ("PYTHON_EVENT_API_URL", 8000),
        ("PYTHON_EVENT_API_URL", "unix:///tmp/socket"),
    ],
)
def test_json_values_of_another_type_are_refused(name, given):
    with pytest.raises(SettingError, match=re.escape(name)):
        SPECS[name].parse(given)


@pytest.mark.parametrize(
    ("text", "size"),
    [("536870912", 2**29), ("512mb", 2**29), ("2gb", 2**31), ("2 GB", 2**31), ("8m", 8_000_000), ("8192kb", 2**23)],
)
def test_memory_is_read_in_the_stores_own_units(text, size):
    assert load({"STORE_MAX_MEMORY": text}).store_max_memory == size


def test_memory_as_a_share_is_one_of_the_ram():
    assert load({"STORE_MAX_MEMORY": "25%"}).store_max_memory == settings.total_memory() // 4


def test_empty_value_counts_as_unset():
    assert load({"REDIS_URL": "", "NEXUS_PORT": " "}) == load({})


def test_redis_url_wins_over_redis_host():
    loaded = load({"REDIS_URL": "rediss://a:1", "REDIS_HOST": "b"})
    assert loaded.redis_url == loaded.store_url == "rediss://a:1"
    assert not loaded.embedded


@pytest.mark.parametrize(("host", "url"), [("b", "redis://b:7000"), ("::1", "redis://[::1]:7000")])
def test_redis_host_and_port_make_the_url(host, url):
    assert load({"REDIS_HOST": host, "REDIS_PORT": "7000"}).redis_url == url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://localhost:4001"),
        ("0.0.0.0", "http://localhost:4001"),
        ("::", "http://localhost:4001"),
        ("192.0.2.7", "http://192.0.2.7:4001"),
        ("2001:db8::1", "http://[2001:db8::1]:4001"),
    ],
)
def test_nexus_is_found_at_its_host_or_at_localhost_where_it_listens_there_or_everywhere(host, url):
    assert load({"NEXUS_HOST": host, "NEXUS_PORT": "4001"}).nexus_url == url


def test_redis_port_alone_leaves_the_store_embedded():
    assert load({"REDIS_PORT": "7000"}).embedded


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"API_HOST": " [::1] ", "API_PORT": " 8720 ", "CORS_ORIGINS": " * "},
        {"API_HOST": "fe80::1%eth0", "API_PORT": "+08720", "CORS_ORIGINS": "HTTP://a:1 ,https://b,http://c "},
        {"REDIS_HOST": "[::1]", "REDIS_PORT": " 7000"},
        {"REDIS_HOST": "b", "REDIS_CLUSTER": " Yes "},
        {"REDIS_URL": " rediss://:secret@a:1/2 ", "REDIS_HOST": "b"},
        {"REDIS_URL": "redis://a"},
        {"REDIS_URL": "redis://u:p@[::1]:1/"},
        {"REDIS_URL": "rediss://a:1/0?ssl_ca_certs=/etc/ca.crt"},
        {"REDIS_URL": "rediss://a:1?ssl_ca_certs=/etc/ca.crt"},
        {"REDIS_URL": "unix:///run/store.sock?db=2"},
        {"NEXUS_DATA_DIR": " data "},
    ],
)
def test_the_python_service_reads_what_it_shares_with_nexus_alike(given):
    ours, its = load(given), event_api.read_settings(given)
    assert (its.host, its.port, tuple(its.origins)) == (ours.api_host, ours.api_port, ours.cors_origins)
    assert (its.store_url, its.cluster) == (ours.store_url, ours.redis_cluster)


def test_folder_that_cannot_be_made_is_refused_naming_variable_value_and_what_it_takes():
    with pytest.raises(SettingError) as caught:
        make_folders(load({"NEXUS_LOG_DIR": "/proc/x"}))
    takes = f"{SPECS['NEXUS_LOG_DIR'].accepts} (no such file or directory)"
    assert str(caught.value) == f"NEXUS_LOG_DIR holds '/proc/x'; it takes {takes}"


def test_data_folder_is_not_needed_beside_another_store(tmp_path):
    make_folders(load({"NEXUS_DATA_DIR": "/proc/x", "NEXUS_LOG_DIR": str(tmp_path), "REDIS_HOST": "b"}))


def test_cluster_without_an_address_is_refused():
    with pytest.raises(SettingError, match="REDIS_CLUSTER"):
        load({"REDIS_CLUSTER": "true"})


def test_folders_are_absolute_so_that_a_change_of_folder_does_not_move_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load({"NEXUS_DATA_DIR": "data"})
    monkeypatch.chdir("/")
    assert loaded.data_dir == tmp_path / "data"


def test_socket_lies_in_the_data_folder():
    loaded = load({"NEXUS_DATA_DIR": "/srv/nexus"})
    assert loaded.socket_path == Path("/srv/nexus/valkey.sock")
    assert loaded.store_url == "unix:///srv/nexus/valkey.sock"


@pytest.mark.parametrize(("length", "inside"), [(107, True), (108, False)])
def test_socket_path_moves_to_the_temp_folder_only_beyond_the_systems_limit(length, inside):
    folder = "/" + "d" * (length - len("//valkey.sock"))
    path = load({"NEXUS_DATA_DIR": folder}).socket_path
    assert (path.parent == Path(folder)) is inside
    assert len(os.fsencode(path)) <= 107


def test_short_socket_path_is_the_same_for_every_process_and_differs_by_folder():
    one, two = ("/" + "d" * 120 + end for end in "ab")
    assert load({"NEXUS_DATA_DIR": one}).socket_path == load({"NEXUS_DATA_DIR": one + "/"}).socket_path
    assert load({"NEXUS_DATA_DIR": one}).socket_path != load({"NEXUS_DATA_DIR": two}).socket_path


def test_child_environment_names_the_folders_absolutely_and_keeps_the_rest(monkeypatch):
    monkeypatch.setenv("CORS_ORIGINS", "http://elsewhere")
    environment = settings.child_environment(load({}), EXTRA="1")
    assert environment["NEXUS_DATA_DIR"] == str(Path.cwd() / ".nexus")
    assert environment["CORS_ORIGINS"] == "http://elsewhere"
    assert environment["EXTRA"] == "1"
