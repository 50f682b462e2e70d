"""Typed errors: a user's fault is one of these, an `assert` guards an invariant of ours.

`status` is the HTTP status that the server answers with; `code` is the machine-readable word beside it.
"""

from __future__ import annotations


class MotetError(Exception):
    """Base of every error that is meant to be read by a user."""

    status = 500
    code = "internal_error"


class InvalidRequest(MotetError):
    """The request cannot be served as asked; `param` names the field at fault."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(MotetError):
    """No base model or adapter is served under this name."""

    status = 404
    code = "model_not_found"


class AdapterRefused(MotetError):
    """An adapter's files cannot be bound to the base model; the message names the key and the reason."""

    status = 422
    code = "adapter_refused"


class AdapterConflict(MotetError):
    """The name is taken by something that must not be replaced."""

    status = 409
    code = "adapter_conflict"


class ModelRefused(MotetError):
    """A base model's architecture, option or files are not supported; the message names which."""

    code = "model_refused"


class AdapterLoadFailed(MotetError):
    """An adapter that was accepted could not be loaded into the pool now; a later request tries again."""

    status = 503
    code = "adapter_load_failed"


class CapacityExceeded(MotetError):
    """The pool is too small for this request even when nothing else runs."""

    status = 400
    code = "capacity_exceeded"


class ConfigError(MotetError):
    """A configuration value is unknown or out of range."""

    code = "config_error"


class StorageFull(MotetError):
    """The disk that holds packed images is full; resident adapters serve on."""

    status = 507
    code = "storage_full"


class EngineDead(MotetError):
    """The engine process is gone; nothing can be served until it is restarted."""

    status = 503
    code = "engine_dead"
