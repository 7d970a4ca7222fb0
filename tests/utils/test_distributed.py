"""Several processes on the CPU against one; what each wrote to a file is judged."""

from pathlib import Path

import pytest
import torch
from helpers import EveryLayer, make_tiny_timm, nearby_state, random_pairs, run
from process_worker import memorization, train_by_sam

import hf_dash
from hf_dash.utils.distributed import (
    RankStatus,
    agree,
    mean_across_ranks_,
    num_processes,
    synchronize,
)

TESTS = Path(__file__).parent


FAILING = [
    "uneven_count",
    "uneven_size",
    "uneven_labels",
    "broken",
    "fsdp_uneven_count",
    "fsdp_broken",
]


FAILING += ["fsdp_filter_groups", "fsdp_variant", "tensor_parallel"]


TWO = [
    "bare",
    "ddp",
    "ddp_variant",
    "ddp_fill",
    "ddp_base",
    "fsdp_base",
    "ddp_no_batch_norm",
    "fsdp",
    "fsdp_filter",
    "trainer",
    *FAILING,
]


TWO_ONLY = ["memorization", "predict", "sam", "rounds", "accuracy_bound", "accuracy_unbound"]


TWO_ONLY += ["replay", "undisturbed", "undisturbed_stream", "dealt_map", "dealt_stream"]


FOUR = ["ddp", "ddp_no_batch_norm", "fsdp", "trainer"]


# In torch 2.6 fully_shard itself fails on the CPU ('Stream' has no 'record_event').
FSDP_ON_CPU = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)


needs_fsdp = pytest.mark.skipif(not FSDP_ON_CPU, reason="fully_shard needs torch 2.7 on the CPU")


def runnable(cases):
    return [case for case in cases if FSDP_ON_CPU or "fsdp" not in case]


def marked(cases):
    return [pytest.param(c, marks=needs_fsdp) if "fsdp" in c else c for c in cases]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return {
        1: run(1, ["ddp", "trainer"], tmp_path_factory.mktemp("one")),
        2: run(
            2,
            [*runnable(TWO), *TWO_ONLY],
            tmp_path_factory.mktemp("two"),
        ),
        4: run(4, runnable(FOUR), tmp_path_factory.mktemp("four")),
    }


def in_this_process(case):
    torch.manual_seed(0)
    model = EveryLayer(norm="batch_norm" not in case, groups=1 if "filter" in case else 2)
    grouping = "filter" if "filter" in case else "kernel"
    variant = "orthogonal" if "variant" in case else None
    if "fill" in case:
        model, variant = make_tiny_timm(), "fill"
    base = nearby_state(model) if "base" in case else None
    report = hf_dash.dash_shrink_(
        model, random_pairs(6), tolerance=0.0, grouping=grouping, variant=variant, base=base
    )
    return model, report


SUCCEEDING = [case for case in TWO if case not in FAILING]


WORLDS = [(1, "ddp"), (1, "trainer"), *((2, c) for c in SUCCEEDING), *((4, c) for c in FOUR)]


@pytest.mark.parametrize(
    ("world", "case"),
    [pytest.param(*pair, marks=needs_fsdp) if "fsdp" in pair[1] else pair for pair in WORLDS],
)
def test_several_processes_shrink_as_one_does(results, world, case):
    model, report = in_this_process(case)
    ranks = results[world][case]
    for rank in ranks:
        assert rank["world"] == world
        for found, expected in zip(rank["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(
                torch.tensor(found), expected.detach().flatten(), rtol=1e-5, atol=1e-7
            )
        assert rank["weights"] == ranks[0]["weights"]
        assert rank["report"]["num_images"] == 48
        for found, tensor in zip(rank["report"]["tensors"], report.tensors, strict=True):
            assert found["num_vectors"] == tensor.num_vectors
            assert found["name"].removeprefix("inner.") == tensor.name
            for number in ("mean_factor", "min_factor", "max_factor", "share_at_lam"):
                assert found[number] == pytest.approx(getattr(tensor, number), abs=1e-5)


def test_two_processes_train_by_sam_as_one_does(results, accelerator):
    model = train_by_sam(accelerator)
    for rank in results[2]["sam"]:
        assert rank["world"] == 2
        for found, expected in zip(rank["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(
                torch.tensor(found), expected.detach().flatten(), rtol=1e-5, atol=1e-6
            )


def test_one_all_reduce_in_all(results):
    for world in (1, 2, 4):
        expected = 0 if world == 1 else 1
        assert [rank["all_reduces"] for rank in results[world]["ddp"]] == [expected] * world


@needs_fsdp
def test_no_all_reduce_for_a_sharded_model(results):
    for world in (2, 4):
        assert [rank["all_reduces"] for rank in results[world]["fsdp"]] == [0] * world


def test_the_trainer_did_wrap_the_model(results):
    assert {rank["wrapped"] for rank in results[2]["trainer"]} == {"DistributedDataParallel"}


@pytest.mark.parametrize("case", marked(FAILING))
def test_what_goes_wrong_on_one_rank_stops_all_unchanged(results, case):
    if "broken" in case:
        errors = [
            "RuntimeError: the gradient pass failed on rank 1: FloatingPointError",
            "FloatingPointError: the loss of minibatch 2",
        ]
    elif case == "tensor_parallel":
        errors = ["NotImplementedError: hf_dash cannot shrink 'head.weight', sharded as"] * 2
    elif case == "fsdp_filter_groups":
        errors = ["NotImplementedError: hf_dash cannot cut 'transposed.weight' into filters"] * 2
    elif case == "fsdp_variant":
        errors = ["NotImplementedError: variant 'orthogonal' needs whole tensors, but FSDP2"] * 2
    else:
        errors = ["ValueError: every rank must pass the same number of batches"] * 2
    for rank, error in zip(results[2][case], errors, strict=True):
        assert rank["unchanged"]
        assert rank["all_reduces"] == 0
        if case == "fsdp_broken":
            # FSDP averages the gradients, so every rank sees that they are not finite.
            error = ("RuntimeError", "FloatingPointError")
        assert rank["error"].startswith(error)


def test_several_processes_measure_memorization_as_one_does(results, accelerator):
    expected = memorization(accelerator)
    assert len(expected) == 8
    for rank in results[2]["memorization"]:
        assert rank == pytest.approx(expected, rel=1e-5)


def test_all_processes_get_all_predictions_in_order(results):
    assert results[2]["predict"] == [[list(range(11)), list(range(-1, 10))]] * 2


@pytest.mark.parametrize("case", ["dealt_map", "dealt_stream"])
def test_two_processes_get_even_batches_of_a_round(results, case):
    first, second = results[2][case]
    for epochs in zip(first, second, strict=True):
        sizes = [[len(batch) for batch in batches] for batches in epochs]
        assert len(sizes[0]) == len(sizes[1]) == 2  # 13 images in steps of 2 × 4
        assert max(map(max, sizes)) - min(map(min, sizes)) <= 1
        dealt = sorted(number for batches in epochs for batch in batches for number in batch)
        # Of a stream Accelerate completes the last step, by an image of the first.
        assert sorted(set(dealt)) == list(range(13))
        assert len(dealt) == (13 if case == "dealt_map" else 14)
    assert first[0] != first[1]


def test_processes_share_one_ledger(results):
    first, second = results[2]["rounds"]
    assert first == second
    records = first["records"]
    assert [r["parent"] for r in records] == [None, "rounds/001/dash_seed0"]
    assert all(r["weights_sha256"] for r in records)
    assert records[1]["shrink"]["num_images"] == 64


def test_two_processes_draw_the_same_old_images(results):
    first, second = results[2]["replay"]
    assert first["drawn"] == second["drawn"]
    assert [one and one["num_drawn"] for one in first["drawn"]] == [None, 16, 16, 16]
    # 32 places of which a quarter are for new images, in 4 batches of 8 that two processes share.
    assert first["new"] == second["new"] == [2, 2]
    images = [
        tuple(image) for rank in (first, second) for batch in rank["batches"] for image in batch
    ]
    # Each of the 16 old images and 8 of the 16 new ones; 24 places are old images'.
    assert len(images) == 32
    assert len(set(images)) == 24


@pytest.mark.parametrize("case", ["accuracy_bound", "accuracy_unbound"])
def test_two_processes_stop_together_by_the_accuracy_of_both(results, case):
    first, second = results[2][case]
    assert first["logged"] == second["logged"]
    assert first["epoch"] == second["epoch"] == len(first["logged"])
    assert first["logged"][-1] >= 0.9 > max(first["logged"][:-1])
    for mine, other, accuracy in zip(first["right"], second["right"], first["logged"], strict=True):
        assert accuracy == pytest.approx((mine + other) / 32)
    assert first["right"] != second["right"]


@pytest.mark.parametrize("case", ["undisturbed", "undisturbed_stream"])
def test_two_processes_train_as_without_the_callback(results, case):
    for rank in results[2][case]:
        assert rank["world"] == 2
        assert rank["wrapped"] == "DistributedDataParallel"
        assert rank["steps"] > 3
        assert rank["moved"]
        assert (rank["same_notes"], rank["same_numbers"], rank["same_weights"]) == (True,) * 3


def test_one_process_needs_no_group():
    assert num_processes() == 1
    agree(RankStatus((4, 4)))
    tensor = torch.tensor([1.0, 3.0])
    assert mean_across_ranks_(tensor) is tensor
    assert tensor.tolist() == [1.0, 3.0]
    synchronize(torch.device("cpu"))
