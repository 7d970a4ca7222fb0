"""Fixtures shared by all tests; nothing here or below reaches the network or needs a GPU."""

import os
import socket
import subprocess
import sys
import tempfile

# The clients read the Hub's address at import: a port of this process's own, at which nobody
# listens until a test asks for ``hub``.
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    HUB_ADDRESS = free.getsockname()
os.environ["HF_ENDPOINT"] = "http://{}:{}".format(*HUB_ADDRESS)
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_dash_tests_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"
# Two test processes share the machine; results must not hang on the number of threads anyway.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from hub_double import TOKENS, HubDouble
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_dash

REPOSITORY = Path(__file__).parent.parent


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


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Tell whether two states are bit-identical."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# For recipes: one epoch a round.
QUICK = ["--max_epochs", "1", "--disable_tqdm"]


def launch(
    recipe: str,
    folder: Path,
    *flags: str,
    check: bool = True,
    launcher: bool = True,
    **environment: str,
) -> "subprocess.CompletedProcess[str]":
    """Run a recipe as a user does and return what it printed.

    ``launcher=False`` saves the seconds that ``accelerate launch`` takes to import itself: for
    recipes that another test has launched with it.
    """
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    command = accelerate if launcher else [sys.executable]
    return subprocess.run(
        [*command, str(REPOSITORY / "recipes" / recipe), *flags],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=check,
    )


@pytest.fixture
def tiny_timm() -> PreTrainedModel:
    return make_tiny_timm()


@pytest.fixture
def every_layer() -> EveryLayer:
    torch.manual_seed(0)
    model = EveryLayer()
    model(torch.randn(64, 3, 8, 8))  # batch norm gets statistics of its own
    return model


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state per process; every test gets its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A double of the Hub that the real clients find, with the token of its user ``user``."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", next(iter(TOKENS)))
    with HubDouble(HUB_ADDRESS) as double:
        yield double
    huggingface_hub.close_session()
    assert double.problems == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting before another attempt at the Hub, and little for an answer."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("hf_dash._hub_calls.TIMEOUT", 0.5)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return hf_dash.load_images("digits")


@pytest.fixture(scope="session")
def digits_test() -> Dataset:
    return hf_dash.load_images("digits", split="test")


@pytest.fixture
def small_model(digits: Dataset) -> nn.Module:
    """A small timm ResNet in the transformers wrapper."""
    return hf_dash.create_model(
        "test_resnet", label_names=hf_dash.label_names(digits), image_size=32, seed=0
    )


@pytest.fixture
def two_rounds(digits: Dataset, small_model: nn.Module) -> list[hf_dash.Round]:
    """Two rounds of 60 digits each."""
    arrived = hf_dash.in_arrival_order(digits, seed=0, num_examples=120)
    transform = hf_dash.image_transform(small_model)
    return list(hf_dash.cut_rounds(arrived, 2, transform, in_memory=True))


@pytest.fixture
def context(two_rounds):
    dash = hf_dash.DashConfig(gradient_batch_size=30)
    return hf_dash.StartContext(two_rounds[1], seed=5, dash=dash)
