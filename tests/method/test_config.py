import pytest

from hf_dash import DashConfig
from hf_dash.method.config import with_settings
from hf_dash.starts import StartsConfig


def test_defaults_are_the_papers():
    config = DashConfig()
    assert (config.alpha, config.lam, config.grouping) == (0.3, 0.3, "kernel")


@pytest.mark.parametrize(
    ("arguments", "newest"),
    [
        # 0.7^19 = 1.14e-3 is still above the tolerance, 0.7^20 = 7.98e-4 is below.
        ({"alpha": 0.3, "tolerance": 1e-3}, 20),
        ({"alpha": 0.5, "tolerance": 0.125}, 3),
        ({"alpha": 1.0}, 1),
        ({"tolerance": 0.0}, None),
        ({"preset": "paper"}, None),
        ({"num_batches": 7}, 7),
        ({"alpha": 0.9, "tolerance": 0.5}, 1),
    ],
)
def test_number_of_newest_minibatches(arguments, newest):
    assert DashConfig(**arguments).newest == newest


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 0}, ValueError, r"alpha must be in \(0, 1\], got 0"),
        ({"alpha": 1.1}, ValueError, r"alpha must be in \(0, 1\], got 1.1"),
        ({"alpha": float("nan")}, ValueError, r"alpha must be in \(0, 1\], got nan"),
        ({"alpha": "0.3"}, TypeError, r"alpha must be a number in \(0, 1\], got '0.3'"),
        ({"alpha": True}, TypeError, "alpha must be a number"),
        ({"lam": -0.1}, ValueError, r"lam must be in \[0, 1\], got -0.1"),
        ({"lam": 1.5}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
        ({"tolerance": 1.0}, ValueError, r"tolerance must be in \[0, 1\), got 1.0"),
        ({"num_batches": 0}, ValueError, "num_batches must be at least 1, got 0"),
        ({"num_batches": 2.5}, TypeError, "num_batches must be an integer of at least 1, got 2.5"),
        ({"gradient_batch_size": 0}, ValueError, "gradient_batch_size must be at least 1, got 0"),
        ({"grouping": "row"}, ValueError, "grouping must be one of .*, got 'row'"),
        ({"preset": "mine"}, ValueError, "preset must be None or 'paper', got 'mine'"),
        (
            {"variant": "best"},
            ValueError,
            r"variant .* one of \('fill', 'orthogonal'\), got 'best'",
        ),
    ],
)
def test_bad_settings_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DashConfig(**arguments)


def test_settings_win_over_a_config_and_the_papers_are_the_rest():
    config = DashConfig(alpha=0.5, lam=0.1)
    assert with_settings(config, {"lam": 0.2}, "f()") == DashConfig(alpha=0.5, lam=0.2)
    assert with_settings(None, {"grouping": "auto"}, "f()") == DashConfig(grouping="auto")
    assert with_settings(None, {}, "f()") == DashConfig()


def test_unknown_settings_are_refused_and_the_known_listed():
    with pytest.raises(TypeError, match=r"f\(\) got unknown settings \['lambda'\]; .*'lam'"):
        with_settings(None, {"lambda": 0.2}, "f()")
    # Whoever gives the minibatches has made them.
    with pytest.raises(TypeError, match="gradient_batch_size"):
        with_settings(None, {"gradient_batch_size": 2}, "f()")
    with pytest.raises(TypeError, match="config must be a DashConfig, got dict"):
        with_settings({"lam": 0.2}, {}, "f()")
    with pytest.raises(ValueError, match="lam must be in"):
        with_settings(DashConfig(), {"lam": 2}, "f()")


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("perturb_lam", 1.5, ValueError, r"perturb_lam must be in \[0, 1\], got 1.5"),
        ("perturb_sigma", -0.1, ValueError, r"perturb_sigma must be in \[0, inf\), got -0.1"),
        (
            "l2_init_lam",
            "much",
            TypeError,
            r"l2_init_lam must be a number in \[0, inf\), got 'much'",
        ),
        ("fire_steps", 0, ValueError, "fire_steps must be at least 1, got 0"),
    ],
)
def test_bad_settings_of_starts_are_refused(field, value, error, message):
    with pytest.raises(error, match=message):
        StartsConfig(**{field: value})
