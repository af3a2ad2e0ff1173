"""What libraries say through Python's `logging`, as lines of our log."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence

from coldframe.runtime.gateway.logs import Log

__all__ = ["LogHandler", "route_logging"]

_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")


class LogHandler(logging.Handler):
    """Writes records to a log of ours.

    Args:
        log: Ours.
    """

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "info"
        if logging.INFO < record.levelno < logging.ERROR:
            level = "warning"
        elif record.levelno < logging.INFO or record.name.startswith("uvicorn"):
            level = level if record.levelno >= logging.ERROR else "debug"
        error = record.exc_info and record.exc_info[1]
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that don't fit
            message = str(record.msg)
        trace = "".join(traceback.format_exception(error)) if error else None
        self._log.write(
            level, "library", {"logger": record.name, "message": message, "traceback": trace}
        )


def route_logging(log: Log, loggers: Sequence[str] = _UVICORN) -> None:
    """Has everything that is logged in this process written by ours; for a process's entry.

    uvicorn needs `log_config=None`, or it sets up its own again.

    Args:
        log: Ours.
        loggers: Those that may have handlers already.
    """
    logging.captureWarnings(True)
    for name in loggers:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    root = logging.getLogger()
    root.handlers[:] = [LogHandler(log)]
    root.setLevel(logging.INFO)
