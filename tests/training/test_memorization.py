import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import same_state, state_of
from torch import nn

from hf_dash import create_model
from hf_dash.training import ExampleSets, measure_memorization
from hf_dash.training.memorization import dormant_share, effective_rank, spaced_indices


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(4, 7)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(3, 2)) == 0
    # Singular values 3 and 1: shares 3/4 and 1/4, so exp(entropy) = 4 / 3^(3/4), however rotated.
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    matrix = turn @ torch.diag(torch.tensor([3.0, 1.0])) @ turn
    assert effective_rank(matrix) == pytest.approx(4 / 3**0.75, rel=1e-5)


def test_dormant_units_by_hand():
    # Mean absolute activations 0, 0.02, 1 and 2.98: their mean is 1, so τ = 0.025 takes two.
    features = torch.tensor([[0.0, 0.04, -1.0, 2.98], [0.0, 0.0, 1.0, -2.98]])
    assert dormant_share(features) == 0.5
    assert dormant_share(features, 0.0) == 0.25
    assert dormant_share(features, 0.01) == 0.25
    assert dormant_share(torch.zeros(2, 3)) == 1


class Linear(nn.Module):
    """Logits are the pixels times a matrix; dropout shows whether it is evaluated."""

    def __init__(self, matrix):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(matrix))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.dropout(pixel_values) @ self.weight)


def points(pairs):
    return [{"pixel_values": torch.tensor(pixels), "labels": label} for pixels, label in pairs]


OLD = points([([1.0, 0.0], 0), ([0.0, 1.0], 1), ([2.0, 1.0], 0), ([1.0, 3.0], 0)])


NEW = points([([0.0, 1.0], 0)])


HELD_OUT = points([([1.0, 0.0], 0), ([3.0, 1.0], 1), ([0.0, 1.0], 0)])


def test_accuracies_and_gradient_norms_by_hand(accelerator):
    # Logits are the pixels themselves: the larger one is the answer.
    model = Linear([[1.0, 0.0], [0.0, 1.0]])
    flipped = points([([1.0, 0.0], 1), ([0.0, 1.0], 1)])
    found = measure_memorization(model, ExampleSets(NEW, HELD_OUT, OLD, flipped), accelerator)
    # One example (0, 1) of class 0: ∂loss/∂weight = pixels ⊗ (softmax − one-hot), whose second row
    # is (−e, e) / (1 + e), so the norm is √2 · e / (1 + e).
    assert found.pop("gradient_norm_new") == pytest.approx(2**0.5 * np.e / (1 + np.e))
    found.pop("gradient_norm_old")
    assert found == pytest.approx(
        {
            "accuracy_old": 3 / 4,
            "accuracy_new": 0.0,
            "accuracy_held_out": 1 / 3,
            "flipped_reproduced": 1 / 2,
        }
    )


def reference_norm(model, pairs):
    """The norm of the mean of every example's own gradient, one after the other."""
    total = torch.zeros(0)
    for index in range(len(pairs)):
        model.zero_grad()
        pixels, label = pairs[index]["pixel_values"], pairs[index]["labels"]
        logits = model(pixel_values=pixels[None]).logits[0]
        (logits.exp().sum().log() - logits[label]).backward()
        kept = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        total = torch.cat(kept) if index == 0 else total + torch.cat(kept)
    model.zero_grad()
    return (total / len(pairs)).norm().item()


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_the_norm_is_that_of_the_mean_gradient(small_model, two_rounds, accelerator, batch_size):
    small_model.eval()
    small_model.timm_model.fc.bias.requires_grad_(False)
    old, new = two_rounds[1].seen, two_rounds[1].new
    sets = ExampleSets(new, held_out=new, old=old)
    found = measure_memorization(
        small_model, sets, accelerator, batch_size=batch_size, max_examples=20
    )
    for key, part in (("gradient_norm_old", old), ("gradient_norm_new", new)):
        kept = [part[i] for i in range(0, 60, 3)]
        assert found[key] == pytest.approx(reference_norm(small_model, kept), rel=1e-4)
    assert found["accuracy_new"] == found["accuracy_held_out"]


def test_nothing_old_in_a_first_round(accelerator):
    model = Linear([[1.0, 0.0], [0.0, 1.0]])
    found = measure_memorization(model, ExampleSets(NEW, held_out=OLD), accelerator)
    assert set(found) == {"accuracy_new", "gradient_norm_new", "accuracy_held_out"}


def test_features_are_those_before_the_classifier(small_model, two_rounds, accelerator):
    found = measure_memorization(
        small_model,
        ExampleSets(two_rounds[0].new, held_out=two_rounds[1].new),
        accelerator,
        batch_size=16,
        with_features=True,
    )
    seen = []
    last = small_model.timm_model.fc
    hook = last.register_forward_pre_hook(lambda _, given: seen.extend(*given))
    small_model.eval()
    for index in range(60):
        small_model(pixel_values=two_rounds[1].new[index]["pixel_values"][None])
    hook.remove()
    features = torch.stack(seen).detach().double()
    # The singular values are the roots of the eigenvalues of FFᵀ.
    values = torch.linalg.eigvalsh(features @ features.T).clamp(min=0).sqrt().numpy()
    shares = [value / values.sum() for value in values]
    entropy = -sum(share * np.log(share) for share in shares if share > 0)
    assert found["effective_rank"] == pytest.approx(np.exp(entropy), rel=1e-4)
    activity = [features[:, unit].abs().sum() / 60 for unit in range(features.shape[1])]
    mean = sum(activity) / len(activity)
    dormant = [one for one in activity if one <= 0.025 * mean]
    assert found["dormant_share"] == pytest.approx(len(dormant) / len(activity))


@pytest.mark.parametrize(("architecture", "size"), [("test_vit", None), ("test_convnext", 32)])
def test_other_families_have_features_too(architecture, size, accelerator):
    model = create_model(architecture, label_names=["a", "b"], image_size=size)
    side = model.config.pretrained_cfg["input_size"][-1]
    pairs = points([(torch.rand(3, side, side).tolist(), label) for label in (0, 1, 0)])
    sets = ExampleSets(new=pairs, held_out=pairs)
    found = measure_memorization(model, sets, accelerator, with_features=True)
    assert 1 <= found["effective_rank"] <= 3
    assert found["dormant_share"] == 0


def test_the_subset_is_evenly_spaced():
    assert spaced_indices(10, 4) == [0, 2, 5, 7]
    assert spaced_indices(3, 5) == [0, 1, 2] == spaced_indices(3, None)
    for limit in (1, 7, 99):
        kept = spaced_indices(100, limit)
        assert len(set(kept)) == limit
        gaps = np.diff([*kept, 100])
        assert gaps.max() - gaps.min() <= 1


def test_batch_norms_may_be_renewed(small_model, two_rounds, accelerator):
    # Filters of another length change what the batch norm behind them is given; only renewed
    # statistics undo it, and give the features of the model as it was.
    old, new = (round_.new for round_ in two_rounds)

    def measure(renew):
        return measure_memorization(
            small_model,
            ExampleSets(new, held_out=new, old=old),
            accelerator,
            batch_size=30,
            with_features=True,
            renew_batch_norms=renew,
        )

    before, stale_before = measure(True), measure(False)
    with torch.no_grad():
        filters = small_model.timm_model.conv1[0].weight
        filters.mul_(torch.linspace(1, 4, len(filters))[:, None, None, None])
    after, stale_after = measure(True), measure(False)
    assert after["effective_rank"] == pytest.approx(before["effective_rank"], rel=1e-3)
    assert stale_after["effective_rank"] != pytest.approx(stale_before["effective_rank"], rel=1e-2)


def test_no_trace_is_left(small_model, two_rounds, accelerator):
    small_model.train()
    small_model.timm_model.layer1.eval()
    small_model.timm_model.conv1[0].weight.requires_grad_(False)
    parameters = enumerate(small_model.parameters())
    kept = [torch.full_like(parameter, 7) if odd % 2 else None for odd, parameter in parameters]
    for parameter, gradient in zip(small_model.parameters(), kept, strict=True):
        parameter.grad = gradient
    fired = []
    handle = small_model.timm_model.fc.weight.register_post_accumulate_grad_hook(fired.append)
    before = state_of(small_model)
    modes = [module.training for module in small_model.modules()]
    frozen = [parameter.requires_grad for parameter in small_model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    old, new = (round_.new for round_ in two_rounds)
    measure_memorization(
        small_model,
        ExampleSets(new, held_out=new, old=old),
        accelerator,
        with_features=True,
        renew_batch_norms=True,
    )
    handle.remove()
    assert same_state(before, state_of(small_model))
    assert modes == [module.training for module in small_model.modules()]
    assert frozen == [parameter.requires_grad for parameter in small_model.parameters()]
    for parameter, gradient in zip(small_model.parameters(), kept, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or bool((gradient == 7).all())
    assert not fired
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"old": []}, ValueError, "old must hold at least one example, got none"),
        ({"flipped": []}, ValueError, "flipped must hold at least one example, got none"),
        ({"new": iter(NEW)}, TypeError, "new must be a map-style dataset, got list_iterator"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"max_examples": 0}, ValueError, "max_examples must be at least 1, got 0"),
        ({"with_features": True}, TypeError, "with_features needs a timm model"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message, accelerator):
    model = Linear([[1.0, 0.0], [0.0, 1.0]])
    sets = {"old": OLD, "new": NEW, "held_out": HELD_OUT}
    sets |= {name: changes.pop(name) for name in list(changes) if name in ("flipped", *sets)}
    with pytest.raises(error, match=message):
        measure_memorization(model, ExampleSets(**sets), accelerator, **changes)


def test_bad_models_and_labels_are_refused(small_model, accelerator):
    sets = ExampleSets(NEW, HELD_OUT)
    with pytest.raises(FloatingPointError, match="gradient over the new examples is not finite"):
        measure_memorization(Linear([[float("nan")] * 2] * 2), sets, accelerator)
    unknown = points([(np.zeros((3, 32, 32)).tolist(), n) for n in (0, 10)])
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 9 .* got labels from 0 to 10"):
        measure_memorization(small_model, ExampleSets(unknown, HELD_OUT), accelerator)
    frozen = Linear([[1.0, 0.0], [0.0, 1.0]]).requires_grad_(False)
    with pytest.raises(ValueError, match="model has no trainable parameter"):
        measure_memorization(frozen, sets, accelerator)
