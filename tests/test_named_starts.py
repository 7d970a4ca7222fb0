import dataclasses

import pytest
import torch
from conftest import same_state, state_of

import hf_dash


def test_a_name_alone_is_the_start_itself():
    assert hf_dash.find_start("cold") is hf_dash.STARTS["cold"]


def test_settings_in_a_name_take_the_place_of_the_runs(small_model, context):
    other = dataclasses.replace(
        context, dash=hf_dash.DashConfig(alpha=0.7, lam=0.9, grouping="filter", num_batches=2)
    )
    begun = hf_dash.find_start("dash+alpha=0.1+grouping=auto+reset_optimizer=false")(
        small_model, other
    )
    config = begun.report.config
    assert (config.alpha, config.lam, config.grouping) == (0.1, 0.9, "auto")
    assert config.num_batches == 2
    assert begun.keep_optimizer


def test_other_starts_take_their_own(small_model, context):
    before = state_of(small_model)
    hf_dash.find_start("shrink_perturb+perturb_lam=0.5+perturb_sigma=0")(small_model, context)
    name = "timm_model.fc.weight"
    assert torch.equal(state_of(small_model)[name], before[name] / 2)


def test_what_acts_in_every_round_still_does():
    assert hf_dash.find_start("l2_init+l2_init_lam=0.1").every_round
    assert not hasattr(hf_dash.find_start("dash+alpha=0.1"), "every_round")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("hot", ValueError, r"start must be one of \['cold', 'dash', .*\], got 'hot'"),
        ("dash+beta=1", ValueError, r"settings of start 'dash\+beta=1' .* got \['beta=1'\]"),
        ("dash+", ValueError, r"got \[''\]"),
        ("dash+alpha=2", ValueError, r"alpha must be in \(0, 1\], got 2"),
        ("dash+alpha=", TypeError, "alpha must be a number .* got ''"),
        ("dash+alpha=0.1+alpha=0.2", ValueError, "must set 'alpha' once"),
        ("dash+grouping=rows", ValueError, "grouping must be one of .* got 'rows'"),
        ("fire+fire_steps=1.5", TypeError, "fire_steps must be an integer"),
        ("fire+reset_optimizer=no", TypeError, "reset_optimizer must be True or False, got 'no'"),
    ],
)
def test_bad_names_are_refused_before_any_round(name, error, message):
    with pytest.raises(error, match=message):
        hf_dash.find_start(name)


def test_a_refused_setting_changes_no_weight(small_model, context):
    before = state_of(small_model)
    with pytest.raises(ValueError, match="alpha must be in"):
        hf_dash.find_start("dash+alpha=0")(small_model, context)
    assert same_state(before, state_of(small_model))
