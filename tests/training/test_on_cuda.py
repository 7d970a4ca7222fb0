"""What only a CUDA device can show: no step waits, one recording of a compiled step, bf16, sharing.

They run by ``pytest -m gpu``; everywhere else they are skipped.
"""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from helpers import state_of

import hf_dash
from hf_dash.data import RandomCropFlip, train_batches
from hf_dash.training import resident_batches, train_round

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CREATE = partial(
    hf_dash.create_model, "test_resnet", label_names="0123456789", image_size=32, seed=0
)

# What torch.compile says of its own parts, and of a precision that these tests compare with.
COMPILING = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method:DeprecationWarning",
    "ignore:TensorFloat32 tensor cores:UserWarning",
)

COMPILED = TorchDynamoPlugin(backend="inductor", mode="reduce-overhead")


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes an accelerator on the device; the other tests stay on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")

    def make(**options):
        accelerator = Accelerator(**options)
        assert accelerator.device.type == "cuda"
        return accelerator

    return make


def config_of(**options):
    # At the default rate rounding alone moves this network by 7 % within these steps.
    options = {"max_epochs": 2, "learning_rate": 1e-3, **options}
    return hf_dash.TrainingConfig(disable_tqdm=True, **options)


def trained(accelerator, round_, **options):
    model = CREATE().to(accelerator.device)
    config = config_of(**options)
    batches = resident_batches(round_, 30, seed=1, device=accelerator.device)
    result = train_round(model, batches, config, accelerator)
    return {name: tensor.cpu() for name, tensor in state_of(model).items()}, result


def moved(state, other):
    start = state_of(CREATE())
    weights = [name for name in state if name.endswith("weight")]
    apart = sum((state[n] - other[n]).float().square().sum() for n in weights)
    way = sum((other[n] - start[n]).float().square().sum() for n in weights)
    return float((apart / way).sqrt())


def test_batches_equal_those_of_the_cpu(two_rounds):
    on_cpu = train_batches(two_rounds[1], 50, seed=3)
    resident = resident_batches(two_rounds[1], 50, seed=3, device="cuda")
    for ours, expected in zip(resident, on_cpu, strict=True):
        torch.testing.assert_close(ours["pixel_values"].cpu(), expected["pixel_values"])
        assert torch.equal(ours["labels"].cpu(), expected["labels"])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_an_epoch_never_waits_for_the_device(on_gpu, two_rounds, monkeypatch):
    """CUDA itself says where the host waits; once an epoch the accuracy is read."""
    accelerator = on_gpu()
    augment = RandomCropFlip((0.0,) * 3)
    batches = resident_batches(two_rounds[0], 10, seed=1, augment=augment, device="cuda")
    model = CREATE().to("cuda")
    seen = []

    class Watched:
        def __iter__(self):
            for number, batch in enumerate(batches):
                # From the second step on: the first one sets cuDNN and the optimizer up.
                torch.cuda.set_sync_debug_mode("error" if number else "default")
                seen.append(number)
                yield batch
            torch.cuda.set_sync_debug_mode("default")

    try:
        config = hf_dash.TrainingConfig(max_epochs=2, disable_tqdm=True)
        train_round(model, Watched(), config, accelerator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 12


def test_a_fused_step_in_float32_is_that_of_the_cpu(on_gpu, two_rounds):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, _ = trained(on_gpu(), two_rounds[0])
    model, config = CREATE(), config_of()
    batches = train_batches(two_rounds[0], 30, seed=1)
    # Accelerate has one device per process, so here without it.
    optimizer = torch.optim.SGD(model.parameters(), config.learning_rate, momentum=0.9)
    model.train()
    for _ in range(config.max_epochs):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert moved(ours, state_of(model)) < 1e-3


RECORDED = [
    {},
    {"lr_scheduler_type": "cosine", "warmup_epochs": 1, "channels_last": True},
    {"optim": "adamw", "sam_rho": 0.1},
]


@pytest.mark.parametrize("options", RECORDED, ids=["sgd", "cosine", "adamw-sam"])
def test_recorded_as_a_whole_it_trains_alike(on_gpu, two_rounds, options):
    options = {"max_epochs": 4, **options}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        plain, expected = trained(on_gpu(), two_rounds[0], **options)
        recorded, result = trained(on_gpu(), two_rounds[0], cuda_graphs=True, **options)
    assert result.steps == expected.steps == 8
    assert moved(recorded, plain) < 1e-3


@COMPILING
def test_compiled_and_recorded_as_a_whole_it_trains_alike(on_gpu, two_rounds):
    plain, _ = trained(on_gpu(), two_rounds[0], max_epochs=4)
    accelerator = on_gpu()
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="inductor", mode="default")
    compiled, _ = trained(accelerator, two_rounds[0], max_epochs=4, cuda_graphs=True)
    assert moved(compiled, plain) < 1e-2


@COMPILING
def test_compiled_with_recorded_graphs_it_trains_alike(on_gpu, two_rounds):
    plain, _ = trained(on_gpu(), two_rounds[0])
    accelerator = on_gpu()
    accelerator.state.dynamo_plugin = COMPILED
    for options in ({}, {"sam_rho": 0.1}):
        compiled, result = trained(accelerator, two_rounds[0], drop_last=True, **options)
        assert result.steps == 4
        if not options:
            assert moved(compiled, plain) < 1e-2


def test_bfloat16_with_channels_last_trains_nearly_alike(on_gpu, two_rounds):
    half, _ = trained(on_gpu(mixed_precision="bf16"), two_rounds[0], channels_last=True)
    assert all(value.dtype != torch.bfloat16 for value in half.values())
    start = state_of(CREATE())
    assert not all(torch.equal(half[name], start[name]) for name in start)
    assert all(torch.isfinite(value).all() for value in half.values())


def test_momentum_is_kept_channels_last(on_gpu, two_rounds):
    """Kept contiguous, it goes on in a fused step over weights that are channels last."""
    accelerator, config = on_gpu(), config_of(channels_last=True, cuda_graphs=True)
    model, kept = CREATE().to(accelerator.device), None
    for round_ in two_rounds:
        batches = resident_batches(round_, 30, seed=1, device=accelerator.device)
        result = train_round(model, batches, config, accelerator, optimizer_state=kept)
        kept = result.optimizer_state
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_starts_share_the_device(on_gpu, two_rounds, tmp_path):
    training = hf_dash.TrainingConfig(max_epochs=1, disable_tqdm=True, on_device=True)
    accelerator = on_gpu()
    with hf_dash.runs.open_run(tmp_path, {}) as history:
        runs = [
            hf_dash.runs.Run(
                name, 0, history, accelerator, training=training, output_dir=str(tmp_path)
            )
            for name in ("warm", "dash")
        ]
        given = (two_rounds, two_rounds[0].new)
        hf_dash.runs.run_starts(CREATE, *given, runs, 2)
        for run in runs:
            hf_dash.run_rounds(CREATE(), *given, hf_dash.find_start(run.name), run)
    assert [record.hardware for record in history.records] == ["1 × cuda, fp32"] * 4
