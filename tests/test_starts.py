import copy

import pytest
import timm
import torch
from conftest import same_state, state_of

import hf_dash
from hf_dash.dash import default_loss
from hf_dash.reference import reference_factors


@pytest.fixture
def context(two_rounds):
    dash = hf_dash.DashConfig(gradient_batch_size=30)
    return hf_dash.StartContext(two_rounds[1], seed=5, dash=dash)


def test_the_names_of_the_starts():
    assert set(hf_dash.STARTS) == {"cold", "warm", "dash"}
    assert hf_dash.find_start("cold") is hf_dash.STARTS["cold"]
    with pytest.raises(ValueError, match=r"start must be one of \['cold', 'dash', 'warm'\], got"):
        hf_dash.find_start("hot")


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
    assert hf_dash.find_start("warm")(small_model, context) is None
    assert same_state(before, state_of(small_model))


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
