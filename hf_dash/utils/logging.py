"""Loggers that follow transformers' verbosity without importing transformers."""

import logging


def get_logger(name: str) -> logging.Logger:
    """Return a logger below ``hf_dash``, which inherits level and handlers from ``transformers``.

    So ``transformers.utils.logging.set_verbosity_info()`` shows hf_dash's lines too. Where
    transformers is not loaded, warnings go to standard error, as with any logger.

    Args:
        name: ``__name__`` of the module that logs.
    """
    logging.getLogger("hf_dash").parent = logging.getLogger("transformers")
    return logging.getLogger(name)


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
