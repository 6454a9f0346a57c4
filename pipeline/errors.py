"""The error tree; foreign exceptions become one of these at the boundary where they arise.

NexusError                500  anything that Nexus raises on purpose
├── SettingError          422  a setting holds what it does not take
├── BadRequest            400  the request cannot be read
├── NotFound              404
├── TooLarge              413
├── Unprocessable         422  read, but not acceptable
├── AlreadyRunning        409  another process owns the data folder or the port
├── StoreError            503  the store did not do what was asked
│   ├── StoreUnavailable       away, loading, read-only; `lost`: the write may have happened
│   │   └── OutcomeUnknown     so is told of a write: nobody may take it for not done
│   ├── StoreFull              it takes no more (memory limit, disk): nothing was written
│   └── StoreRefused           a script or a key is not what it should be: not to be mended by waiting
│       └── StoreWrongType     one key, so that others need not care
├── Fenced                503  the writer lost the lease: drop what it holds, read the checkpoint again
└── PartnerError          502  the Python service
    ├── PartnerTimeout    504  no whole answer in time
    ├── PartnerUnreachable     no connection
    ├── PartnerStatus          an answer outside 2xx
    └── PartnerContract        a 2xx answer that is not what was agreed
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class NexusError(Exception):
    """`code` a stable word for programs, `message` a sentence for people, `details` JSON; `status` the HTTP status."""

    default_status: ClassVar[int] = 500

    def __init__(
        self, code: str, message: str, *, status: int | None = None, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = self.default_status if status is None else status
        self.details: dict[str, Any] = dict(details or {})

    def body(self) -> dict[str, Any]:
        """The answer of every route that fails: {"error": {"code", "message", "details"}}."""
        return {"error": {"code": self.code, "message": self.message, "details": self.details}}


class SettingError(NexusError):
    """`name` the variable, `held` what it held, `takes` what it takes, in words."""

    default_status = 422

    def __init__(self, name: str, held: object, takes: str) -> None:
        super().__init__(
            "invalid_setting",
            f"{name} holds {held!r}; it takes {takes}",
            details={"name": name, "held": held, "takes": takes},
        )
        self.name = name


class BadRequest(NexusError):
    default_status = 400


class NotFound(NexusError):
    default_status = 404


class TooLarge(NexusError):
    default_status = 413


class Unprocessable(NexusError):
    default_status = 422


class _Named(NexusError):
    """An error whose class says its code, so that it is raised with a message alone."""

    default_code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(self.default_code, message, details=details)


class AlreadyRunning(_Named):
    default_status, default_code = 409, "already_running"


class _Busy(_Named):
    """`retry_after`: whole seconds, for the Retry-After header."""

    default_status = 503

    def __init__(self, message: str, *, retry_after: int = 1, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, details=details)
        self.retry_after = retry_after


class StoreError(_Busy):
    """`lost`: the request was sent and its answer never came, so that what was asked may have been done."""

    default_code = "store_error"
    lost = False


class StoreUnavailable(StoreError):
    default_code = "store_unavailable"

    def __init__(self, message: str, *, lost: bool = False, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, details=details)
        self.lost = lost


class OutcomeUnknown(StoreUnavailable):
    """What was to be written may stand in the store, or may not: the message says how to go on without doing it twice."""

    default_code = "outcome_unknown"

    def __init__(self, message: str, *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, lost=True, details=details)


class StoreFull(StoreError):
    default_code = "store_full"


class StoreRefused(StoreError):
    default_code = "store_refused"


class StoreWrongType(StoreRefused):
    """One key holds what it should not: the trouble of who asked for it, and of nobody else."""


class Fenced(_Busy):
    default_code = "fenced"


class PartnerError(_Named):
    default_status, default_code = 502, "partner_error"


class PartnerTimeout(PartnerError):
    default_status, default_code = 504, "partner_timeout"


class PartnerUnreachable(PartnerError):
    default_code = "partner_unreachable"


class PartnerStatus(PartnerError):
    """`status_code` is what the partner answered."""

    default_code = "partner_status"

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message, details={"status_code": status_code})
        self.status_code = status_code


class PartnerContract(PartnerError):
    default_code = "partner_contract"
