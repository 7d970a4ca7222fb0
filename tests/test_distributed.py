"""Two processes on the CPU against one; each writes what it found to a file, which is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EveryLayer, random_pairs
from torch import nn

import hf_dash
from hf_dash.distributed import (
    RankStatus,
    agree,
    mean_across_ranks_,
    num_processes,
    refuse_unsupported,
    synchronise,
)

WORKER = """
import json, os, sys
import torch, torch.distributed as dist
from accelerate import Accelerator
from conftest import EveryLayer, random_pairs
import hf_dash

case, out = sys.argv[1:]
accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
reduces = []
all_reduce = dist.all_reduce
dist.all_reduce = lambda *a, **k: (reduces.append(1), all_reduce(*a, **k))[1]

torch.manual_seed(0)
model = EveryLayer()
batches = [(x[rank::world], y[rank::world]) for x, y in random_pairs(6)]
if case == "uneven count" and rank == 1:
    batches = batches[1:]
if case == "uneven size" and rank == 1:
    batches[2] = tuple(part[1:] for part in batches[2])
if case == "broken" and rank == 1:
    batches[2][0].fill_(float("nan"))
prepared = accelerator.prepare(model) if case == "prepared" else model
before = [p.detach().clone() for p in model.parameters()]
result = {"world": world}
try:
    report = hf_dash.dash_shrink_(prepared, batches, tolerance=0.0)
    result["num_images"] = report.num_images
except (ValueError, RuntimeError, FloatingPointError) as error:
    result["error"] = type(error).__name__ + ": " + str(error)
result["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
result["all_reduces"] = len(reduces)
result["weights"] = [p.flatten().tolist() for p in model.parameters()]
with open(f"{out}/{rank}.json.tmp", "w") as file:
    json.dump(result, file)
os.replace(f"{out}/{rank}.json.tmp", f"{out}/{rank}.json")
"""


def run_two(case, folder):
    """Run the worker in two processes and return what each wrote."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
    }
    # A gloo process sometimes aborts at exit with all its work done: the files tell, not the code.
    done = subprocess.run(
        [*launcher, str(script), case, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    found = sorted(folder.glob("*.json"))
    assert len(found) == 2, done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in found]


@pytest.mark.parametrize("case", ["bare", "prepared"])
def test_two_processes_shrink_as_one_does(case, tmp_path):
    torch.manual_seed(0)
    model = EveryLayer()
    hf_dash.dash_shrink_(model, random_pairs(6), tolerance=0.0)
    ranks = run_two(case, tmp_path)
    for rank in ranks:
        assert rank["world"] == 2
        assert rank["num_images"] == 48
        assert rank["all_reduces"] == 1
        for found, expected in zip(rank["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(
                torch.tensor(found), expected.detach().flatten(), rtol=0, atol=1e-6
            )
    assert ranks[0]["weights"] == ranks[1]["weights"]


@pytest.mark.parametrize(
    ("case", "errors"),
    [
        ("uneven count", ["ValueError: every rank must pass the same number"] * 2),
        ("uneven size", ["ValueError: every rank must pass the same number"] * 2),
        (
            "broken",
            [
                "RuntimeError: the gradient pass failed on rank 1: FloatingPointError",
                "FloatingPointError: the loss of minibatch 2",
            ],
        ),
    ],
)
def test_what_goes_wrong_on_one_rank_stops_all_unchanged(case, errors, tmp_path):
    for rank, error in zip(run_two(case, tmp_path), errors, strict=True):
        assert rank["error"].startswith(error)
        assert rank["unchanged"]
        assert rank["all_reduces"] == 0


def test_one_process_needs_no_group():
    assert num_processes() == 1
    agree(RankStatus((4, 4)))
    tensor = torch.tensor([1.0, 3.0])
    assert mean_across_ranks_(tensor) is tensor
    assert tensor.tolist() == [1.0, 3.0]
    synchronise(torch.device("cpu"))


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine"])
def test_sharded_models_are_refused_by_name(name):
    wrapped = type(name, (nn.Sequential,), {})(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=f"cannot shrink a model under {name}"):
        refuse_unsupported(nn.Sequential(wrapped))
    refuse_unsupported(nn.Linear(2, 2))
