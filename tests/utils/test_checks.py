import logging
from dataclasses import dataclass

import numpy as np
import pytest
from helpers import heard

from hf_dash.utils.checks import (
    check_confidence,
    check_count,
    check_flag,
    check_kind,
    check_number,
    refuse_unless,
    with_settings,
)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        ("[0, 1]", [0, 0.5, 1, np.float32(1)], [-1e-9, 1.1, float("nan")]),
        ("(0, 1]", [1e-9, 1], [0, 1.1]),
        ("[0, 1)", [0, 0.9], [1, -0.1]),
        ("(0, 1)", [0.5], [0, 1, float("inf")]),
    ],
)
def test_a_range_includes_its_square_ends(allowed, inside, outside):
    for value in inside:
        assert check_number("alpha", value, allowed, 0, 1) == float(value)
    for value in outside:
        with pytest.raises(ValueError, match="alpha must be in") as caught:
            check_number("alpha", value, allowed, 0, 1)
        assert str(caught.value) == f"alpha must be in {allowed}, got {value!r}"


@pytest.mark.parametrize("value", [True, "1", None, [1], 1j])
def test_a_number_is_a_number(value):
    with pytest.raises(TypeError, match=r"alpha must be a number in \[0, 1\], got"):
        check_number("alpha", value, "[0, 1]", 0, 1)


def test_a_flag_is_true_or_false():
    check_flag("force", True)
    for value in (1, "yes", None):
        with pytest.raises(TypeError, match=f"force must be True or False, got {value!r}"):
            check_flag("force", value)


def test_a_count_is_an_integer_that_is_large_enough():
    check_count("steps", 1)
    check_count("seed", 0, at_least=0)
    for value in (1.0, True, "1", None):
        with pytest.raises(
            TypeError, match=f"steps must be an integer of at least 1, got {value!r}"
        ):
            check_count("steps", value)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        check_count("steps", 0)
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        check_count("classes", 1, at_least=2)


def test_a_kind_includes_its_subclasses():
    check_kind("config", True, int)
    with pytest.raises(TypeError, match="config must be a dict, got 3"):
        check_kind("config", 3, dict)


@pytest.mark.parametrize("value", [0, 1, 95, float("nan")])
def test_a_confidence_is_a_share(value):
    check_confidence(0.95)
    with pytest.raises(ValueError, match=rf"confidence must be in \(0, 1\), got {value}"):
        check_confidence(value)


@dataclass(frozen=True)
class Config:
    alpha: float = 0.3
    lam: float = 0.3


def test_settings_change_a_copy_and_unknown_ones_list_the_known():
    config = Config()
    assert with_settings(config, {"lam": 0.5}) == Config(lam=0.5)
    assert config == Config()
    with pytest.raises(TypeError, match=r"among \['alpha', 'lam'\], got \['lambda', 'x'\]"):
        with_settings(config, {"lambda": 1, "lam": 0.5, "x": 2})


def test_what_is_not_allowed_is_refused_and_what_is_allowed_is_said():
    logger = logging.getLogger("hf_dash.refusals")
    with pytest.raises(ValueError, match="5 % are left out; allow_missing=True goes on"):
        refuse_unless(False, "5 % are left out", "; allow_missing=True goes on", logger)
    with heard() as messages:
        refuse_unless(True, "5 % are left out", "; allow_missing=True goes on", logger)
    assert messages == ["5 % are left out"]
