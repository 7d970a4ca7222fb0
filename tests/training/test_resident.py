"""Batches of images that stay on the device, against the loader's."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from helpers import heard, same_state, state_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as vision
from transformers.modeling_outputs import ImageClassifierOutput

import hf_dash
from hf_dash.data import RandomCropFlip, train_batches
from hf_dash.runs.continual import _Task, _tell_sizes
from hf_dash.training import ResidentBatches, resident_batches, train_round
from hf_dash.training.resident import crop_and_flip

BLACK = RandomCropFlip(fill=(-1.0, 0.5, 2.0), padding=2)


def equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in ("pixel_values", "labels"))


def test_batches_equal_the_loaders_in_every_epoch(two_rounds):
    loader = train_batches(two_rounds[1], 50, seed=3)
    resident = resident_batches(two_rounds[1], 50, seed=3)
    assert len(resident) == len(loader) == 3
    assert resident.pixels.dtype == torch.uint8
    for _ in range(3):
        pairs = list(zip(loader, resident, strict=True))
        assert len(pairs) == 3
        assert all(equal(*pair) for pair in pairs)


def test_batches_of_one_size_leave_out_others_in_every_epoch(two_rounds):
    loader = train_batches(two_rounds[1], 50, seed=3, drop_last=True)
    resident = resident_batches(two_rounds[1], 50, seed=3, drop_last=True)
    assert len(resident) == len(loader) == 2
    left_out = set()
    for _ in range(3):
        pairs = list(zip(loader, resident, strict=True))
        assert all(equal(*pair) for pair in pairs)
        assert [len(batch["labels"]) for _, batch in pairs] == [50, 50]
        images = torch.cat([batch["pixel_values"] for _, batch in pairs]).flatten(1)
        left_out.add(float(images.sum(dtype=torch.float64)))
    assert len(left_out) == 3


@pytest.mark.parametrize("options", [{}, {"channels_last": True, "sam_rho": 0.1}])
def test_training_on_them_is_the_same_to_the_bit(two_rounds, accelerator, options):
    found = []
    for make in (train_batches, resident_batches):
        model = hf_dash.create_model("test_resnet", label_names="0123456789", image_size=32, seed=0)
        config = hf_dash.TrainingConfig(max_epochs=2, disable_tqdm=True, **options)
        result = train_round(model, make(two_rounds[0], 30, seed=1), config, accelerator)
        found.append((state_of(model), result.train_accuracy))
    assert same_state(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_processes_share_what_one_would_read(two_rounds):
    whole = list(resident_batches(two_rounds[1], 10, seed=0, num_processes=2))
    assert len(whole) == 6
    (labels,) = [torch.cat([batch["labels"] for batch in whole])]
    second = list(resident_batches(two_rounds[1], 10, seed=0, num_processes=2, process_index=1))
    both = torch.cat([labels, *(batch["labels"] for batch in second)])
    expected = torch.tensor([row["labels"] for row in two_rounds[1].examples])
    assert both.sort().values.equal(expected.sort().values)


def test_views_are_those_of_the_images_one_by_one():
    images = torch.randn(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    views = torch.tensor([[0, 0, 0], [4, 4, 0], [2, 2, 1], [1, 3, 1], [4, 0, 0], [2, 2, 0]])
    for image, (top, left, flip), view in zip(
        images,
        views.tolist(),
        crop_and_flip(images, views, torch.tensor(BLACK.fill), 2),
        strict=True,
    ):
        expected = vision.crop(vision.pad(image, [2], fill=[*BLACK.fill]), top, left, 5, 4)
        assert torch.equal(view, vision.horizontal_flip(expected) if flip else expected)


def test_every_epoch_draws_other_views_by_its_seed():
    pixels = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    labels = torch.tensor([0, 1])

    def epochs(seed):
        batches = ResidentBatches(pixels, labels, 2, seed=seed, augment=BLACK)
        return [next(iter(batches))["pixel_values"] for _ in range(6)]

    assert all(map(torch.equal, epochs(0), epochs(0)))
    assert len({tuple(view.flatten().tolist()) for view in epochs(0)}) > 1
    assert not all(map(torch.equal, epochs(0), epochs(1)))


def test_pixels_are_normalized_batch_by_batch():
    pixels = torch.arange(4 * 3, dtype=torch.uint8).view(4, 3, 1, 1)
    batches = ResidentBatches(
        pixels, torch.arange(4), 2, seed=0, normalize=lambda batch: batch.float() / 2
    )
    for batch in batches:
        assert torch.equal(batch["pixel_values"], pixels[batch["labels"]].float() / 2)


class Small(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Flatten())
        self.head = nn.Linear(64, 10)

    def forward(self, pixel_values, labels):
        logits = self.head(self.layers(pixel_values))
        loss = nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class Waiting(TorchDispatchMode):
    """Counts what makes the host wait for the device: numbers read from it, or sent to it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "lift_fresh")
        self.count += any(name in str(function) for name in names)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("penalty", [None, lambda model: model.timm_model.fc.bias.sum().item() * 0])
def test_no_step_reads_a_number_from_the_device(two_rounds, accelerator, penalty):
    counts = []
    for size in (30, 10):  # 2 and 6 steps
        model = hf_dash.create_model("test_resnet", label_names="0123456789", image_size=32, seed=0)
        batches = resident_batches(two_rounds[0], size, seed=1, augment=RandomCropFlip((0.0,) * 3))
        config = hf_dash.TrainingConfig(max_epochs=1, disable_tqdm=True)
        with Waiting() as waiting:
            train_round(model, batches, config, accelerator, penalty=penalty)
        counts.append(waiting.count)
    assert counts[1] - counts[0] == (0 if penalty is None else 4)  # one a step, if a penalty reads


# Anew for the second size of batches, then for no size and no model; of one size, once.
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "drop_last", "times"), [("no", False, 2), ("bf16", True, 1)])
def test_compiled_once_for_all_rounds(two_rounds, monkeypatch, precision, drop_last, times):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plugin = SimpleNamespace(
        backend=DynamoBackend.EAGER,
        use_regional_compilation=False,
        to_kwargs=lambda: {"backend": backend},
    )
    found = []
    for dynamo in (accelerator.state.dynamo_plugin, plugin):
        monkeypatch.setattr(accelerator.state, "dynamo_plugin", dynamo)
        for round_ in (*two_rounds, *two_rounds):
            model = Small(seed=len(found) % 4)
            # 2 of 30 and 3 of 40 images, or 1 and 2 of 45.
            batches = resident_batches(round_, 45, seed=1, drop_last=drop_last)
            config = hf_dash.TrainingConfig(max_epochs=1, disable_tqdm=True)
            train_round(model, batches, config, accelerator)
            found.append((state_of(model), len(graphs)))
    for plain, compiled in zip(found[:4], found[4:], strict=True):
        assert same_state(plain[0], compiled[0])
    assert found[-1][1] == found[5][1] == times * found[4][1]


def test_a_run_trains_on_the_device(two_rounds, small_model, accelerator):
    found = []
    for on_device in (False, True):
        config = hf_dash.TrainingConfig(max_epochs=1, disable_tqdm=True, on_device=on_device)
        history = hf_dash.History(None, {})
        run = hf_dash.runs.Run("warm", 0, history, accelerator, training=config)
        model = copy.deepcopy(small_model)
        hf_dash.run_rounds(model, two_rounds, two_rounds[0].new, hf_dash.STARTS["warm"], run)
        found.append(state_of(model))
    assert same_state(*found)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_run_leaves_out_the_rest_and_says_so(two_rounds, small_model, accelerator, on_device):
    config = hf_dash.TrainingConfig(
        max_epochs=2, disable_tqdm=True, train_batch_size=25, drop_last=True, on_device=on_device
    )
    history = hf_dash.History(None, {})
    run = hf_dash.runs.Run("warm", 0, history, accelerator, training=config)
    with heard() as messages:
        hf_dash.run_rounds(
            small_model, two_rounds, two_rounds[0].new, hf_dash.find_start("warm"), run
        )
    assert [(r.steps, r.images_read) for r in history.records] == [(4, 100), (8, 200)]
    assert "every epoch leaves out 10 of 60 images, for batches of 25" in messages


@pytest.mark.parametrize(
    ("mode", "size", "drop_last", "told"),
    [
        ("reduce-overhead", 7, False, ["batches of 6 and 7 images"]),
        ("reduce-overhead", 7, True, []),
        ("reduce-overhead", 20, False, []),
        ("default", 7, False, []),
    ],
)
def test_two_sizes_of_recorded_graphs_are_told(
    two_rounds, accelerator, monkeypatch, mode, size, drop_last, told
):
    plugin = TorchDynamoPlugin(backend="eager", mode=mode)
    monkeypatch.setattr(accelerator.state, "dynamo_plugin", plugin)
    config = hf_dash.TrainingConfig(train_batch_size=size, drop_last=drop_last)
    run = hf_dash.runs.Run("warm", 0, hf_dash.History(None, {}), accelerator, training=config)
    with heard(logging.WARNING) as messages:
        _tell_sizes(_Task(run, None, None, two_rounds[0], 0))
    assert [message.partition(":")[0] for message in messages] == told


@pytest.mark.parametrize("name", ["on_device", "drop_last"])
def test_streams_are_refused_before_the_start(small_model, accelerator, two_rounds, name):
    config = hf_dash.TrainingConfig(**{name: True})
    run = hf_dash.runs.Run("warm", 0, hf_dash.History(None, {}), accelerator, training=config)
    transform = hf_dash.models.image_transform(small_model)
    stream = hf_dash.data.StreamedImages(
        two_rounds[0].new.dataset.to_iterable_dataset(), transform, num_examples=60
    )
    before = state_of(small_model)
    with pytest.raises(ValueError, match=f"{name} must be False for streams"):
        hf_dash.run_rounds(
            small_model, [hf_dash.Round(1, (stream,))], None, hf_dash.STARTS["warm"], run
        )
    assert same_state(before, state_of(small_model))
    with pytest.raises(ValueError, match="drop_last must be False for streams"):
        train_batches(hf_dash.Round(1, (stream,)), 30, seed=0, drop_last=True)


def test_bad_input_is_refused(two_rounds):
    with pytest.raises(ValueError, match="num_workers must be 0 with on_device, got 2"):
        hf_dash.TrainingConfig(on_device=True, num_workers=2)
    with pytest.raises(ValueError, match=r"augment must have one fill per channel, 3 here"):
        resident_batches(two_rounds[0], 30, seed=0, augment=RandomCropFlip((0.0,)))
