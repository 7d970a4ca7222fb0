"""Fixtures that all tests share."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from commands import make_worlds
from datasets import Dataset
from helpers import EveryLayer, hub_address, make_tiny_timm
from hub_double import TOKENS, HubDouble
from torch import nn
from transformers import PreTrainedModel

import hf_dash


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
    with HubDouble(hub_address()) as double:
        yield double
    huggingface_hub.close_session()
    assert double.problems == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting before another attempt at the Hub, and little for an answer."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("hf_dash.hub.client.TIMEOUT", 0.5)


@pytest.fixture(params=["forked", pytest.param("fresh", marks=pytest.mark.slow)])
def fresh(request: pytest.FixtureRequest) -> bool:
    """Whether ``accelerate launch`` starts a recipe as a fresh interpreter, or as a fork."""
    return request.param == "fresh"


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A world of each of the four commands; copy it before use."""
    return make_worlds(tmp_path_factory.mktemp("worlds"))


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
        "test_resnet", label_names=hf_dash.data.label_names(digits), image_size=32, seed=0
    )


@pytest.fixture
def two_rounds(digits: Dataset, small_model: nn.Module) -> list[hf_dash.Round]:
    """Two rounds of 60 digits each."""
    arrived = hf_dash.data.in_arrival_order(digits, seed=0, num_examples=120)
    transform = hf_dash.models.image_transform(small_model)
    return list(hf_dash.data.cut_rounds(arrived, 2, transform, in_memory=True))


@pytest.fixture
def context(two_rounds):
    dash = hf_dash.DashConfig(gradient_batch_size=30)
    return hf_dash.StartContext(two_rounds[1], seed=5, dash=dash)
