"""Create, load and save image classifiers of timm and transformers, and add classes to them.

Flow: architecture and label names → ``TimmWrapperForImageClassification`` with timm's own
initialization → a folder that transformers, its pipeline and timm can all load. Any other image
classifier of transformers is loaded and saved in the layout of transformers.
Differs from ``TimmWrapperForImageClassification(config)``: transformers fills every convolution and
linear layer with N(0, 0.02); here timm's own initialization is restored. Only safetensors are
loaded; weights in any other format are refused before they are read.
"""

import copy
import difflib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import PIL
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from hf_dash.hub.client import model_folder
from hf_dash.model_config import check_config
from hf_dash.transforms import ImageTransform, split_transform
from hf_dash.utils.files import files_written_aside
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)

NAMES = ("model.safetensors", "model.safetensors.index.json")


def require_safetensors(
    name_or_path: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Check that a model's weights are safetensors, downloading them if they are on the Hub.

    Call it before transformers, which would ask a Hub service to convert other formats.

    Args:
        name_or_path: a folder or a repository id.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept.
        token: for private repositories.

    Returns:
        The file with the weights, or with the index of several.

    Raises:
        ValueError: the weights are not safetensors.
    """
    return _weights_in(model_folder(name_or_path, revision, cache_dir, token), name_or_path)


def _weights_in(folder: Path, name_or_path: str) -> Path:
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{name_or_path!r} holds no {NAMES[0]}: only safetensors are loaded, because weights in"
        " other formats, such as pytorch_model.bin, can run code; save the model as safetensors"
    )


def weight_files(name_or_path: str, *, revision: str | None = None) -> list[Path]:
    """Return the safetensors files of a model, downloading them if they are on the Hub.

    Args:
        name_or_path: a folder or a repository id.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: the weights are not safetensors.
    """
    first = require_safetensors(name_or_path, revision=revision)
    if first.suffix != ".json":
        return [first]
    index = json.loads(first.read_text(encoding="utf-8"))
    return [first.parent / name for name in sorted({str(n) for n in index["weight_map"].values()})]


# The PIL mode for each number of channels, as timm's transforms read images.
IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
WIDE_AND_HIGH = ((64, 48), (48, 80))


def create_model(
    architecture: str,
    *,
    label_names: list[str],
    model_args: dict[str, Any] | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Create an untrained timm model in the transformers wrapper.

    Args:
        architecture: a timm model name, such as ``"resnet18"``.
        label_names: one name per class, all different; they go into the config.
        model_args: for ``timm.create_model``, such as ``{"in_chans": 1}``.
        image_size: height and width of the input in pixels; the architecture's own by default.
        seed: seed for the initialization; the global random state is left alone.

    Raises:
        ValueError: timm does not know the architecture, label names are missing or repeated, or
            ``model_args`` holds ``num_classes``.

    Example:
        >>> create_model("test_resnet", label_names=["cat", "dog"], image_size=32).config.id2label
        {0: 'cat', 1: 'dog'}
    """
    if not timm.is_model(str(architecture)):
        close = difflib.get_close_matches(str(architecture), timm.list_models(), n=3)
        raise ValueError(
            f"architecture {architecture!r} is not known to timm; close names: {close}"
        )
    if not label_names or len(set(label_names)) != len(label_names):
        raise ValueError(f"label_names must be different and at least one, got {label_names}")
    model_args = dict(model_args or {})
    if "num_classes" in model_args:
        raise ValueError("model_args must not hold num_classes: label_names give it")
    defaults = timm.get_pretrained_cfg(architecture)
    default_size = defaults.input_size if defaults is not None else (3, 224, 224)
    if image_size is not None and defaults is not None and defaults.fixed_input_size:
        model_args["img_size"] = image_size
    size = (image_size, image_size) if image_size is not None else default_size[1:]
    config = TimmWrapperConfig(  # type: ignore[call-arg]  # fields that it takes by name only
        architecture=architecture,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        model_args=model_args,
        pretrained_cfg={
            "input_size": [model_args.get("in_chans", 3), *size],
            "interpolation": getattr(defaults, "interpolation", "bicubic"),
            # No crop: the model trains on whole images.
            "crop_pct": 1.0,
            "crop_mode": "center",
            **_normalization(defaults, model_args.get("in_chans", 3)),
        },
    )
    with torch.random.fork_rng(devices=[]):
        model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(fresh_state(model, seed))
    return model


def _normalization(defaults: Any, channels: int) -> dict[str, list[float]]:
    mean, std = (getattr(defaults, name, (0.5, 0.5, 0.5)) for name in ("mean", "std"))
    if len(mean) != channels:
        mean, std = (0.5,) * channels, (0.5,) * channels
    return {"mean": list(mean), "std": list(std)}


def fresh_state(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Return the weights of a new timm model of the same architecture, as timm initializes it.

    Args:
        model: a timm wrapper; only its config is read.
        seed: seed for the initialization; the global random state is left alone.
    """
    config = model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = timm.create_model(
            config.architecture, num_classes=config.num_labels, **(config.model_args or {})
        )
    state: dict[str, Tensor] = fresh.state_dict()
    return state


def model_labels(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's classes, in the order of its logits."""
    names = cast("dict[int, str]", model.config.id2label)
    return [names[index] for index in range(len(names))]


def is_timm(model: nn.Module) -> bool:
    """Check whether a model is a timm wrapper."""
    return getattr(model, "timm_model", None) is not None


def timm_model_of(model: PreTrainedModel) -> Any:
    """Return the timm model inside a wrapper.

    Raises:
        TypeError: the model is not a timm wrapper.
    """
    if not is_timm(model):
        raise TypeError(f"model must be a timm wrapper, got {type(model).__name__}")
    return model.timm_model


def grow_head(
    model: PreTrainedModel, new_names: Sequence[str], *, seed: int
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a model with more classes: old weights are kept, new classifier rows are fresh.

    Args:
        model: a timm wrapper; not changed.
        new_names: names of the classes to add after the old ones, all different and unknown so far.
        seed: seed for the new rows, which come from a fresh model of the new size.

    Returns:
        The grown model, on the device of the old one, and the new rows by name: the tensors of
        ``model.timm_model`` that end with them.

    Raises:
        ValueError: there is no new name, or one is repeated or already known.
        NotImplementedError: the architecture's classifier does not have one row per class.

    Example:
        >>> model = create_model("test_resnet", label_names=["cat", "dog"])
        >>> grown, rows = grow_head(model, ["owl"], seed=0)
        >>> model_labels(grown), {name: len(fresh) for name, fresh in rows.items()}
        (['cat', 'dog', 'owl'], {'fc.weight': 1, 'fc.bias': 1})
    """
    names = model_labels(model)
    if not new_names or len({*names, *new_names}) != len(names) + len(new_names):
        raise ValueError(
            f"new_names must be at least one, different and none of {names}, got {list(new_names)}"
        )
    config = copy.deepcopy(cast(TimmWrapperConfig, model.config))
    config.num_labels = len(names) + len(new_names)
    config.id2label = dict(enumerate([*names, *new_names]))
    config.label2id = {name: index for index, name in config.id2label.items()}
    with torch.random.fork_rng(devices=[]):
        grown = TimmWrapperForImageClassification(config)
    state, rows = fresh_state(grown, seed), {}
    for name, old in model.get_submodule("timm_model").state_dict().items():
        fresh = state[name]
        if fresh.shape == old.shape:
            state[name] = old
        elif (len(old), *fresh.shape[1:]) == tuple(old.shape) and len(old) == len(names):
            rows[name] = fresh[len(names) :]
            state[name] = torch.cat([old, rows[name].to(old)])
        else:
            raise NotImplementedError(
                f"the classifier of {config.architecture!r} cannot grow: {name!r} would change from"
                f" {tuple(old.shape)} to {tuple(fresh.shape)}"
            )
    grown.timm_model.load_state_dict(state)
    shown = ", ".join(new_names)
    logger.warning("head grows %d → %d: %s", len(names), config.num_labels, shown)
    grown.to(model.device)  # type: ignore[arg-type]  # transformers wraps it without its types
    return grown.train(model.training), rows


def black_pixel(model: PreTrainedModel) -> tuple[float, ...]:
    """Return black as the model sees it: the normalized value of 0 for each channel.

    Args:
        model: a timm wrapper whose config has a ``pretrained_cfg``.

    Raises:
        ValueError: the config has no ``pretrained_cfg``.
    """
    data_config = timm.data.resolve_data_config(_pretrained_cfg(model))
    return tuple(-m / s for m, s in zip(data_config["mean"], data_config["std"], strict=True))


def architecture_of(model: PreTrainedModel) -> str:
    """Return timm's name for a wrapped architecture, else the model type, such as ``"vit"``."""
    config = model.config
    return str(config.architecture if is_timm(model) else config.model_type)


def load_model(
    name_or_path: str,
    label_names: Sequence[str] | None = None,
    *,
    ignore_mismatched_sizes: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Load an image classifier that knows all classes in ``label_names``; reads only safetensors.

    Known classes keep their indices. If there are new ones, a timm wrapper's head grows by
    :func:`grow_head`. With ``ignore_mismatched_sizes`` any model gets a completely fresh head of
    the new size instead, as in transformers' scripts. That head knows the old classes too, unless
    the data contain none of them: then it knows only the classes of the data, and if the sizes
    happen to match, the weights stay and only the names change.

    Args:
        name_or_path: a folder or a repository id.
        label_names: classes of the data, matched by name; None takes the model as it is.
        ignore_mismatched_sizes: see above.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept.
        token: for private repositories.
        seed: seed for new rows.

    Raises:
        ValueError: the weights are not safetensors; or there are new classes, the model is not a
            timm wrapper, and ``ignore_mismatched_sizes`` is not set.
        NotImplementedError: the classifier of a timm wrapper cannot grow.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hf_dash
        >>> with TemporaryDirectory() as folder:
        ...     cats = hf_dash.create_model("test_resnet", label_names=["cat", "dog"])
        ...     hf_dash.save_model(cats, folder)
        ...     hf_dash.load_model(folder, ["dog", "owl"]).config.id2label
        {0: 'cat', 1: 'dog', 2: 'owl'}
    """
    folder = model_folder(name_or_path, revision, cache_dir, token)
    _weights_in(folder, name_or_path)
    check_config(folder / "config.json")
    load = partial(_from_folder, folder, name_or_path)
    model = load()
    known = model_labels(model)
    new = [name for name in label_names or () if name not in known]
    if not new:
        return model
    if not ignore_mismatched_sizes:
        if not is_timm(model):
            raise ValueError(
                f"label_names has {new}, which the {architecture_of(model)} model"
                f" {name_or_path!r} does not know; set ignore_mismatched_sizes for a fresh head"
            )
        return grow_head(model, new, seed=seed)[0]
    names = new if len(new) == len(label_names or ()) else [*known, *new]
    logger.warning("fresh head of %d classes: %s", len(names), ", ".join(names))
    return load(
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )


def _from_folder(folder: Path, name: str, **changes: Any) -> PreTrainedModel:
    """Load a model from a folder, under the name it was asked for by."""
    options = {"use_safetensors": True, "trust_remote_code": False, **changes}
    model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(str(folder), **options)
    model.config._name_or_path = name
    if str(folder) != name:  # fetched: the folder is named by the commit
        model.config._commit_hash = folder.name
    return model


def image_transform(model: PreTrainedModel, image_processor: Any | None = None) -> ImageTransform:
    """Return a model's evaluation transform: resize, crop, scale, normalize; no augmentation.

    Args:
        model: a timm wrapper, whose config defines the transform, or another image classifier.
        image_processor: required for a model that is not a timm wrapper.

    Raises:
        ValueError: the model needs an image processor and none is given, or the processor makes
            images of different sizes.

    Example:
        >>> model = create_model("test_resnet", label_names=["cat", "dog"], image_size=32)
        >>> image_transform(model)(Image.new("RGB", (100, 80))).shape
        torch.Size([3, 32, 32])
    """
    if is_timm(model):
        return _timm_transform(model)
    if image_processor is None:
        raise ValueError(
            f"image_processor must be given for a model of type {model.config.model_type!r}"
        )

    def processed(image: Image.Image) -> Tensor:
        pixels: Tensor = image_processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    if getattr(image_processor, "do_resize", True):
        wide, high = (tuple(processed(Image.new("RGB", size)).shape) for size in WIDE_AND_HIGH)
        if wide != high:
            raise ValueError(
                f"image_processor must give every image the same size, but"
                f" {type(image_processor).__name__} with size {dict(image_processor.size)} makes"
                f" {wide} of a wide one and {high} of a high one: set do_center_crop and"
                " crop_size, or height and width, in its preprocessor_config.json"
            )
    return ImageTransform(processed, "RGB", "the image processor takes 'RGB'")


def _timm_transform(model: PreTrainedModel) -> ImageTransform:
    data_config = timm.data.resolve_data_config(_pretrained_cfg(model))
    transform = timm.data.create_transform(**data_config, is_training=False)
    channels = data_config["input_size"][0]
    mode = IMAGE_MODES.get(channels)
    takes = f"the model takes {channels} channels ({mode!r})"
    pixels, normalize = split_transform(transform, mode)
    key = f"{pixels} {mode}, timm {timm.__version__}, Pillow {PIL.__version__}"
    return ImageTransform(pixels, mode, takes, normalize, key if normalize else None)


def _pretrained_cfg(model: PreTrainedModel) -> Any:
    pretrained_cfg = getattr(model.config, "pretrained_cfg", None)
    if pretrained_cfg is None:
        raise ValueError(
            "the model's config has no pretrained_cfg, so its input size and normalization are"
            " unknown"
        )
    return pretrained_cfg


def save_model(
    model: PreTrainedModel, folder: str | Path, image_processor: Any | None = None
) -> None:
    """Save a model: a timm wrapper in timm's layout, any other with its image processor.

    Files are written aside and moved into place once they are complete.

    Args:
        model: an image classifier of transformers.
        folder: created if necessary; other files in it stay.
        image_processor: saved with a model that is not a timm wrapper.

    Raises:
        TypeError: ``model`` is not a transformers model.

    Example:
        >>> import os
        >>> from tempfile import TemporaryDirectory
        >>> import hf_dash
        >>> with TemporaryDirectory() as folder:
        ...     model = hf_dash.create_model("test_resnet", label_names=["cat", "dog"])
        ...     hf_dash.save_model(model, folder)
        ...     sorted(os.listdir(folder))
        ['config.json', 'model.safetensors']
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be an image classifier of transformers, got {type(model).__name__}"
        )
    with files_written_aside(Path(folder)) as aside:
        if is_timm(model):
            _save_timm(model, aside)
            return
        model.save_pretrained(aside)
        if image_processor is not None:
            image_processor.save_pretrained(aside)


def _save_timm(model: PreTrainedModel, aside: Path) -> None:
    """Write timm's own layout, which both transformers and timm can load."""
    timm_model, config = timm_model_of(model), model.config
    native = {
        "architecture": config.architecture,
        "num_classes": config.num_labels,
        "num_features": timm_model.num_features,
        "label_names": model_labels(model),
        "model_args": config.model_args or {},
        "pretrained_cfg": config.pretrained_cfg,
    }
    state = {name: tensor.contiguous() for name, tensor in timm_model.state_dict().items()}
    (aside / "config.json").write_text(json.dumps(native, indent=2), encoding="utf-8")
    save_file(state, aside / "model.safetensors", metadata={"format": "pt"})
