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
