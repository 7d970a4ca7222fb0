"""A step that is recorded and replayed: which batches it sees, and where it is refused.

A record is stood in for by the step itself, computed again over the same tensors, as a CUDA graph
does; that CUDA gives the same is for the tests that need a device.
"""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from helpers import state_of

import hf_dash
from hf_dash.training import loop, train_round
from hf_dash.training.recorded import WARM_UP, RecordedStep, check_recordable


class Recorder:
    """Keeps a step instead of computing it, as a recording does."""

    def __init__(self, *shape):
        self.shape, self.recorded, self.replayed = shape, 0, 0

    def __call__(self, step):
        self.recorded += 1
        result = torch.full(self.shape, torch.nan)

        def replay():
            self.replayed += 1
            result.copy_(step())

        return replay, result


def test_every_batch_is_computed_once_at_its_place():
    seen, record = [], Recorder()

    def step(batch):
        seen.append((batch["x"].tolist(), batch["x"].data_ptr()))
        return batch["x"].sum()

    recorded = RecordedStep(step, record)
    batches = [torch.full((3,), float(value)) for value in range(6)]
    sums = [float(recorded({"x": batch})) for batch in batches]
    assert sums == [3.0 * value for value in range(6)]
    assert [values for values, _ in seen] == [batch.tolist() for batch in batches]
    assert (record.recorded, record.replayed) == (1, 6 - WARM_UP)
    # A record reads where it was recorded, and writes over no caller's batch.
    (place,) = {place for _, place in seen[WARM_UP:]}
    assert place not in {batch.data_ptr() for batch in batches}
    assert [batch.tolist() for batch in batches] == [[value] * 3 for value in range(6)]


def test_every_shape_has_a_record_of_its_own():
    record = Recorder()
    recorded = RecordedStep(lambda batch: batch["x"].sum(), record)
    sizes = [4, 3] * 4
    assert [int(recorded({"x": torch.ones(size)})) for size in sizes] == sizes
    assert (record.recorded, record.replayed) == (2, 8 - 2 * WARM_UP)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim": "adamw", "lr_scheduler_type": "cosine", "warmup_epochs": 1},
        {"lr_milestones": [1], "sam_rho": 0.1},
    ],
    ids=["sgd", "adamw-cosine", "milestones-sam"],
)
def test_training_by_records_is_the_same(two_rounds, accelerator, monkeypatch, options):
    """Schedule and progress stay outside the record; float32 of the rate is all that differs."""

    def trained(**more):
        model = hf_dash.create_model("test_resnet", label_names="0123456789", image_size=32, seed=0)
        config = hf_dash.TrainingConfig(
            max_epochs=3, learning_rate=1e-3, disable_tqdm=True, **options, **more
        )
        batches = hf_dash.training.resident_batches(two_rounds[0], 20, seed=1)
        result = train_round(model, batches, config, accelerator)
        return state_of(model), result

    plain, expected = trained()
    record = Recorder(3)
    monkeypatch.setattr(loop, "check_recordable", lambda accelerator: None)
    monkeypatch.setattr(loop, "RecordedStep", lambda step: RecordedStep(step, record))
    recorded, result = trained(cuda_graphs=True)
    assert (result.steps, result.images) == (expected.steps, expected.images) == (9, 180)
    assert (record.recorded, record.replayed) == (1, 9 - WARM_UP)
    assert result.train_accuracy == expected.train_accuracy
    for name, value in plain.items():
        torch.testing.assert_close(recorded[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({}, "on cpu"),
        ({"device": "cuda", "num_processes": 2}, "with 2 processes"),
        ({"device": "cuda", "scaler": object()}, "with fp16"),
        ({"device": "cuda", "mode": "reduce-overhead"}, "mode 'reduce-overhead'"),
    ],
)
def test_where_nothing_can_be_recorded_it_is_refused(how, told):
    class Elsewhere:
        device = torch.device(how.get("device", "cpu"))
        num_processes = how.get("num_processes", 1)
        scaler = how.get("scaler")

        class state:  # noqa: N801
            dynamo_plugin = TorchDynamoPlugin(
                backend="inductor" if "mode" in how else "no", mode=how.get("mode", "default")
            )

    with pytest.raises(ValueError, match=f"cuda_graphs must be False .*{told}"):
        check_recordable(Elsewhere())


def test_a_run_refuses_before_anything_is_read():
    training = hf_dash.TrainingConfig(cuda_graphs=True)
    history = hf_dash.History(None, {})
    with pytest.raises(ValueError, match="cuda_graphs must be False on cpu"):
        hf_dash.runs.Run("warm", 0, history, Accelerator(cpu=True), training=training)
