"""The checkpoint that fine-tuned weights shrink towards: opened, matched by name, read in pieces.

Flow: a state dict, a model folder or a Hub id → names and shapes, nothing read yet → each
shrinkable tensor's counterpart → its values, one tensor at a time, cut like the shard.
Source: ours. The paper shrinks towards zero, where its networks began: w ← s·w. A fine-tuned
network began at a checkpoint w₀, and what training added is w − w₀: w ← w₀ + s·(w − w₀), s from the
cosine of the descent direction with w − w₀. With w₀ = 0 this is the paper's method to the bit.
Differs from loading a second model: a few rows of one tensor are in memory at a time.
Symbols: w₀ (``origin``).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_dash.method.config import ZERO
from hf_dash.method.tensors import ShrinkableTensor
from hf_dash.utils.distributed import held_rows, whole

BaseLike: TypeAlias = Mapping[str, Tensor] | str | Path

# What wrappers and libraries put in front of a parameter's name.
_PREFIXES = ("module.", "base_model.model.", "timm_model.", "model.")


@dataclass(frozen=True)
class Base:
    """A checkpoint whose tensors have been matched with those that shrink.

    Args:
        name: of the checkpoint, for reports and messages.
        keys: the checkpoint's name of each tensor that it holds, by the model's.
        towards_zero: names of the tensors it lacks, which shrink towards zero.
        read: returns the rows of one of its tensors; opens nothing but that tensor.
    """

    name: str
    keys: Mapping[str, str]
    towards_zero: tuple[str, ...]
    read: Callable[[str, slice], Tensor] = field(repr=False)

    def holds(self, tensor: ShrinkableTensor) -> bool:
        """Tell whether the checkpoint has this tensor."""
        return tensor.name in self.keys

    def origin(
        self, tensor: ShrinkableTensor, rows: slice = slice(None), *, whole: bool = False
    ) -> Tensor:
        """Return w₀ of a tensor that the checkpoint holds, to be read only.

        Args:
            tensor: one of those that were matched.
            rows: of ``tensor.shape``, of those that this process holds.
            whole: of a sharded tensor all rows, instead of those that this process holds.

        Returns:
            At least float32, on the tensor's device, of ``tensor.shape`` but for its rows.
        """
        parameter = tensor.parameter
        # A view of a grouped transposed convolution has several stored rows in one of its own.
        stored = parameter.shape[0] // tensor.shape[0]
        first, count = (0, parameter.shape[0]) if whole else held_rows(parameter)
        begin, end, _ = rows.indices(count // stored)
        values = self.read(
            self.keys[tensor.name], slice(first + begin * stored, first + end * stored)
        )
        dtype = torch.promote_types(values.dtype, torch.float32)
        return values.to(parameter.device, dtype).view(end - begin, *tensor.shape[1:])


@contextmanager
def open_base(
    base: BaseLike | None, tensors: Iterable[ShrinkableTensor], model: nn.Module
) -> Iterator[Base | None]:
    """Open a checkpoint and match its tensors with those that shrink.

    Args:
        base: a state dict; a model folder; a Hub id, ``user/name`` or ``user/name@revision``; None
            or ``"zero"`` give None: weights shrink towards zero.
        tensors: that shrink, as :func:`~hf_dash.method.tensors.find_shrinkable` returns them.
        model: whose tensors they are.

    Yields:
        The :class:`Base`, until the context ends.

    Raises:
        TypeError: ``base`` is none of these, or holds something else than tensors.
        ValueError: the checkpoint holds less than half of the weights that shrink, or one of
            another shape, so that it is of another architecture; it is quantized or on the meta
            device; its weights are not safetensors, damaged or not there.
    """
    if base is None or (isinstance(base, str) and base == ZERO):
        yield None
        return
    with ExitStack() as stack:
        if isinstance(base, Mapping):
            name = f"a state dict of {len(base)} tensors"
            shapes, read = _of_state_dict(base)
        elif isinstance(base, str | Path):
            name = str(base)
            shapes, read = _of_files(name, stack)
        else:
            raise TypeError(
                f"base must be a state dict, a model folder or a Hub id, got {type(base).__name__}"
            )
        keys, missing = _match(name, shapes, list(tensors), model)
        yield Base(name, keys, missing, read)


_Source: TypeAlias = tuple[dict[str, tuple[int, ...]], Callable[[str, slice], Tensor]]


def _of_state_dict(state: Mapping[str, Any]) -> _Source:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"base must hold tensors alone, got {type(tensor).__name__} {name!r}")
        if tensor.is_meta:
            raise ValueError(f"base must hold values, got {name!r} on the device 'meta'")

    def read(name: str, rows: slice) -> Tensor:
        tensor: Tensor = state[name].detach()
        _check_dtype(name, tensor.dtype)
        return whole(tensor)[rows]

    return {name: tuple(tensor.shape) for name, tensor in state.items()}, read


def _of_files(name: str, stack: ExitStack) -> _Source:
    from safetensors import SafetensorError, safe_open

    from hf_dash.hub.client import HubError
    from hf_dash.models import weight_files

    shapes: dict[str, tuple[int, ...]] = {}
    handles: dict[str, Any] = {}
    repo, _, revision = name.partition("@") if not Path(name).exists() else (name, "", "")
    try:
        paths = weight_files(repo, revision=revision or None)
    except HubError as error:
        raise ValueError(
            f"base must be a folder or a repository on the Hub, but {name!r} was not found there:"
            f" {error}"
        ) from None
    for path in paths:
        try:
            handle = stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"base {name}: {path.name} cannot be read: {error}") from error
        for key in handle.keys():  # noqa: SIM118  # not a mapping
            shapes[key] = tuple(handle.get_slice(key).get_shape())
            handles[key] = handle

    def read(key: str, rows: slice) -> Tensor:
        tensor: Tensor = handles[key].get_slice(key)[rows]
        _check_dtype(key, tensor.dtype)
        return tensor

    return shapes, read


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"base must hold plain floating point weights, got {name!r} of {dtype}: a quantized"
            " checkpoint does not hold the weights that training began with"
        )


def _match(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: list[ShrinkableTensor],
    model: nn.Module,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Match names whatever stands in front of them; return those matched and those missing."""
    own = getattr(model, "base_model_prefix", "")
    prefixes = (*_PREFIXES, f"{own}.") if own else _PREFIXES
    by_core: dict[str, str] = {}
    renamed = _renaming_of(model)
    for key in shapes:
        core = _core(renamed(key), prefixes)
        if core in by_core:
            raise ValueError(
                f"base {name} names one tensor twice: {by_core[core]!r} and {key!r}; give the"
                " state dict of one model"
            )
        by_core[core] = key
    keys: dict[str, str] = {}
    missing: list[str] = []
    for tensor in tensors:
        found = by_core.get(_core(tensor.name, prefixes))
        shape = tuple(tensor.parameter.shape)
        if found is None or _is_other_head(shapes[found], shape, model):
            missing.append(tensor.name)
        elif shapes[found] != shape:
            raise ValueError(
                f"base {name} is of another architecture: {found!r} has the shape {shapes[found]},"
                f" the model's {tensor.name!r} {shape}"
            )
        else:
            keys[tensor.name] = found
    held = [tensor.parameter.numel() for tensor in tensors if tensor.name in keys]
    # Under PEFT the adapters are the change: no checkpoint holds them, and they began at zero.
    adapted = hasattr(model, "peft_config")
    if not adapted and 2 * sum(held) < sum(tensor.parameter.numel() for tensor in tensors):
        raise ValueError(
            f"base {name} holds {len(keys)} of the {len(tensors)} tensors that shrink, but not"
            f" {missing[0]!r}; it has {sorted(shapes)[:3]} …: it is of another architecture, or its"
            " names are; give the state dict of the checkpoint as a model of this architecture"
        )
    return keys, tuple(missing)


def _renaming_of(model: nn.Module) -> Callable[[str], str]:
    """Return what turns names in a file into those of a model: transformers renames some."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return lambda name: name
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # early releases of transformers 5
        return lambda name: name
    steps = [s for s in get_model_conversion_mapping(model) if isinstance(s, WeightRenaming)]

    def renamed(name: str) -> str:
        for step in steps:
            name = step.rename_source_key(name)[0]
        return name

    return renamed


def _core(name: str, prefixes: tuple[str, ...]) -> str:
    """Return a parameter's name without what wrappers and libraries put around it."""
    name = name.replace(".base_layer.", ".").replace("_orig_mod.", "")
    while prefix := next((one for one in prefixes if name.startswith(one)), None):
        name = name.removeprefix(prefix)
    return name


def _is_other_head(theirs: tuple[int, ...], own: tuple[int, ...], model: nn.Module) -> bool:
    """Tell a classifier for other classes, which differs in its number of rows alone."""
    config = getattr(model, "config", None)
    classes = getattr(config, "num_labels", getattr(model, "num_classes", None))
    return theirs != own and theirs[1:] == own[1:] and own[0] == classes
