"""The settings: the sole reader of the environment. One table, SPECS, drives parsing, messages and documentation."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from pipeline.errors import SettingError

_SOCKET_LIMIT = 107  # bytes: sun_path has 108 with the closing NUL
_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 2**10, "m": 10**6, "mb": 2**20, "g": 10**9, "gb": 2**30}  # Valkey's
_MINUTE_MS, _DAY_S, _TEN_YEARS_H = 60_000, 86_400, 87_600


@dataclass(frozen=True, slots=True)
class Spec:
    """One variable. `read` returns None for what it does not take; `default` is written as in the environment."""

    name: str
    field: str
    read: Callable[[object], Any]
    takes: str
    default: str | None
    meaning: str
    minimum: int | None = None
    maximum: int | None = None
    unit: str | None = None

    def parse(self, value: object) -> Any:
        """The typed value of an environment text or a JSON value. Raises SettingError."""
        result = self.read(value)
        if result is None:
            raise SettingError(self.name, _masked(value), _PORT if _port_at_fault(value) else self.accepts)
        if self.minimum is not None and result < self.minimum:
            raise SettingError(self.name, _masked(value), self.accepts)
        if self.maximum is not None and result > self.maximum:
            raise SettingError(self.name, _masked(value), self.accepts)
        return result

    @property
    def default_value(self) -> Any:
        return None if self.default is None else self.parse(self.default)

    @property
    def accepts(self) -> str:
        """What the variable takes, in words, with bounds and unit."""
        if self.minimum is None:
            return self.takes
        bounds = f" of at least {self.minimum}" if self.maximum is None else f" from {self.minimum} to {self.maximum}"
        return f"{self.takes}{bounds}{f' {self.unit}' if self.unit else ''}"


@dataclass(frozen=True, slots=True)
class Settings:
    """The typed values at the start. Names ending in _s, _ms and _hours say their unit; memory is in bytes."""

    python_event_api_url: str
    python_service_timeout_ms: int
    enable_python_bridge: bool
    hybrid_feature_mode: bool
    feature_sync_interval_s: int
    health_check_interval_s: int
    redis_url: str | None
    redis_cluster: bool
    embedded_store_port: int | None
    nexus_host: str
    nexus_port: int
    event_retention_hours: int
    store_max_memory: int
    store_fsync: str
    data_dir: Path
    log_dir: Path
    api_host: str
    api_port: int
    cors_origins: tuple[str, ...]

    @property
    def retention_days(self) -> int:
        return max(1, -(-self.event_retention_hours // 24))

    @property
    def embedded(self) -> bool:
        """No address is set, so the store is the embedded one."""
        return self.redis_url is None

    @property
    def socket_path(self) -> Path:
        """The embedded store's socket: `<abs data dir>/valkey.sock`.

        Where that has more than 107 bytes it is
        `<tempfile.gettempdir()>/nexus-<uid>-<first 12 hex digits of sha256(abs data dir)>/valkey.sock`,
        `abs data dir` being os.path.abspath of NEXUS_DATA_DIR in UTF-8: every process comes to the same one.
        """
        direct = self.data_dir / "valkey.sock"
        if len(os.fsencode(direct)) <= _SOCKET_LIMIT:
            return direct
        digest = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"nexus-{os.getuid()}-{digest}" / "valkey.sock"

    @property
    def nexus_url(self) -> str:
        return address(self.nexus_host, self.nexus_port)

    @property
    def store_url(self) -> str:
        return self.redis_url or f"unix://{quote(str(self.socket_path))}"


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of an environment, this process's where none is given. An empty value counts as unset.

    Raises SettingError with one line that names the variable, what it held and what it takes.
    """
    environ = os.environ if environ is None else environ
    given = {name: environ[name].strip() for name in SPECS if environ.get(name, "").strip()}
    values = {n: spec.parse(given[n]) if n in given else spec.default_value for n, spec in SPECS.items()}
    host, port = values.pop("REDIS_HOST"), values.pop("REDIS_PORT")
    if values["REDIS_URL"] is None and host is not None:
        values["REDIS_URL"] = f"redis://{bracketed(host)}:{port}"
    if values["REDIS_CLUSTER"] and values["REDIS_URL"] is None:
        raise SettingError("REDIS_CLUSTER", given["REDIS_CLUSTER"], "true only beside REDIS_URL or REDIS_HOST")
    return Settings(**{SPECS[name].field: value for name, value in values.items()})


def make_folders(settings: Settings) -> None:
    """Make the folders that this instance writes to. Raises SettingError, naming the variable, where one cannot be."""
    wanted = [("NEXUS_LOG_DIR", settings.log_dir, 0o777)]
    if settings.embedded:  # beside another store the data folder is a help, not a need
        wanted.append(("NEXUS_DATA_DIR", settings.data_dir, 0o700))
    for name, folder, mode in wanted:
        try:
            folder.mkdir(mode, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise SettingError(name, str(folder), f"{_FOLDER} ({why})") from error


def child_environment(settings: Settings, **more: str) -> dict[str, str]:
    """What a process started by this one inherits: all of this one's environment, both folders absolute, and `more`."""
    folders = {"NEXUS_DATA_DIR": str(settings.data_dir), "NEXUS_LOG_DIR": str(settings.log_dir)}
    return {**os.environ, **folders, **more}


def address(host: str, port: int, path: str = "") -> str:
    """Where a person or a program of this machine finds what listens there."""
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else bracketed(host)
    return f"http://{shown}:{port}{path}"


def bracketed(host: str) -> str:
    """The host as a URL writes it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def masked(url: str) -> str:
    """The URL as it is shown: *** for a password in it."""
    return re.sub(r"^(\w+://[^:@/]*):[^/]*@", r"\1:***@", url)


def _masked(value: object) -> object:
    """What a variable held, which need not be a URL, without a password: messages end up in logs."""
    return re.sub(r"^((?:\w+://)?[^:@/]*):.*@", r"\1:***@", value) if isinstance(value, str) else value


def _flag(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return _WORDS.get(str(value).strip().lower()) if isinstance(value, str | int) else None


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
        return int(value)
    return value if isinstance(value, int) else None


def _split(value: object) -> SplitResult | None:
    """The URL's parts, or None where it is none: a space or control character, a port that is no port."""
    if not isinstance(value, str) or re.search(r"[\s\x00-\x1f\x7f]", value.strip()):
        return None
    try:
        parts = urlsplit(value.strip())
        return parts if parts.port is None or parts.port > 0 else None
    except ValueError:
        return None


def _port_at_fault(value: object) -> bool:
    """Whether it is a URL but for its port."""
    without = re.sub(r"^(\w+://[^/?#]*):[0-9]+(?=[/?#]|$)", r"\1", value.strip()) if isinstance(value, str) else None
    return without != value and _split(value) is None and _split(without) is not None


def _http_url(value: object) -> str | None:
    parts = _split(value)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        return None
    return parts.geturl().rstrip("/")


def _redis_url(value: object) -> str | None:
    parts = _split(value)
    if parts is None or parts.scheme not in ("redis", "rediss", "unix"):
        return None
    _, slashes, rest = str(value).strip().partition("://")
    if not slashes or not (parts.path if parts.scheme == "unix" else parts.hostname):
        return None
    if parts.scheme != "unix" and not re.fullmatch("(/[0-9]*)?", parts.path):  # the client would take database 0
        return None
    return f"{parts.scheme}://{rest}"  # not geturl(): it drops the slashes of unix:// where no host follows


def _host(value: object) -> str | None:
    """The host, an IPv6 address without its brackets."""
    match = re.fullmatch(r"\[([\w.:%-]+)\]|([\w.:%-]+)", value.strip()) if isinstance(value, str) else None
    return (match[1] or match[2]) if match else None


def _origins(value: object) -> tuple[str, ...] | None:
    origins = tuple(each.strip() for each in value.split(",")) if isinstance(value, str) else ()
    each_is_one = all(re.fullmatch(r"\*|https?://[^\s,/]+", origin, re.IGNORECASE) for origin in origins)
    return origins if origins and each_is_one else None


def _fsync(value: object) -> str | None:
    return value.lower() if isinstance(value, str) and value.lower() in ("everysec", "always") else None


def _folder(value: object) -> Path | None:
    return Path(os.path.abspath(value)) if isinstance(value, str) and value and "\0" not in value else None


def _memory(value: object) -> int | None:
    text = str(value).strip().lower().replace(" ", "") if isinstance(value, str | int) else ""
    if match := re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]+)?)%", text):
        share = float(match[1]) / 100
        return int(total_memory() * share) if 0 < share <= 1 else None
    match = re.fullmatch(r"([0-9]{1,18})([a-z]{0,2})", text)
    return int(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else None


def total_memory() -> int:
    """Bytes of RAM that this process may use: the machine's, or its container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path)
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


_PORT = "a port from 1 to 65535 in the URL"
_HTTP = "a URL that begins with http:// or https://, such as http://localhost:8000"
_REDIS = (
    "a URL that begins with redis://, rediss:// or unix://, such as redis://localhost:6379"
    " or, with a database's number, redis://localhost:6379/0"
)
_TRUE = "true or false"
_HOST = "a host name or an IP address"
_MEMORY = "a size such as 536870912, 512mb, 2gb or 40% (of the RAM),"
_N = "a whole number"
_FOLDER = "a folder that can be made and written to"
_ORIGINS = "origins such as http://localhost:4000, comma separated"

_TABLE = (
    Spec("PYTHON_EVENT_API_URL", "python_event_api_url", _http_url, _HTTP, "http://localhost:8000",
         "where the Python service is"),
    Spec("PYTHON_SERVICE_TIMEOUT", "python_service_timeout_ms", _whole, _N, "5000",
         "how long one request to the Python service may take", 1, 10 * _MINUTE_MS, "ms"),
    Spec("ENABLE_PYTHON_BRIDGE", "enable_python_bridge", _flag, _TRUE, "true",
         "events are forwarded to the Python service; false keeps all for it until it is true again, past their retention too,"
         " and ingest refuses once the memory is full of them"),
    Spec("HYBRID_FEATURE_MODE", "hybrid_feature_mode", _flag, _TRUE, "true",
         "combined features merge both systems; false serves Nexus's own only"),
    Spec("FEATURE_SYNC_INTERVAL", "feature_sync_interval_s", _whole, _N, "300",
         "how often users whose features have drifted apart in age are looked for and published again", 1, _DAY_S, "s"),
    Spec("HEALTH_CHECK_INTERVAL", "health_check_interval_s", _whole, _N, "30",
         "how often the Python service's health is asked for", 1, _DAY_S, "s"),
    Spec("REDIS_URL", "redis_url", _redis_url, _REDIS, None, "the store; unset: REDIS_HOST, else the embedded one"),
    Spec("REDIS_HOST", "", _host, _HOST, None, "the store's host, where REDIS_URL is unset"),
    Spec("REDIS_PORT", "", _whole, _N, "6379", "the store's port, beside REDIS_HOST", 1, 65535),
    Spec("REDIS_CLUSTER", "redis_cluster", _flag, _TRUE, "false", "the address is a Valkey or Redis Cluster node"),
    Spec("EMBEDDED_STORE_PORT", "embedded_store_port", _whole, _N, None,
         "opens the embedded store on that port of 127.0.0.1 too", 1, 65535),
    Spec("NEXUS_HOST", "nexus_host", _host, _HOST, "127.0.0.1", "the address Nexus listens on"),
    Spec("NEXUS_PORT", "nexus_port", _whole, _N, "4000", "the port Nexus listens on", 1, 65535),
    Spec("EVENT_RETENTION_HOURS", "event_retention_hours", _whole, _N, "168",
         "how long events are kept, by time of arrival", 1, _TEN_YEARS_H, "h"),
    Spec("STORE_MAX_MEMORY", "store_max_memory", _memory, _MEMORY, "40%",
         "the embedded store's memory limit; ingest refuses at 85 % of it", 4 * 2**20, None, "bytes"),
    Spec("STORE_FSYNC", "store_fsync", _fsync, "everysec or always", "everysec",
         "when the embedded store flushes to disk"),
    Spec("NEXUS_DATA_DIR", "data_dir", _folder, _FOLDER, ".nexus",
         "the embedded store's files, sockets and locks"),
    Spec("NEXUS_LOG_DIR", "log_dir", _folder, _FOLDER, "logs/ml", "nexus-ai.log is inside it"),
    Spec("API_HOST", "api_host", _host, _HOST, "127.0.0.1", "the address the Python service listens on"),
    Spec("API_PORT", "api_port", _whole, _N, "8000", "the port the Python service listens on", 1, 65535),
    Spec("CORS_ORIGINS", "cors_origins", _origins, _ORIGINS, "http://localhost:4000",
         "the origins whose pages may ask the Python service"),
)  # fmt: skip

SPECS: dict[str, Spec] = {spec.name: spec for spec in _TABLE}
RUNTIME: tuple[str, ...] = tuple(SPECS)[:6]  # can be changed while Nexus runs
