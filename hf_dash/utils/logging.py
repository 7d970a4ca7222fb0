"""Loggers that follow transformers' verbosity without importing transformers."""

import logging
from functools import cache
from typing import Any

from hf_dash.utils.distributed import is_main_process


def get_logger(name: str, *, main_process_only: bool = False) -> logging.Logger:
    """Return a logger below ``hf_dash``, which inherits level and handlers from ``transformers``.

    So ``transformers.utils.logging.set_verbosity_info()`` shows hf_dash's lines too. Where
    transformers is not loaded, warnings go to standard error, as with any logger.

    Args:
        name: ``__name__`` of the module that logs.
        main_process_only: what it logs, all processes find out: one of them says it.
    """
    logging.getLogger("hf_dash").parent = logging.getLogger("transformers")
    logger = logging.getLogger(name)
    if main_process_only:
        logger.addFilter(_is_by_main)
    return logger


@cache
def warn_once(logger: logging.Logger, message: str, *arguments: Any) -> None:
    """Warn, unless this process has said the same of the same before.

    Example:
        >>> from hf_dash.utils.logging import get_logger, warn_once
        >>> for _ in range(2):
        ...     warn_once(get_logger("hf_dash.docs"), "said %d time", 1)
    """
    logger.warning(message, *arguments)


def _is_by_main(record: logging.LogRecord) -> bool:
    return is_main_process()


def show_info() -> None:
    """Show what hf_dash does, one line at a time, whatever transformers shows.

    Example:
        >>> import logging
        >>> import hf_dash
        >>> hf_dash.utils.show_info()
        >>> logging.getLogger("hf_dash.data").isEnabledFor(logging.INFO)
        True
        >>> logging.getLogger("hf_dash").setLevel(logging.NOTSET)
    """
    get_logger("hf_dash").setLevel(logging.INFO)
