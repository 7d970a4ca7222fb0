"""Every timm family: the fast shrink against the plain loops, on the smallest model of each.

``pytest -m slow -n 0 -s tests/test_families.py`` runs all of them and prints the table.
"""

import gc
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm_families import FAMILIES, WITHOUT

import hf_dash
from hf_dash.method.reference import reference_factors

DOZEN = [
    "byobnet",
    "convnext",
    "deit",
    "efficientnet",
    "ghostnet",
    "maxxvit",
    "mlp_mixer",
    "mobilenetv3",
    "nfnet",
    "regnet",
    "resnet",
    "vision_transformer",
]


# Vectors of each tensor that the plain loops check; all of a smaller tensor.
SAMPLE = 48


def loss_of(model, batch):
    for module in model.modules():
        # What evaluation keeps between calls would keep a graph already used up.
        if hasattr(module, "attention_bias_cache"):
            module.attention_bias_cache = {}
    return F.cross_entropy(model(batch[0]), batch[1])


def make(name, options):
    """Make a model and find the smallest input it takes; return both."""
    default = timm.get_pretrained_cfg(name).input_size[-1]
    refusals = []
    for size in (64, 128, 224, 256, default):
        torch.manual_seed(0)
        try:
            sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
            model = timm.create_model(name, num_classes=10, **sized, **options).eval()
            images = torch.randn(2, 3, size, size)
            if model(images).shape == (2, 10):
                return model, size
            refusals.append(f"{size}: its output is no logits")
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as refusal:
            refusals.append(f"{size}: {refusal}")
    raise NotImplementedError(refusals[-1])


def largest_error(model, size):
    """Shrink a model; return the largest relative error of a weight, and the vectors checked."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(2, 3, size, size, generator=generator), torch.tensor([label, 9 - label]))
        for label in (0, 3)
    ]
    expected = reference_factors(model, batches, loss_of, sample=SAMPLE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = hf_dash.dash_shrink_(model, batches, tolerance=0.0)
    assert {tensor.name for tensor in report.tensors} == set(expected)
    worst = 0.0
    for name, parameter in model.named_parameters():
        if name not in expected:
            assert torch.equal(parameter, before[name]), name
            continue
        checked = ~expected[name].isnan()
        wanted = (before[name].double() * expected[name])[checked]
        error = (parameter.detach().double()[checked] - wanted).abs()
        worst = max(worst, (error / wanted.abs().clamp(min=1e-30)).max().item())
    return worst, report


def check(module):
    """Return a row of the table: module, model, size, tensors, vectors, error or reason."""
    if module in WITHOUT:
        return [module, "", "", "", "", WITHOUT[module]]
    if module not in FAMILIES:
        return [module, "", "", "", "", "new in this timm, add its smallest model"]
    name, options = FAMILIES[module]
    if not timm.is_model(name):
        return [module, name, "", "", "", f"not in timm {timm.__version__}"]
    # Some models warn of their own use of torch; that is not what is tested here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, size = make(name, options)
        except NotImplementedError as reason:
            return [module, name, "", "", "", f"cannot be run: {reason}"]
        error, report = largest_error(model, size)
    gc.collect()
    counts = str(len(report.tensors)), str(report.num_vectors)
    return [module, name, str(size), *counts, f"{error:.1e}"]


@pytest.mark.parametrize("module", DOZEN)
def test_a_dozen_families_equal_the_reference(module):
    assert float(check(module)[-1]) <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_all_families_equal_the_reference():
    from hf_dash.report.markdown import markdown_table

    rows = [check(module) for module in timm.list_modules()]
    header = ["timm module", "smallest model", "input", "tensors", "vectors", "largest rel. error"]
    print("\n" + markdown_table(header, rows))
    ran = [row for row in rows if row[2]]
    assert [row for row in ran if not float(row[-1]) <= 1e-5] == []
    assert len(ran) >= 0.9 * len(rows)
