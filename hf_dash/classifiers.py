"""Any image classifier of transformers, a timm wrapper or not: its labels, transform and folder.

Flow: a name and the labels of the data → a model that knows them all → a transform, a folder.
Differs from ``load_model``, ``image_transform`` and ``save_model``, which are for timm wrappers:
other models take their transform from an image processor and keep the layout of transformers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_dash._files import files_written_aside
from hf_dash._safetensors import require_safetensors
from hf_dash.models import grow_head, image_transform, is_timm, model_labels, save_model


def architecture_of(model: PreTrainedModel) -> str:
    """Return timm's name of a wrapped architecture, else the model type, such as ``"vit"``."""
    config = model.config
    return str(config.architecture if is_timm(model) else config.model_type)


def load_classifier(
    name_or_path: str,
    label_names: Sequence[str] | None = None,
    *,
    ignore_mismatched_sizes: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Load an image classifier that knows all classes of some data; only safetensors are read.

    Known classes keep their places. Where the data have more, a timm wrapper's head grows by
    :func:`~hf_dash.models.grow_head`; with ``ignore_mismatched_sizes`` any model gets a head of
    the new size instead, all of it fresh, as in transformers' scripts. That head knows the old
    classes too, unless the model knows none of the data's: then it knows the data's alone, and
    where the sizes happen to agree, its weights stay and only the names change.

    Args:
        name_or_path: a folder, or the id of a repository.
        label_names: of the data, by which classes are matched; None asks for nothing.
        ignore_mismatched_sizes: see above.
        revision: branch, tag or commit on the Hub.
        cache_dir: where files of the Hub are kept.
        token: for private repositories.
        seed: of grown rows.

    Raises:
        ValueError: the data have classes unknown to a model that is no timm wrapper, and
            ``ignore_mismatched_sizes`` is not set; or the weights are no safetensors.
        NotImplementedError: the classifier of a timm wrapper cannot grow.
    """
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    require_safetensors(name_or_path, **where)
    options = {**where, "use_safetensors": True, "trust_remote_code": False}
    model = AutoModelForImageClassification.from_pretrained(name_or_path, **options)
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
    return AutoModelForImageClassification.from_pretrained(
        name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,
        **options,
    )


def classifier_transform(
    model: PreTrainedModel, image_processor: Any | None = None
) -> Callable[[Image.Image], Tensor]:
    """Return the evaluation transform of a model, from a PIL image to a tensor.

    Args:
        model: a timm wrapper, whose config tells the transform, or any other image classifier.
        image_processor: of a model that is no timm wrapper.

    The transform raises ``ValueError`` for an image whose mode has not the channels the model
    takes, instead of converting it unasked.

    Raises:
        ValueError: the model needs an image processor and none is given.
    """
    if is_timm(model):
        return image_transform(model)
    if image_processor is None:
        raise ValueError(
            f"image_processor must be given for a model of type {model.config.model_type!r}"
        )

    def processed(image: Image.Image) -> Tensor:
        if image.mode != "RGB":
            raise ValueError(
                f"image mode is {image.mode!r}, but the image processor takes 'RGB'; convert on"
                " loading with image_mode='RGB'"
            )
        pixels: Tensor = image_processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    return processed


def save_classifier(
    model: PreTrainedModel, folder: str | Path, image_processor: Any | None = None
) -> None:
    """Save a model: a timm wrapper in timm's layout, any other with its image processor.

    The files are written aside and moved into place when they are whole.

    Args:
        model: an image classifier of transformers.
        folder: made where it does not exist; other files in it stay.
        image_processor: saved beside a model that is no timm wrapper.
    """
    if is_timm(model):
        save_model(model, folder)
        return
    with files_written_aside(Path(folder)) as aside:
        model.save_pretrained(aside)
        if image_processor is not None:
            image_processor.save_pretrained(aside)
