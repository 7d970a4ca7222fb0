"""What the ``config.json`` of a model from anywhere may say, checked before a model is made of it.

Flow: the file, if it is small → plain JSON → a known architecture, arguments that its class takes,
images and layers of a size that fits into memory.
Differs from loading it: timm follows an architecture ``hf-hub:…`` into another repository and opens
the file that ``checkpoint_path`` names, and nothing bounds the size of what is made.
"""

import inspect
from pathlib import Path
from typing import Any

import timm
import torch

from hf_dash.utils.files import read_json

# Bytes: names of 20,000 classes are 1 MB.
LARGEST = 16 * 2**20

# Sides of images in pixels, sizes and numbers of layers, and entries of one list.
LARGEST_IMAGE, LARGEST_NUMBER, LONGEST = 4096, 65_536, 1024

IMAGE_SIZES = ("img_size", "image_size", "input_size", "test_input_size", "min_input_size")

# Of timm's layout and of transformers' wrapper around it.
TIMM_KEYS = frozenset(
    {
        *("architecture", "num_classes", "num_features", "global_pool", "model_args"),
        *("label_names", "label_descriptions", "pretrained_cfg", "custom_load"),
        *("model_type", "architectures", "do_pooling", "initializer_range", "id2label", "label2id"),
        *("dtype", "torch_dtype", "transformers_version", "problem_type", "num_labels"),
        "hf_dash_state",
    }
)

# Of the arguments that timm takes on itself, those that open no file.
MODEL_ARGS = frozenset({"in_chans", "img_size", "drop_rate", "drop_path_rate", "global_pool"})


def check_config(path: Path) -> None:
    """Check the config of a model that may come from a stranger.

    Raises:
        ValueError: it is missing, no JSON object or too large; or it names an architecture, an
            argument or a size that is not allowed.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: there is no model without its config")
    try:
        config = read_json(path, LARGEST)
        if not isinstance(config, dict):
            raise ValueError(f"it must hold an object, got {type(config).__name__}")
        _check_sizes(config)
        if "architecture" in config:
            _check_timm(config)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _check_timm(config: dict[str, Any]) -> None:
    unknown = sorted(config.keys() - TIMM_KEYS)
    if unknown:
        raise ValueError(f"a timm model's config holds {sorted(TIMM_KEYS)}, got {unknown} too")
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"architecture must be one that timm knows by name, got {architecture!r}")
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"model_args must be by name, got {arguments!r}")
    refused = sorted(arguments.keys() - MODEL_ARGS)
    # Only now, for it costs a model without weights.
    refused = [name for name in refused if name not in _parameters_of(architecture)]
    if refused:
        raise ValueError(f"model_args must be arguments of {architecture!r}, got {refused}")
    settings = config.get("pretrained_cfg")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"pretrained_cfg must be by name, got {settings!r}")
    for name in ("file", "state_dict", "custom_load"):
        if settings and settings.get(name):
            raise ValueError(f"pretrained_cfg must not hold {name}, got {settings[name]!r}")


def _parameters_of(architecture: str) -> set[str]:
    """Return the names of what the class of an architecture takes."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        kind = type(timm.create_model(architecture))
    return {
        name
        for one in kind.__mro__
        if one.__module__.startswith("timm.")
        for name in inspect.signature(one).parameters
        if name not in ("args", "kwargs")
    }


def _check_sizes(value: Any, name: str = "") -> None:
    """Refuse numbers and lists that no model is made of."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in ("id2label", "label2id", "label_names", "label_descriptions"):
                _check_sizes(one, str(key))
    elif isinstance(value, list):
        if len(value) > LONGEST:
            raise ValueError(f"{name} must have at most {LONGEST} entries, got {len(value)}")
        for one in value:
            _check_sizes(one, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        largest = LARGEST_IMAGE if name in IMAGE_SIZES else LARGEST_NUMBER
        if not abs(value) <= largest:
            raise ValueError(f"{name} must be at most {largest:,}, got {value!r}")
