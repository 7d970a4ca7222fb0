import logging

import pytest
from helpers import heard
from transformers.utils import logging as transformers_logging

from hf_dash.utils.logging import get_logger


@pytest.fixture
def verbosity():
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)


def test_loggers_follow_the_verbosity_of_transformers(verbosity):
    logger = get_logger("hf_dash.somewhere")
    transformers_logging.set_verbosity_warning()
    assert not logger.isEnabledFor(logging.INFO)
    transformers_logging.set_verbosity_info()
    assert logger.isEnabledFor(logging.INFO)
    transformers_logging.set_verbosity_error()
    assert not logger.isEnabledFor(logging.WARNING)


def test_records_reach_the_handlers_of_transformers(verbosity):
    transformers_logging.set_verbosity_info()
    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    transformers_logging.add_handler(handler)
    get_logger("hf_dash.somewhere").info("DASH %s", "shrank")
    transformers_logging.remove_handler(handler)
    assert [(record.name, record.getMessage()) for record in seen] == [
        ("hf_dash.somewhere", "DASH shrank")
    ]


def test_the_level_of_hf_dash_can_be_set_alone(verbosity):
    transformers_logging.set_verbosity_info()
    logging.getLogger("hf_dash").setLevel(logging.ERROR)
    try:
        assert not get_logger("hf_dash.somewhere").isEnabledFor(logging.WARNING)
    finally:
        logging.getLogger("hf_dash").setLevel(logging.NOTSET)


@pytest.mark.parametrize(("is_main", "said"), [(True, ["found", "mine"]), (False, ["mine"])])
def test_what_all_find_out_the_main_process_says(monkeypatch, is_main, said):
    monkeypatch.setattr("hf_dash.utils.logging.is_main_process", lambda: is_main)
    with heard() as messages:
        get_logger("hf_dash.of_all", main_process_only=True).warning("found")
        get_logger("hf_dash.of_each").warning("mine")
    assert messages == said
