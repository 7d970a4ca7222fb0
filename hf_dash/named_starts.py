"""Starts by name, with settings of their own where the name carries some.

Flow: ``"dash+alpha=0.1+grouping=auto"`` → the start, the fields it sets → a start like any other.
So one run compares settings of one start on the same rounds and seeds, each under its own name.
"""

import json
from dataclasses import fields, replace
from typing import Any

from transformers import PreTrainedModel

from hf_dash.config import DashConfig, StartsConfig
from hf_dash.starts import STARTS, Start, StartContext, Started, every_round


def find_start(name: str) -> Start:
    """Return the start of that name.

    Args:
        name: one of ``STARTS``, followed by any number of ``+field=value`` with the fields of
            :class:`~hf_dash.DashConfig` and :class:`~hf_dash.StartsConfig` that are to be others
            than the run's. A value is JSON where it can be read so, else a word.

    Raises:
        TypeError: a value is of the wrong kind.
        ValueError: there is no such start or field, or a value is out of its range.
    """
    base, *settings = name.split("+")
    if base not in STARTS:
        raise ValueError(f"start must be one of {sorted(STARTS)}, got {base!r}")
    start = STARTS[base]
    if not settings:
        return start
    dash, starts = (_own_fields(name, settings, config) for config in (DashConfig, StartsConfig))
    unknown = [setting for setting in settings if setting.partition("=")[0] not in dash | starts]
    if unknown:
        raise ValueError(
            f"settings of start {name!r} must be +field=value with fields of DashConfig or"
            f" StartsConfig, got {unknown}"
        )
    # What is out of range is refused here, not at the first round.
    DashConfig(**dash)
    StartsConfig(**starts)

    def with_its_own(model: PreTrainedModel, context: StartContext) -> Started | None:
        own = replace(context.dash, **dash), replace(context.starts, **starts)
        return start(model, replace(context, dash=own[0], starts=own[1]))

    return every_round(with_its_own) if getattr(start, "every_round", False) else with_its_own


def _own_fields(name: str, settings: list[str], config: type) -> dict[str, Any]:
    """Return the settings that are fields of a config, by name."""
    known = {entry.name for entry in fields(config)}
    own: dict[str, Any] = {}
    for setting in settings:
        field, _, text = setting.partition("=")
        if field in own:
            raise ValueError(f"settings of start {name!r} must set {field!r} once")
        if field in known:
            own[field] = _parse(text)
    return own


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
