import copy
import dataclasses

import pytest
import timm
import torch
from helpers import same_state, state_of

import hf_dash
from hf_dash.method.loss import WeightedLoss, default_loss
from hf_dash.method.reference import reference_factors

NAMES = [
    "cold",
    "dash",
    "fire",
    "head_reset",
    "l2_init",
    "shrink_perturb",
    "warm",
    "warm_reset_momentum",
]


def run_start(name, model, context, **settings):
    """Call a start of that name, with these settings of ``StartsConfig``."""
    context = dataclasses.replace(context, start_config=hf_dash.starts.StartsConfig(**settings))
    return hf_dash.find_start(name)(model, context)


def test_the_names_of_the_starts():
    assert sorted(hf_dash.STARTS) == NAMES
    assert hf_dash.find_start("cold") is hf_dash.STARTS["cold"]
    with pytest.raises(ValueError, match=r"start must be one of \['cold', 'dash', .*\], got 'hot'"):
        hf_dash.find_start("hot")


def test_only_the_penalty_acts_in_every_round():
    marked = [name for name in NAMES if getattr(hf_dash.STARTS[name], "every_round", False)]
    assert marked == ["l2_init"]


def test_a_start_of_ones_own_is_a_function(small_model, context):
    @hf_dash.starts.every_round
    def halve_(model, context):
        with torch.no_grad():
            model.timm_model.fc.weight.mul_(0.5)

    start: hf_dash.Start = halve_
    assert start.every_round
    before = small_model.timm_model.fc.weight.detach().clone()
    assert start(small_model, context) is None
    assert torch.equal(small_model.timm_model.fc.weight, before / 2)


@pytest.mark.parametrize("name", ["dash", "fire", "head_reset", "shrink_perturb"])
def test_starts_that_change_weights_reset_the_optimizer_unless_told_not_to(
    small_model, context, name
):
    assert not run_start(name, small_model, context).keep_optimizer
    assert run_start(name, small_model, context, reset_optimizer=False).keep_optimizer


@pytest.mark.parametrize("name", NAMES)
def test_the_global_random_state_is_left_alone(small_model, context, name):
    before = torch.get_rng_state()
    hf_dash.find_start(name)(small_model, context)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["cold", "head_reset", "l2_init"])
def test_what_needs_a_fresh_timm_model_refuses_others(every_layer, context, name):
    before = state_of(every_layer)
    with pytest.raises(TypeError, match="model must be a timm wrapper, got EveryLayer"):
        hf_dash.find_start(name)(every_layer, context)
    assert same_state(before, state_of(every_layer))


def test_cold_is_a_fresh_timm_model_of_that_seed(small_model, context):
    with torch.no_grad():
        for tensor in small_model.state_dict().values():
            tensor.fill_(1)
    assert hf_dash.find_start("cold")(small_model, context) is None
    torch.manual_seed(5)
    fresh = timm.create_model("test_resnet", num_classes=10)
    assert same_state(state_of(small_model.timm_model), state_of(fresh))


def test_warm_keeps_everything(small_model, context):
    before = state_of(small_model)
    assert hf_dash.find_start("warm")(small_model, context) == hf_dash.Started(keep_optimizer=True)
    assert hf_dash.find_start("warm_reset_momentum")(small_model, context) is None
    assert same_state(before, state_of(small_model))


def test_shrink_perturb_shrinks_by_lam_and_adds_noise_of_sigma(context):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 5), torch.nn.BatchNorm2d(64), torch.nn.Linear(64, 300)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    run_start("shrink_perturb", model, context, perturb_lam=0.4, perturb_sigma=0.1)
    assert {*model[1].weight.tolist(), *model[1].bias.tolist()} == {2.0}
    for layer in (model[0], model[2]):
        weight = layer.weight.detach().double()
        # Five standard errors of the mean and of the standard deviation.
        assert weight.mean().item() == pytest.approx(0.8, abs=0.5 / weight.numel() ** 0.5)
        assert weight.std().item() == pytest.approx(0.1, abs=0.5 / (2 * weight.numel()) ** 0.5)
        assert layer.bias.mean().item() == pytest.approx(0.8, abs=0.5 / layer.bias.numel() ** 0.5)
        assert layer.bias.std().item() > 0.05


def test_shrink_perturb_without_noise_is_a_product(every_layer, context):
    before = state_of(every_layer)
    run_start("shrink_perturb", every_layer, context, perturb_lam=0.25, perturb_sigma=0.0)
    shrunk = ("conv", "depthwise", "pointwise", "transposed", "head")
    for name, tensor in every_layer.state_dict().items():
        expected = before[name] * 0.25 if name.split(".")[0] in shrunk else before[name]
        assert torch.equal(tensor, expected), name


def test_the_noise_follows_from_the_seed_alone(small_model, context):
    other, third = copy.deepcopy(small_model), copy.deepcopy(small_model)
    run_start("shrink_perturb", small_model, context)
    torch.manual_seed(99)  # another process, in another random state
    run_start("shrink_perturb", other, context)
    run_start("shrink_perturb", third, dataclasses.replace(context, seed=6))
    assert same_state(state_of(small_model), state_of(other))
    assert not same_state(state_of(small_model), state_of(third))


def test_head_reset_gives_the_classifier_fresh_rows_and_keeps_the_rest(small_model, context):
    before = state_of(small_model.timm_model)
    run_start("head_reset", small_model, context)
    torch.manual_seed(5)
    fresh = timm.create_model("test_resnet", num_classes=10).state_dict()
    for name, tensor in small_model.timm_model.state_dict().items():
        head = name in ("fc.weight", "fc.bias")
        assert torch.equal(tensor, fresh[name] if head else before[name]), name
    assert not torch.equal(before["fc.weight"], small_model.timm_model.fc.weight)


def test_head_reset_takes_both_heads_of_a_distilled_model(context):
    model = hf_dash.create_model(
        "deit_tiny_distilled_patch16_224",
        label_names=["a", "b"],
        model_args={"depth": 1, "embed_dim": 12},
        image_size=32,
    )
    before = state_of(model.timm_model)
    run_start("head_reset", model, context)
    changed = {n for n, t in model.timm_model.state_dict().items() if not torch.equal(before[n], t)}
    assert changed == {"head.weight", "head_dist.weight"}  # their biases begin at zero


def test_head_reset_refuses_a_model_without_a_head(small_model, context, monkeypatch):
    monkeypatch.setattr(small_model.timm_model, "get_classifier", torch.nn.Identity)
    before = state_of(small_model)
    with pytest.raises(ValueError, match=r"classifier .* none in 'test_resnet'"):
        run_start("head_reset", small_model, context)
    assert same_state(before, state_of(small_model))


def test_l2_init_pulls_all_trainable_parameters_to_their_first_values(small_model, context):
    context = dataclasses.replace(context, init_seed=3)
    small_model.timm_model.get_parameter("conv1.0.weight").requires_grad_(False)
    before = state_of(small_model)
    started = run_start("l2_init", small_model, context, l2_init_lam=0.1)
    assert started.keep_optimizer
    assert same_state(before, state_of(small_model))

    torch.manual_seed(3)
    first = dict(timm.create_model("test_resnet", num_classes=10).named_parameters())
    expected = 0.0
    for name, parameter in small_model.timm_model.named_parameters():
        if name != "conv1.0.weight":
            values = parameter.flatten().tolist(), first[name].flatten().tolist()
            for now, then in zip(*values, strict=True):
                expected += 0.1 * (now - then) ** 2
    # A wrapper with names of its own, as DDP has them, makes no difference.
    penalty = started.penalty(torch.nn.Sequential(small_model))
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    for name, parameter in small_model.timm_model.named_parameters():
        if name == "conv1.0.weight":
            assert parameter.grad is None
        else:
            gradient = 0.2 * (parameter - first[name]).detach()
            torch.testing.assert_close(parameter.grad, gradient)


def test_l2_init_of_the_first_weights_is_nothing(small_model, context):
    penalty = run_start("l2_init", small_model, context).penalty
    assert penalty(small_model).item() == 0  # both come from seed 0


def test_l2_init_refuses_parameters_that_timm_does_not_draw(small_model, context):
    small_model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"trainable parameter 'adapter\.weight'"):
        run_start("l2_init", small_model, context)


def test_fire_makes_every_trainable_weight_a_scaled_isometry(every_layer, context):
    before = state_of(every_layer)
    run_start("fire", every_layer, context, fire_steps=60)
    changed = {"conv.weight", "pointwise.weight", "transposed.weight", "head.weight"}
    for name, tensor in every_layer.state_dict().items():
        assert torch.equal(tensor, before[name]) is (name not in changed), name
    for name, (d_out, d_in, positions) in {
        "conv": (8, 3, 9),
        "pointwise": (6, 8, 1),
        "head": (10, 4, 1),
    }.items():
        weight = every_layer.get_parameter(f"{name}.weight").detach()
        original = before[f"{name}.weight"].reshape(d_out, d_in, positions)
        for position in range(positions):
            u, _, vh = torch.linalg.svd(original[:, :, position], full_matrices=False)
            expected = (d_out / d_in) ** 0.5 / positions * (u @ vh)
            found = weight.reshape(d_out, d_in, positions)[:, :, position]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Two groups of 3 channels in and 2 out, over 4 kernel positions.
    for group in every_layer.transposed.weight.detach().split(3):
        values = torch.linalg.svdvals(group.permute(2, 3, 1, 0))
        torch.testing.assert_close(values, torch.full_like(values, (2 / 3) ** 0.5 / 4))


def test_fire_leaves_a_model_that_can_be_used(small_model, context, two_rounds):
    run_start("fire", small_model, context)
    images = torch.stack([two_rounds[0].examples[i]["pixel_values"] for i in range(8)])
    assert small_model(pixel_values=images).logits.isfinite().all()


def test_dash_shrinks_by_the_minibatches_of_the_round(small_model, context, two_rounds):
    before = copy.deepcopy(small_model)
    report = hf_dash.find_start("dash")(small_model, context).report
    assert (report.num_batches, report.num_images) == (4, 120)
    examples = [two_rounds[1].examples[i] for i in range(120)]
    batches = [
        {
            "pixel_values": torch.stack([e["pixel_values"] for e in examples[i : i + 30]]),
            "labels": torch.tensor([e["labels"] for e in examples[i : i + 30]]),
        }
        for i in range(0, 120, 30)
    ]
    factors = reference_factors(before, batches, default_loss)
    for name, tensor in small_model.named_parameters():
        start = before.get_parameter(name)
        expected = start.double() * factors[name] if name in factors else start
        torch.testing.assert_close(tensor.double(), expected.double(), rtol=0, atol=1e-6)


def test_the_papers_preset_reads_one_arrival_per_minibatch(small_model, two_rounds):
    context = hf_dash.StartContext(two_rounds[1], 0, dash=hf_dash.DashConfig(preset="paper"))
    report = hf_dash.find_start("dash")(small_model, context).report
    assert (report.num_batches, report.num_images) == (2, 120)


def test_processes_get_their_share(two_rounds):
    class Two:
        num_processes, process_index = 2, 1

    context = hf_dash.StartContext(two_rounds[1], seed=0, accelerator=Two())
    (batch,) = context.gradient_batches()
    assert batch["labels"].tolist() == [
        two_rounds[1].examples[i]["labels"] for i in range(1, 120, 2)
    ]


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


def test_dash_minimizes_the_loss_of_the_training(small_model, context):
    weights = torch.linspace(0.1, 3, 10)
    weighted = dataclasses.replace(context, loss_fn=WeightedLoss(weights))
    other, again = copy.deepcopy(small_model), copy.deepcopy(small_model)

    def rows(model, batch):
        logits = model(pixel_values=batch["pixel_values"]).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return (weights[batch["labels"]] * loss).mean()

    hf_dash.find_start("dash")(small_model, weighted)
    hf_dash.find_start("dash")(other, dataclasses.replace(context, loss_fn=rows))
    hf_dash.find_start("dash")(again, context)
    for ours, theirs in zip(small_model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert not same_state(state_of(small_model), state_of(again))
