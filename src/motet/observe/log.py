"""One way to log: standard library logging, one line per event, as text for people or as JSON for collectors.

Fields passed as `extra={...}` (request_id, model, status…) are part of the line in both forms.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


def setup(level: str = "INFO", *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Send every record of this process to `stream` (by default standard error) and nowhere else."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and stop lines repeat ours


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO motet.server.app: message key=value`, on one line (tracebacks aside)."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_one_word(value)}" for key, value in _extras(record).items())
        message = _one_line(record.getMessage())
        return (
            f"{_timestamp(record)} {record.levelname} {record.name}: {message}{fields}{self._trace(record)}"
        )

    def _trace(self, record: logging.LogRecord) -> str:
        return "\n" + self.formatException(record.exc_info) if record.exc_info else ""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, the extra fields, the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _timestamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _one_line(text: str) -> str:
    """Control characters escaped, so that what a client sent cannot forge a second line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _one_word(value: object) -> str:
    word = _one_line(str(value))
    return word if word and " " not in word else json.dumps(word, ensure_ascii=False)
