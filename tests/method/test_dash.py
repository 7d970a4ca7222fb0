"""The whole shrink against the plain loops of ``reference.py``, and what must not change."""

import copy
import math
import signal

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import EveryLayer, heard, random_pairs, same_state, state_of
from torch import nn

import hf_dash
from hf_dash.method.loss import default_loss
from hf_dash.method.reference import published_pass_, reference_factors
from hf_dash.models import fresh_state


def pair_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def shrunk_against_reference(model, batches, **settings):
    """Shrink ``model``; return the largest error of the weights against the reference."""
    options = {k: settings[k] for k in ("alpha", "lam", "grouping") if k in settings}
    expected = reference_factors(model, batches, pair_loss, **options)
    before = state_of(model)
    hf_dash.dash_shrink_(model, batches, pair_loss, **{"tolerance": 0.0, **settings})
    errors = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in expected:
            wanted = before[name].double() * expected[name]
            errors.append((tensor.double() - wanted).abs().max().item())
        else:
            assert torch.equal(tensor, before[name]), name
    assert len(errors) == len(expected)
    return max(errors)


@pytest.mark.parametrize("grouping", ["kernel", "filter", "auto"])
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_every_kind_of_layer_equals_the_reference(every_layer, grouping, lam):
    error = shrunk_against_reference(every_layer, random_pairs(25), grouping=grouping, lam=lam)
    assert error <= 1e-6


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_other_alphas_equal_the_reference(every_layer, alpha):
    assert shrunk_against_reference(every_layer, random_pairs(4), alpha=alpha) <= 1e-6


def test_channels_last_memory_equals_the_reference(every_layer):
    model = every_layer.to(memory_format=torch.channels_last)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert shrunk_against_reference(model, random_pairs(5)) <= 1e-6
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_tensors_shrink_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu())

    batches = [(torch.randn(4, 10), torch.tensor([0, 1, 2, 3])) for _ in range(3)]
    assert shrunk_against_reference(Tied(), batches) <= 1e-6


def test_zero_vectors_equal_the_reference(every_layer):
    with torch.no_grad():
        every_layer.conv.weight[0] = 0  # w is zero, and with it the gradient of what follows
        every_layer.head.weight[3] = 0
        every_layer.head.bias.zero_()
    assert shrunk_against_reference(every_layer, random_pairs(3)) <= 1e-6


def test_tiny_gradients_equal_the_reference(every_layer):
    """Where ``torch.cosine_similarity`` would raise every norm to 1e-8."""
    scaled = lambda m, b: 1e-20 * pair_loss(m, b)  # noqa: E731
    before = copy.deepcopy(every_layer)
    hf_dash.dash_shrink_(before, random_pairs(3), pair_loss)
    hf_dash.dash_shrink_(every_layer, random_pairs(3), scaled)
    for left, right in zip(before.parameters(), every_layer.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_attention_equals_the_reference():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    batches = [(torch.randn(4, 5, 8), torch.tensor([0, 1, 2, 3])) for _ in range(3)]
    assert shrunk_against_reference(Attention(), batches) <= 1e-6


@pytest.mark.parametrize(
    ("name", "options"),
    [("test_resnet", {}), ("test_convnext", {}), ("test_vit", {"img_size": 32, "patch_size": 8})],
)
def test_bare_timm_models_equal_the_reference(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([1, 7])) for _ in range(2)]
    assert shrunk_against_reference(model, batches) <= 1e-6


def test_the_published_pass_comes_to_the_same():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    published, before = copy.deepcopy(model), copy.deepcopy(model)
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([1, 7, 0, 3])) for _ in range(3)]
    published_pass_(published, batches, pair_loss)
    hf_dash.dash_shrink_(model, batches, pair_loss, tolerance=0.0)
    assert not same_state(state_of(before), state_of(model))
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor, published.get_parameter(name), rtol=0, atol=1e-5)


def test_the_bounded_pass_differs_by_about_the_tolerance(every_layer):
    batches = random_pairs(60)
    whole, bounded = copy.deepcopy(every_layer), copy.deepcopy(every_layer)
    hf_dash.dash_shrink_(whole, batches, tolerance=0.0)
    report = hf_dash.dash_shrink_(bounded, batches, tolerance=1e-3)
    assert report.num_batches == 20
    pairs = zip(whole.parameters(), bounded.parameters(), every_layer.parameters(), strict=True)
    worst = max(((a - b).norm() / start.norm().clamp(min=1e-9)).item() for a, b, start in pairs)
    assert 0 < worst < 1e-2


def test_only_the_newest_batches_are_computed(every_layer):
    seen = []

    def loss_fn(model, batch):
        seen.append(batch)
        return pair_loss(model, batch)

    batches = random_pairs(30)
    report = hf_dash.dash_shrink_(every_layer, batches, loss_fn, num_batches=2)
    assert [images.sum() for images, _ in seen] == [images.sum() for images, _ in batches[-2:]]
    assert (report.num_batches, report.num_images) == (2, 16)


def test_wrapper_bare_and_prepared_model_shrink_alike(two_rounds, small_model):
    batches = list(hf_dash.data.gradient_batches(two_rounds[1], hf_dash.DashConfig()))
    bare = copy.deepcopy(small_model.timm_model)
    prepared = Accelerator(cpu=True).prepare(copy.deepcopy(small_model))
    hf_dash.dash_shrink_(small_model, batches)
    hf_dash.dash_shrink_(prepared, batches)
    hf_dash.dash_shrink_(bare, [(b["pixel_values"], b["labels"]) for b in batches])
    mapped = copy.deepcopy(bare)
    assert same_state(state_of(small_model), state_of(prepared))
    assert same_state(state_of(small_model.timm_model), state_of(bare))
    hf_dash.dash_shrink_(mapped, batches)  # a bare model takes mappings too
    assert not same_state(state_of(mapped), state_of(bare))


def test_autocast_of_the_accelerator_is_used(every_layer):
    types = []

    def loss_fn(model, batch):
        logits = model(batch[0])
        types.append(logits.dtype)
        return F.cross_entropy(logits.float(), batch[1])

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    hf_dash.dash_shrink_(every_layer, random_pairs(1), loss_fn, accelerator=accelerator)
    assert types == [torch.bfloat16]


def test_a_dry_run_reports_and_changes_nothing(every_layer):
    before = state_of(every_layer)
    dry = hf_dash.dash_shrink_(every_layer, random_pairs(3), dry_run=True)
    assert same_state(before, state_of(every_layer))
    assert dry.dry_run
    assert str(dry).startswith("DASH would shrink 106 vectors")
    wet = hf_dash.dash_shrink_(every_layer, random_pairs(3))
    assert dry.tensors == wet.tensors
    assert wet.mean_factor < 1
    for tensor in wet.tensors:
        assert 0.3 - 1e-6 <= tensor.min_factor <= tensor.mean_factor <= tensor.max_factor <= 1


def test_lam_one_changes_nothing_and_says_so(every_layer):
    before = state_of(every_layer)
    with pytest.warns(hf_dash.method.NoEffectWarning):
        hf_dash.dash_shrink_(every_layer, random_pairs(3), lam=1.0)
    assert same_state(before, state_of(every_layer))


def test_the_orthogonal_variant_makes_what_the_reference_shrinks_orthogonal(every_layer):
    expected = copy.deepcopy(every_layer)
    batches = random_pairs(5)
    factors = reference_factors(every_layer, batches, pair_loss)
    report = hf_dash.dash_shrink_(
        every_layer, batches, pair_loss, tolerance=0.0, variant="orthogonal"
    )
    assert report.config.variant == "orthogonal"
    assert "orthogonal variant)" in str(report).splitlines()[0]
    weight = expected.head.weight.double() * factors["head.weight"]
    shrunk_alone = expected.head.bias.double() * factors["head.bias"]
    torch.testing.assert_close(every_layer.head.bias.double(), shrunk_alone, rtol=0, atol=1e-6)
    found = every_layer.head.weight.double()
    # The same singular vectors, the leading ones of equal size: √(out / in).
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    inner = u.mT @ found @ vh.mT
    torch.testing.assert_close(inner, inner.diagonal().diag(), rtol=0, atol=1e-4)
    assert inner[0, 0].item() == pytest.approx(math.sqrt(10 / 4), rel=1e-3)


def test_the_orthogonal_variant_changes_nothing_where_the_shrink_fails(every_layer):
    before = state_of(every_layer)
    hf_dash.dash_shrink_(
        every_layer, random_pairs(2), pair_loss, variant="orthogonal", dry_run=True
    )
    assert same_state(state_of(every_layer), before)
    with torch.no_grad():
        every_layer.head.weight[0, 0] = float("inf")
    before = state_of(every_layer)
    with pytest.raises(FloatingPointError):
        hf_dash.dash_shrink_(every_layer, random_pairs(2), pair_loss, variant="orthogonal")
    assert same_state(state_of(every_layer), before)


def test_the_fill_variant_fills_what_the_reference_shrinks(tiny_timm):
    batches = random_pairs(4)
    factors = reference_factors(tiny_timm, batches, default_loss)
    before, fresh = state_of(tiny_timm), fresh_state(tiny_timm, 5)
    report = hf_dash.dash_shrink_(tiny_timm, batches, tolerance=0.0, variant="fill", seed=5)
    assert "fill variant)" in str(report).splitlines()[0]
    for name, tensor in state_of(tiny_timm).items():
        wanted = before[name].double()
        if name in factors:
            s, new = factors[name], fresh[name.removeprefix("timm_model.")]
            wanted = s * wanted + (1 - s**2) ** 0.5 * new
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=1e-5)


def test_the_fill_variant_refuses_other_models_before_any_batch_is_read(every_layer):
    def no_batches():
        raise AssertionError("a batch was asked for")
        yield

    before = state_of(every_layer)
    with pytest.raises(TypeError, match="variant 'fill' needs a timm model"):
        hf_dash.dash_shrink_(every_layer, no_batches(), variant="fill")
    assert same_state(state_of(every_layer), before)


def test_it_works_without_gradients_enabled(every_layer):
    other = copy.deepcopy(every_layer)
    hf_dash.dash_shrink_(other, random_pairs(2))
    with torch.no_grad():
        hf_dash.dash_shrink_(every_layer, random_pairs(2))
    assert same_state(state_of(other), state_of(every_layer))


def test_settings_come_one_by_one_or_at_once(every_layer):
    same, config = copy.deepcopy(every_layer), hf_dash.DashConfig(lam=0.1, num_batches=2)
    report = hf_dash.dash_shrink_(every_layer, random_pairs(4), config=config, alpha=0.5)
    other = hf_dash.dash_shrink_(same, random_pairs(4), lam=0.1, num_batches=2, alpha=0.5)
    assert report.config == other.config == hf_dash.DashConfig(0.5, 0.1, num_batches=2)
    assert same_state(state_of(every_layer), state_of(same))
    with pytest.raises(TypeError, match=r"dash_shrink_\(\) got unknown settings \['lamb'\]"):
        hf_dash.dash_shrink_(every_layer, random_pairs(1), lamb=0.1)
    assert same_state(state_of(every_layer), state_of(same))


def test_the_papers_preset_reads_everything(every_layer):
    report = hf_dash.dash_shrink_(every_layer, random_pairs(25), preset="paper")
    assert report.num_batches == 25


class TwoTasks(nn.Module):
    """A shared body with a head per task, and a teacher."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second = nn.Linear(192, 8), nn.Linear(8, 10), nn.Linear(8, 10)
        self.teacher = nn.Linear(8, 10)

    def forward(self, images):
        return self.first(self.body(images.flatten(1)))


def test_what_gets_no_gradient_stays_and_is_listed():
    model = TwoTasks()
    before = state_of(model)
    with heard() as messages:
        report = hf_dash.dash_shrink_(model, random_pairs(2), pair_loss)
    names = ("second.weight", "second.bias", "teacher.weight", "teacher.bias")
    assert report.no_gradient == names
    assert set(names) <= set(report.untouched)
    assert {name for name, t in state_of(model).items() if torch.equal(t, before[name])} == {*names}
    assert f"no gradient reached them: {', '.join(names)}" in str(report)
    assert report.to_dict()["no_gradient"] == list(names)
    assert any(m.startswith("DASH: 4 tensors got no gradient") for m in messages)


def test_where_most_weights_are_in_other_layers_the_user_is_told():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.mine, self.head = nn.Parameter(torch.randn(192, 8)), nn.Linear(8, 10)

        def forward(self, images):
            return self.head(images.flatten(1) @ self.mine)

    with heard() as messages:
        hf_dash.dash_shrink_(Own(), random_pairs(2), pair_loss)
    assert any(
        "94 % of the trained weights are in layers that do not shrink: mine" in m for m in messages
    )
    with heard() as messages:
        hf_dash.dash_shrink_(EveryLayer(), random_pairs(2), pair_loss)
    assert not any("do not shrink" in message for message in messages)


@pytest.mark.parametrize("options", [{}, {"variant": "orthogonal"}])
def test_ctrl_c_never_falls_between_two_tensors(every_layer, monkeypatch, options):
    expected = copy.deepcopy(every_layer)
    hf_dash.dash_shrink_(expected, random_pairs(2), **options)
    pressed = []

    name = "copy_" if options else "mul_"

    class Pressing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            if function.overloadpacket.__name__ == name and arguments[0].requires_grad:
                press_once()
            return function(*arguments, **(kwargs or {}))

    def press_once():
        if not pressed:
            pressed.append(1)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), Pressing():
        hf_dash.dash_shrink_(every_layer, random_pairs(2), **options)
    assert pressed
    assert same_state(state_of(expected), state_of(every_layer))


def test_a_norm_that_never_stops_training_is_left_as_it_was(every_layer):
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(True)

    every_layer.norm = Stubborn(8)
    before = state_of(every_layer)
    hf_dash.dash_shrink_(every_layer, random_pairs(2), dry_run=True)
    assert same_state(before, state_of(every_layer))
    assert every_layer.norm.training


def test_recurrent_layers_equal_the_reference():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 6, batch_first=True, num_layers=2, dropout=0.5)
            self.head = nn.Linear(6, 10)

        def forward(self, x):
            return self.head(self.lstm(x.mean(1))[0][:, -1])

    torch.manual_seed(0)
    model, before = Recurrent(), None
    before = copy.deepcopy(model)
    batches = random_pairs(3)
    gradient = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        loss = pair_loss(model.eval(), batch)
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, model.parameters()), strict=True
        ):
            gradient[name] = 0.7 * gradient[name] - 0.3 * g
    model.train()
    hf_dash.dash_shrink_(model, batches, pair_loss)
    assert model.lstm.training
    assert model.lstm.dropout == 0.5
    for name, weight in before.named_parameters():
        w, g = (t if t.ndim == 2 else t[None] for t in (weight, gradient[name]))
        wanted = F.cosine_similarity(w, g).clamp(0.3, 1)[:, None] * w
        torch.testing.assert_close(
            model.get_parameter(name), wanted.view_as(weight), atol=1e-6, rtol=0
        )


def test_it_is_refused_in_inference_mode(every_layer):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of inference_mode"):
        hf_dash.dash_shrink_(every_layer, random_pairs(1))


def _labels(batch, label):
    return (batch[0], torch.full_like(batch[1], label))


@pytest.mark.parametrize(
    ("batches", "settings", "error", "message"),
    [
        (random_pairs(1), {"alpha": 0}, ValueError, "alpha must be in"),
        (random_pairs(1), {"lam": 2}, ValueError, "lam must be in"),
        (random_pairs(1), {"num_batches": 0}, ValueError, "num_batches must be at least 1"),
        ([_labels(random_pairs(1)[0], 10)], {}, ValueError, "labels must lie in 0 … 9"),
        ([_labels(random_pairs(1)[0], -1)], {}, ValueError, "labels must lie in 0 … 9"),
        ([{"pixel_values": torch.zeros(1, 3, 8, 8)}], {}, ValueError, "batch has no labels"),
        ([], {}, ValueError, "batches must hold at least one minibatch"),
        ([(torch.full((2, 3, 8, 8), math.nan), torch.tensor([0, 1]))], {}, FloatingPointError, "0"),
        ([(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))], {}, RuntimeError, "channels"),
    ],
)
def test_bad_input_changes_nothing(every_layer, batches, settings, error, message):
    before = state_of(every_layer)
    with pytest.raises(error, match=message):
        hf_dash.dash_shrink_(every_layer, batches, **settings)
    assert same_state(before, state_of(every_layer))


def test_a_bare_model_takes_one_input_only():
    batch = {"a": torch.zeros(1), "b": torch.zeros(1), "labels": torch.tensor([0])}
    with pytest.raises(ValueError, match=r"takes the images alone, got \['a', 'b'\]"):
        default_loss(EveryLayer(), batch)


def test_data_parallel_is_refused_by_name(every_layer):
    with pytest.raises(NotImplementedError, match=r"under DataParallel: .* use DDP"):
        hf_dash.dash_shrink_(nn.DataParallel(every_layer), random_pairs(1))
