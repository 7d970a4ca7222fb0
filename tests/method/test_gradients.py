import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import random_pairs, same_state, state_of
from torch import nn

from hf_dash.method.gradients import average_gradients
from hf_dash.method.loss import default_loss
from hf_dash.method.tensors import find_shrinkable


def average(model, batches, loss_fn=default_loss, alpha=0.3):
    tensors, _ = find_shrinkable(model)
    result = average_gradients(model, tensors, batches, loss_fn, alpha=alpha)
    return {t.name: part for t, part in zip(tensors, result.parts, strict=True)}, result


def test_the_average_of_two_gradients_by_hand():
    # loss = mean of w·x, so U = mean of x: 2, then 4.
    model = nn.Linear(1, 1, bias=False)
    batches = [
        (torch.tensor([[1.0], [3.0]]), torch.zeros(2)),
        (torch.tensor([[4.0]]), torch.zeros(1)),
    ]
    parts, result = average(model, batches, lambda m, b: m(b[0]).mean(), alpha=0.25)
    # G = 0.75 · (0.25 · −2) + 0.25 · −4 = −1.375
    assert parts["weight"].item() == pytest.approx(-1.375)
    assert result.batch_sizes == [2, 1]


@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0])
def test_the_average_of_many_gradients_by_plain_recursion(alpha):
    # U = mean of x, as above; at α = 0.9 the weights pass their largest after five minibatches.
    model = nn.Linear(1, 1, bias=False)
    values = [0.5, -2.0, 3.0, 1.0, -1.5, 2.5, 0.25, -3.0, 4.0, 1.25] * 8
    batches = [(torch.tensor([[value]]), torch.zeros(1)) for value in values]
    parts, _ = average(model, batches, lambda m, b: m(b[0]).mean(), alpha=alpha)
    expected = 0.0
    for value in values:
        expected = (1 - alpha) * expected + alpha * -value
    assert parts["weight"].item() == pytest.approx(expected)


def test_one_flat_buffer_of_the_size_of_the_shrinkable_tensors(every_layer):
    parts, _ = average(every_layer, random_pairs(1))
    storages = {part.untyped_storage().data_ptr() for part in parts.values()}
    assert len(storages) == 1
    size = sum(part.numel() for part in parts.values())
    assert next(iter(parts.values())).untyped_storage().nbytes() == 4 * size


def test_gradients_are_released_as_they_are_folded_in(every_layer):
    alive = []

    def loss_fn(model, batch):
        alive.append([name for name, p in model.named_parameters() if p.grad is not None])
        return default_loss(model, batch)

    average(every_layer, random_pairs(3), loss_fn)
    assert alive == [[], [], []]


def test_half_precision_weights_are_averaged_in_float32():
    model = nn.Linear(4, 2).to(torch.bfloat16)
    parts, _ = average(model, [(torch.ones(2, 4, dtype=torch.bfloat16), torch.tensor([0, 1]))])
    assert {part.dtype for part in parts.values()} == {torch.float32}
    parts, _ = average(
        nn.Linear(4, 2).double(), [(torch.ones(2, 4).double(), torch.tensor([0, 1]))]
    )
    assert {part.dtype for part in parts.values()} == {torch.float64}


def test_an_unused_tensor_has_gradient_zero():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    loss_fn = lambda m, b: F.cross_entropy(m["used"](b[0]), b[1])  # noqa: E731
    parts, result = average(model, [(torch.ones(2, 2), torch.tensor([0, 1]))], loss_fn)
    assert not parts["unused.weight"].any()
    assert dict(zip(parts, result.reached, strict=True)) == {
        "used.weight": True,
        "used.bias": True,
        "unused.weight": False,
        "unused.bias": False,
    }


@pytest.mark.parametrize("alpha", [1e-17, 1e-30])
def test_a_tiny_alpha_weighs_all_minibatches_alike(alpha):
    model = nn.Linear(1, 1, bias=False)
    batches = [(torch.tensor([[value]]), torch.zeros(1)) for value in (1.0, 2.0, 3.0)]
    parts, _ = average(model, batches, lambda m, b: m(b[0]).mean(), alpha=alpha)
    assert parts["weight"].item() == pytest.approx(-6.0 * alpha)


def test_a_gradient_that_is_zero_everywhere_is_refused(every_layer):
    with pytest.raises(ValueError, match="of 2 minibatches is zero everywhere"):
        average(every_layer, random_pairs(2), lambda m, b: 0 * default_loss(m, b))


def test_a_gradient_that_reaches_nothing_that_shrinks_is_refused(every_layer):
    loss_fn = lambda m, b: m.norm.weight.sum() + b[0].sum()  # noqa: E731
    with pytest.raises(ValueError, match="reached no tensor that can shrink"):
        average(every_layer, random_pairs(1), loss_fn)


def test_gradients_on_the_same_memory_add_up():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied = copy.deepcopy(model)
    tied[1].weight = tied[0].weight
    model.load_state_dict(tied.state_dict())
    model[1].weight = nn.Parameter(model[0].weight.data)
    batches = [(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), None)]
    loss_fn = lambda m, b: m(b[0]).square().mean()  # noqa: E731
    (expected, _), (found, _) = average(tied, batches, loss_fn), average(model, batches, loss_fn)
    torch.testing.assert_close(found["0.weight"], expected["0.weight"])


def test_the_pass_leaves_no_trace(every_layer):
    every_layer.train()
    every_layer.norm.eval()
    every_layer.conv.weight.grad = torch.ones_like(every_layer.conv.weight)
    kept_gradient = every_layer.conv.weight.grad
    before = state_of(every_layer)
    modes = {name: module.training for name, module in every_layer.named_modules()}
    required = {name: p.requires_grad for name, p in every_layer.named_parameters()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())

    def drawing_loss(model, batch):
        random.random(), np.random.rand(), torch.rand(5)
        return default_loss(model, batch)

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    average(every_layer, random_pairs(3), drawing_loss)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert same_state(before, state_of(every_layer))
    assert {name: m.training for name, m in every_layer.named_modules()} == modes
    assert {name: p.requires_grad for name, p in every_layer.named_parameters()} == required
    assert every_layer.conv.weight.grad is kept_gradient
    assert torch.equal(kept_gradient, torch.ones_like(kept_gradient))
    assert every_layer.head.weight.grad is None
    assert all(not p._post_accumulate_grad_hooks for p in every_layer.parameters())


def test_a_failure_leaves_no_trace_either(every_layer):
    every_layer.train()
    before = state_of(every_layer)

    def failing(model, batch):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        average(every_layer, random_pairs(1), failing)
    assert every_layer.training
    assert same_state(before, state_of(every_layer))
    assert all(not p._post_accumulate_grad_hooks for p in every_layer.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_minibatch(every_layer, bad):
    batches = random_pairs(4)
    batches[2][0][0, 0, 0, 0] = bad
    with pytest.raises(FloatingPointError, match=r"the loss of minibatch 2 \(of 4"):
        average(every_layer, batches)


def test_a_gradient_that_is_not_finite_is_refused(every_layer):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        loss = default_loss(model, batch)
        # sqrt has value 0 and an infinite slope at 0.
        return loss + (loss - loss.detach()).sqrt() if len(calls) == 2 else loss

    with pytest.raises(FloatingPointError, match="the gradient of one of the 3 minibatches"):
        average(every_layer, random_pairs(3), loss_fn)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda m, b: m(b[0]), ValueError, r"scalar, got a tensor of shape \(8, 10\)"),
        (lambda m, b: 1.0, TypeError, "must return a scalar tensor, got float"),
        (lambda m, b: torch.tensor(1.0), ValueError, "must return a loss that depends on"),
    ],
)
def test_a_loss_of_the_wrong_form_is_refused(every_layer, loss_fn, error, message):
    with pytest.raises(error, match=message):
        average(every_layer, random_pairs(1), loss_fn)


def test_no_minibatch_is_refused(every_layer):
    with pytest.raises(ValueError, match="batches must hold at least one minibatch, got none"):
        average(every_layer, [])
