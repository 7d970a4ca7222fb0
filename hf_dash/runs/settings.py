"""The settings of a command as they go on record: by name, without places and secrets.

Flow: dataclasses of flags → plain JSON types; a local path → its last part, for somebody's own
folders are nobody else's business.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_dash.utils.files import public

# Places and secrets, and what says nothing.
UNTOLD = ("output_dir", "cache_dir", "token", "hub_token", "trust_remote_code")


def recorded_settings(*groups: Any) -> dict[str, Any]:
    """Return the settings of a command to put on record.

    Args:
        *groups: dataclasses of flags, or mappings; of a name in several the last one counts.

    Returns:
        Plain JSON types by name; of a local path only its last part, no token, no output folder.

    Example:
        >>> import hf_dash
        >>> data = hf_dash.DataConfig("/home/me/images")
        >>> hf_dash.runs.recorded_settings(data)["dataset_name"]
        'images'
    """
    settings: dict[str, Any] = {}
    for group in groups:
        named = dict(group) if isinstance(group, Mapping) else _plain(group)
        settings |= {name: value for name, value in named.items() if name not in UNTOLD}
    return {name: public(value) for name, value in settings.items()}


def _plain(group: Any) -> dict[str, Any]:
    if not is_dataclass(group) or isinstance(group, type):
        raise TypeError(f"groups must be dataclasses or mappings, got {group!r}")
    return asdict(group)


# Of TrainingArguments: places, names, secrets, and what says nothing about how it was trained.
_UNTOLD = (
    *("output_dir", "logging_", "log_", "run_name", "project", "trackio_", "report_to", "do_"),
    *("push_to_hub", "hub_", "disable_tqdm", "resume_from_checkpoint", "local_rank", "deepspeed"),
)

_TOLD = (
    *("learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps", "optim"),
    *("weight_decay", "lr_scheduler_type", "seed", "bf16", "fp16"),
)


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings of a Trainer to put on record: the main ones, and all but the defaults.

    Args:
        args: of a Trainer; no token, name of a repository or place on this machine is taken.

    Returns:
        Plain JSON types by name, ``world_size`` among them.

    Example:
        >>> import hf_dash
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments(output_dir="/home/me/runs", learning_rate=0.01, use_cpu=True)
        >>> hf_dash.runs.training_settings(args)["learning_rate"]
        '0.01'
    """
    names = [
        entry.name
        for entry in fields(args)
        if not entry.name.startswith(_UNTOLD)
        and (
            entry.name in _TOLD
            or getattr(args, entry.name) not in (entry.default, None, [], AcceleratorConfig())
        )
    ]
    values = {name: getattr(args, name) for name in names}
    told = {name: str(getattr(value, "value", value)) for name, value in values.items()}
    return {**told, "world_size": args.world_size}
