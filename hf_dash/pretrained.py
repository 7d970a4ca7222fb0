"""Pretrained weights that round 1 of every start begins from, with a fresh head for the data.

Flow: a timm name, a model folder or a Hub id → the weights below the classifier → a model for the
labels at hand, whose classifier alone is fresh; cold means that model again.
Differs from ``load_model``: the classifier of the checkpoint is never kept, even where it has as
many classes, so that every round-1 model of a seed is the same.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import Tensor
from transformers import PreTrainedModel

from hf_dash.models import (
    create_model,
    fresh_state,
    load_model,
    require_safetensors,
    save_model,
    timm_model_of,
)
from hf_dash.utils.files import sha256_of


@dataclass(frozen=True)
class CheckpointArguments:
    """Flags that name the checkpoint to begin round 1 from; see :func:`load_checkpoint`.

    Args:
        model_name_or_path: a model folder or a Hub id; None begins with fresh weights.
        model_revision: branch, tag or commit on the Hub.
        pretrained: ``model_name_or_path`` is timm's name of a pretrained model.

    Raises:
        ValueError: ``pretrained`` or a revision comes without ``model_name_or_path``.

    Example:
        >>> from hf_dash.pretrained import CheckpointArguments
        >>> CheckpointArguments().load() is None
        True
    """

    model_name_or_path: str | None = None
    model_revision: str | None = None
    pretrained: bool = False

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and (self.pretrained or self.model_revision):
            raise ValueError(
                "model_name_or_path must be given with pretrained or model_revision, got None"
            )

    def load(self) -> "Checkpoint | None":
        """Load the checkpoint; None where none is named."""
        if self.model_name_or_path is None:
            return None
        return load_checkpoint(
            self.model_name_or_path, pretrained=self.pretrained, revision=self.model_revision
        )


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a pretrained timm model, below its classifier.

    Args:
        name: for records: ``user/name@commit``, or the folder's own name.
        architecture: timm's name.
        model_args: for ``timm.create_model``.
        pretrained_cfg: how the checkpoint's images are prepared, such as ``mean`` and ``std``.
        state: tensors by timm's names.
        sha256: of the file they come from, or of the index of several.
    """

    name: str
    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    state: dict[str, Tensor] = field(repr=False)
    sha256: str

    def first_state(self, model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
        """Return the weights that a run begins with: the checkpoint's, and a fresh classifier.

        Args:
            model: a timm wrapper of the same architecture; only its config is read.
            seed: seed for the classifier.

        Raises:
            ValueError: the model is of another architecture.
        """
        fresh = fresh_state(model, seed)
        other = [n for n, t in self.state.items() if n not in fresh or fresh[n].shape != t.shape]
        if other:
            raise ValueError(
                f"checkpoint {self.name!r} is a {self.architecture!r}, the model a"
                f" {model.config.architecture!r}: they differ in {other[:3]}"
            )
        return {**fresh, **self.state}

    def create_model(
        self, label_names: list[str], *, image_size: int | None = None, seed: int = 0
    ) -> PreTrainedModel:
        """Return the checkpoint as a model for other classes, with a fresh classifier.

        Args:
            label_names: one name per class, all different.
            image_size: height and width of the input in pixels; by default the checkpoint's.
            seed: seed for the classifier.
        """
        size = image_size or int(self.pretrained_cfg["input_size"][-1])
        model = create_model(
            self.architecture,
            label_names=label_names,
            model_args=self.model_args,
            image_size=size,
            seed=seed,
        )
        for key in ("mean", "std", "interpolation"):
            model.config.pretrained_cfg[key] = self.pretrained_cfg[key]
        model.get_submodule("timm_model").load_state_dict(self.first_state(model, seed))
        return model


def load_checkpoint(
    name_or_path: str,
    *,
    pretrained: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Checkpoint:
    """Load a pretrained timm model to begin round 1 from; only safetensors are read.

    Args:
        name_or_path: a model folder or a Hub id; with ``pretrained`` timm's name of a model, such
            as ``"resnet50.a1_in1k"``, whose weights timm keeps on the Hub.
        pretrained: see above.
        revision: branch, tag or commit on the Hub.
        token: for private repositories.

    Raises:
        ValueError: timm knows no pretrained weights of that name, or they are not safetensors.
        TypeError: the checkpoint is not a timm model.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> model = hf_dash.create_model("test_resnet", label_names=["cat", "dog"], image_size=32)
        >>> folder = tempfile.mkdtemp()
        >>> hf_dash.save_model(model, folder)
        >>> checkpoint = hf_dash.pretrained.load_checkpoint(folder)
        >>> checkpoint.create_model(["a", "b", "c"]).config.num_labels
        3
    """
    if pretrained:
        name_or_path = _repository_of(name_or_path)
    weights = require_safetensors(name_or_path, revision=revision, token=token)
    model = load_model(name_or_path, revision=revision, token=token)
    timm_model, config = timm_model_of(model), model.config
    heads = classifier_prefixes(timm_model)
    is_local = Path(name_or_path).is_dir()
    commit = getattr(config, "_commit_hash", None) or revision or "main"
    return Checkpoint(
        name=Path(name_or_path).resolve().name if is_local else f"{name_or_path}@{commit}",
        architecture=config.architecture,
        model_args=dict(config.model_args or {}),
        pretrained_cfg=dict(timm.data.resolve_data_config(config.pretrained_cfg)),
        state={n: t for n, t in timm_model.state_dict().items() if not n.startswith(heads)},
        sha256=sha256_of(weights),
    )


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path, label_names: list[str]) -> None:
    """Write a checkpoint as a model folder, to shrink towards in later rounds.

    Args:
        checkpoint: what to write.
        folder: made where it does not exist.
        label_names: of the classes its fresh classifier is for.
    """
    save_model(checkpoint.create_model(label_names), folder)


def classifier_prefixes(timm_model: Any) -> tuple[str, ...]:
    """Return what the names of a timm model's classifier tensors begin with; often one prefix.

    Models with a distillation token have two classifiers.
    """
    classifier: Any = timm_model.get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    named = timm_model.named_modules()
    return tuple(f"{name}." for name, module in named if any(module is head for head in heads))


def _repository_of(name: str) -> str:
    """Return the Hub id where timm keeps the weights of one of its pretrained models."""
    settings = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    repo = getattr(settings, "hf_hub_id", None)
    if not repo:
        raise ValueError(
            f"model_name_or_path with pretrained must be one of timm's pretrained models, got"
            f" {name!r}"
        )
    tag = getattr(settings, "tag", "")
    full = f"{getattr(settings, 'architecture', name)}{'.' + tag if tag else ''}"
    return f"{repo.rstrip('/')}/{full}" if repo.rstrip("/") == "timm" else str(repo)
