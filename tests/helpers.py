"""What tests share: small models, data, records, launches; nothing here reaches the network."""

import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from children import Child, join, run_launcher, run_launcher_with_forks, run_script
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.distributed import TCPStore
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hf_dash
from hf_dash import (
    Round,
)
from hf_dash.data import (
    ImageExamples,
    StreamedImages,
)
from hf_dash.history import RoundRecord
from hf_dash.runs.store import finish_round, save_trained

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


class EveryLayer(nn.Module):
    """One of each: 3×3, depthwise, 1×1, grouped transposed convolution, linear, norms, frozen."""

    num_classes = 10

    def __init__(self, norm: bool = True, groups: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.frozen = nn.Conv2d(6, 6, 1)
        self.frozen.requires_grad_(False)
        self.transposed = nn.ConvTranspose2d(6, 4, 2, groups=groups)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).relu()
        x = self.pointwise(self.depthwise(x)).relu()
        x = self.transposed(self.frozen(x))
        return self.head(self.dropout(x.mean((2, 3))))


class DeepSpeedEngine(nn.Module):
    """What of DeepSpeed's ZeRO-1 and 2 matters here: foreign hooks, and copies of the weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.optimizer = module, self
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(self.foreign_hook)
        self.refresh_fp32_params()

    def foreign_hook(self, parameter: Tensor) -> None:
        raise AssertionError("this gradient is none of DeepSpeed's business")

    def refresh_fp32_params(self) -> None:
        self.copies = [p.detach().clone() for p in self.module.parameters()]


def make_tiny_timm() -> PreTrainedModel:
    """Return a timm wrapper of a few hundred vectors, for images of 8×8."""
    return hf_dash.create_model(
        "resnet10t",
        label_names=[str(label) for label in range(10)],
        model_args={"layers": [1, 1, 0, 0], "channels": [4, 8, 8, 8], "stem_width": 4},
        image_size=32,
        seed=0,
    )


def random_pairs(count: int, size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return ``count`` minibatches of random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@contextmanager
def heard(level: int = logging.INFO) -> Iterator[list[str]]:
    """Collect the messages that hf_dash logs at ``level`` or above."""
    logger, handler, messages = logging.getLogger("hf_dash"), logging.Handler(), []
    handler.emit = lambda record: messages.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def nearby_state(model: nn.Module, scale: float = 0.1) -> dict[str, Tensor]:
    """Return a state near a model's own, as that of the checkpoint it began from."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Tell whether two states are bit-identical."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def hub_address() -> tuple[str, int]:
    """Return where this process and its children look for the Hub; nobody listens there yet."""
    host, _, port = os.environ["HF_ENDPOINT"].removeprefix("http://").partition(":")
    return host, int(port)


# For recipes: one epoch a round.
QUICK = ["--max_epochs", "1", "--disable_tqdm"]


def launch(
    recipe: str,
    folder: Path,
    *flags: str,
    check: bool = True,
    launcher: bool = True,
    fresh: bool = False,
    binary: bool = False,
    figures: bool = False,
    **environment: str,
) -> "subprocess.CompletedProcess[str]":
    """Run a recipe as a user does and return what it printed.

    ``accelerate launch`` runs in a forked child, and the recipe in a fork of that, which saves the
    seconds of their imports. With ``fresh=True`` the recipe is a fresh interpreter, and with
    ``binary=True`` both are. ``launcher=False`` runs the recipe alone, for what another test has
    launched; it draws no figures then unless ``figures=True``.
    """
    script = REPOSITORY / "recipes" / recipe
    if not binary:
        if launcher:
            run_it = run_launcher if fresh else run_launcher_with_forks
        else:
            run_it = run_script if figures else run_without_figures
        (done,) = join([Child(run_it, script, flags, folder=folder, **environment)])
        if check:
            done.check_returncode()
        return done
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    return subprocess.run(
        [*accelerate, str(script), *flags],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=check,
    )


def run_without_figures(path, flags):
    """Run a script without the figures of a model's folder, which take half of its time."""
    draw_no_figures()
    run_script(path, flags)


def draw_no_figures():
    """Write a text in place of the figures of a model's folder, in this process."""
    import hf_dash.report.export as export

    def draw(drawn, path):
        export.write_text(Path(path), "a figure")

    export.plot_rounds = export.plot_factors = draw


def run(world, cases, folder):
    """Run cases in ``world`` processes, started as torchrun does; return what each rank wrote."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [
        Child(
            *(run_script, TESTS / "process_worker.py", [str(folder), *cases]),
            folder=folder,
            **{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    done = join(ranks)
    files = [[folder / f"{case}.{rank}.json" for rank in range(world)] for case in cases]
    missing = [file.name for row in files for file in row if not file.exists()]
    assert not missing, f"{missing}: {[one.stderr[-5000:] for one in done]}"
    return {
        c: [json.loads(f.read_text()) for f in row] for c, row in zip(cases, files, strict=True)
    }


def png(level):
    """A gray 4×4 image whose level tells which one it is."""
    buffer = io.BytesIO()
    PILImage.new("L", (4, 4), level).save(buffer, "png")
    return buffer.getvalue()


def broken(level):
    """The same, cut off in the middle."""
    return png(level)[:50]


def write_parquet(path, images, labels, names=("cat", "dog"), image=None, label=None):
    features = Features({"image": image or Image(), "label": label or ClassLabel(names=names)})
    rows = {"image": [{"bytes": data, "path": None} for data in images], "label": labels}
    if image is not None:
        rows["image"] = images
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


FEATURES = Features({"image": Value("int64"), "label": ClassLabel(names=["a", "b"])})


def numbered(begin, end=None):
    """A dataset whose "image" is its number, counted as ``range`` does."""
    begin, end = (0, begin) if end is None else (begin, end)
    rows = {"image": list(range(begin, end)), "label": [i % 2 for i in range(begin, end)]}
    return Dataset.from_dict(rows, features=FEATURES)


def as_tensor(number):
    return torch.tensor([float(number)])


def broken_stream():
    def fail():
        raise OSError("opened")
        yield

    return IterableDataset.from_generator(fail, features=FEATURES)


def numbers(batches):
    return [batch["pixel_values"].flatten().int().tolist() for batch in batches]


def both(sizes, num_shards=1):
    """The same arrivals map-style and as streams."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [numbered(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    streams = [part.to_iterable_dataset(num_shards=min(num_shards, len(part))) for part in parts]
    return (
        Round(len(sizes), tuple(ImageExamples(part, as_tensor) for part in parts)),
        Round(len(sizes), tuple(StreamedImages(stream, as_tensor) for stream in streams)),
    )


def make_trainer(tmp_path, round_, callbacks=(), seed=0, **options):
    model = hf_dash.create_model(
        "test_resnet", label_names=[str(digit) for digit in range(10)], image_size=32
    )
    args = TrainingArguments(
        output_dir=str(tmp_path),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 16,
            "learning_rate": 0.01,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": seed,
            **options,
        },
    )
    return Trainer(model, args, train_dataset=round_.examples, callbacks=list(callbacks))


def trained(*arguments, **options):
    trainer = make_trainer(*arguments, **options)
    trainer.train()
    return state_of(trainer.model), trainer


class Spy(hf_dash.DashCallback):
    """Keeps the weights before and after the shrink."""

    def on_train_begin(self, *arguments, model, **kwargs):
        self.before = state_of(model)
        super().on_train_begin(*arguments, model=model, **kwargs)
        self.after = state_of(model)


def make_round(folder, index, *, start="dash", seed=None, parent=None, before=()):
    """A finished folder of a round, and its records."""
    names = [str(digit) for digit in range(10)]
    model = hf_dash.create_model(
        "test_resnet", label_names=names, image_size=32, seed=index if seed is None else seed
    )
    one = dataclasses.replace(
        record(start, 0, index, accuracy=0.5 + index / 100), parent=parent, weights_sha256=None
    )
    info = hf_dash.report.CardInfo(
        model_name="test_resnet on digits",
        records=[*before, one],
        settings={"lam": 0.3},
        dataset_name="digits",
        held_out_split="test",
        num_held_out=360,
        hub_model_id="user/model",
    )
    hf_dash.report.write_model_folder(model, folder, info)
    return hf_dash.read_history(folder / "history.json").records


def save_round(output_dir, model, optimizer_state, one, settings, previous=None):
    """Save a finished round as a run does, and return its record."""
    one = save_trained(output_dir, model, optimizer_state, one, settings)
    return finish_round(output_dir, dataclasses.replace(one, previous=previous), settings)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def log_of(hub, repo="user/model", revision="main"):
    return [commit.title for commit in hub.repositories[repo].log(revision)]


def tiny_vit(names=("cat", "dog")):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return ViTForImageClassification(config).eval()


def tiny_processor():
    return ViTImageProcessor(size={"height": 16, "width": 16})


# The report of a shrink of one tensor, as records hold it.
SHRINK = {
    "config": {"alpha": 0.3, "lam": 0.3, "grouping": "kernel"},
    "num_batches": 20,
    "num_images": 60,
    "seconds": 0.5,
    "mean_factor": 0.4,
    "share_at_lam": 0.2,
    "tensors": [
        {
            "name": "conv.weight",
            "num_vectors": 4,
            "mean_factor": 0.4,
            "min_factor": 0.3,
            "max_factor": 1.0,
            "share_at_lam": 0.2,
        }
    ],
}


def record(start="warm", seed=0, round_index=1, **changes):
    fields = {
        "num_new": 10,
        "num_total": 10 * round_index,
        "accuracy": 0.5,
        "per_class_accuracy": {"a": 0.4, "b": 0.6},
        "train_accuracy": 1.0,
        "converged": True,
        "epochs": 3,
        "steps": 30,
        "start_seconds": 0.5,
        "train_seconds": 2.0,
        "weights_sha256": "0" * 64,
    }
    return RoundRecord(start=start, seed=seed, round_index=round_index, **{**fields, **changes})


def files_below(folder):
    """Every file but locks, by its name below a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
