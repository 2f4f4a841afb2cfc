"""What the Kafka clients say beside the errors that they raise."""

from __future__ import annotations

import logging


def quiet(logger: logging.Logger) -> logging.Logger:
    """Silence a client's logger, unless somebody gave it a level.

    While a broker is away the clients log several errors a second, with the exceptions and what hangs on them.
    tokentape raises one error instead.
    """
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)
    return logger
