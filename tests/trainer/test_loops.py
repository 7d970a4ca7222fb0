"""The callbacks for other training loops that trainer/README.md shows, where they are installed."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import REPOSITORY, same_state, state_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# What those libraries warn of is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")


def shown(heading):
    text = (REPOSITORY / "hf_dash" / "trainer" / "README.md").read_text()
    section = text.split(f"\n## {heading}\n")[1]
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1), names)
    return names["Dash"]


def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 12, generator=generator)
    return TensorDataset(images, torch.arange(32) % 3)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="not a dependency: run where installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head, self.seen = nn.Linear(12, 3), []

        def loss(self, batch):
            return F.cross_entropy(self.head(batch[0]), batch[1])

        def training_step(self, batch, index):
            self.seen.append(state_of(self.head))
            return self.loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0, momentum=0.9)

    module = Module()
    before = state_of(module.head)
    trainer = lightning.Trainer(
        max_steps=1,
        callbacks=[shown("Lightning")()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(data(), batch_size=8, shuffle=True))
    assert not same_state(before, module.seen[0])


def test_fastai():
    pytest.importorskip("fastai", reason="not a dependency: run where installed")
    import fastai.callback.progress  # noqa: F401  # gives learners no_bar()
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader as FastLoader
    from fastai.learner import Learner

    torch.manual_seed(0)
    model = nn.Linear(12, 3)
    before = state_of(model)
    loaders = DataLoaders(FastLoader(data(), bs=8), FastLoader(data(), bs=8), device="cpu")
    learner = Learner(loaders, model, loss_func=F.cross_entropy, cbs=[shown("fastai")()], lr=0.0)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    assert not same_state(before, state_of(model))
