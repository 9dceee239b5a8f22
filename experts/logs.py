"""How our replicas log: one line with the facts behind it, to the process's own stderr file in Ray's log folder."""

import logging

_PACKAGES = ("cluster", "router", "experts")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class FactsFormatter(logging.Formatter):
    """Appends what was given as `extra` to the line, as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{key}={value}" for key, value in vars(record).items() if key not in _STANDARD)
        return f"{super().format(record)} {facts}".rstrip()


def set_up_logs() -> None:
    """Called once by each replica; other libraries' loggers stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(FactsFormatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [handler]
