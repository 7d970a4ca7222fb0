"""Which tensors of a model shrink, and how each is cut into vectors.

Flow: modules → weights and biases of linear, convolution and recurrent layers, updates of LoRA →
:class:`ShrinkableTensor`.
Source: the authors' commit 3d3cea6 shrinks ``nn.Linear`` and ``nn.Conv2d``: rows of a linear
weight, single kernels of a convolution, a bias as one vector.
Differs: 1-d, 3-d and transposed convolutions, transformers' ``Conv1D``, LSTM and GRU and the
in-projections of ``nn.MultiheadAttention`` count too; convolutions may be cut into filters instead
(see ``grouping``); of LoRA the update ΔW = B·A shrinks, not its two factors; tensors on the same
memory are taken once; frozen tensors are left alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hf_dash.method.config import Grouping
from hf_dash.method.wrappers import LoraUpdate, is_conv1d, lora_updates, plain_name, refuse_packed
from hf_dash.utils.distributed import is_dtensor, local

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class ShrinkableTensor:
    """One tensor that shrinks and the way it falls into vectors.

    Args:
        name: its (first) name in the model.
        parameter: the tensor itself, changed in place.
        shape: the shape it is viewed in; the same number of elements, never a copy.
        dims: the dimensions of ``shape`` that one vector spans; the others count the vectors.
        twins: other parameters on the same memory, whose gradients add to its own.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    twins: tuple[nn.Parameter, ...] = ()

    @property
    def num_vectors(self) -> int:
        """Number of vectors the tensor holds."""
        return math.prod(size for dim, size in enumerate(self.shape) if dim not in self.dims)

    @property
    def is_cut(self) -> bool:
        """Whether vectors lie across processes: sharding is by rows, and they span all rows."""
        return is_dtensor(self.parameter) and 0 in self.dims

    @property
    def sources(self) -> tuple[nn.Parameter, ...]:
        """The parameters whose gradients, added up, are that of the vectors."""
        return (self.parameter, *self.twins)

    @property
    def used_up(self) -> tuple[nn.Parameter, ...]:
        """The parameters that are not to be found a second time."""
        return (self.parameter,)

    def view(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, laid out as the parameter is, as a view of shape ``self.shape``.

        A process's share of a sharded tensor keeps its own number of rows.
        """
        return tensor if self.shape == tuple(self.parameter.shape) else tensor.view(self.shape)

    def values(self) -> Tensor:
        """Return the vectors, or this process's share of them, in the shape of their gradient."""
        return self.view(local(self.parameter))

    def spread(self, factors: Tensor) -> Tensor:
        """Return one factor per vector in the shape that multiplies the parameter's view."""
        return factors


@dataclass(frozen=True)
class LowRankTensor(ShrinkableTensor):
    """An update ΔW = B·A of a frozen weight W, whose rows shrink by multiplying those of B.

    W + ΔW is what the layer computes with, so the gradient of W is that of ΔW. The ``parameter`` is
    B, ``shape`` and ``dims`` are those of W.

    Args:
        update: where B, A and W are.
    """

    update: LoraUpdate = field(kw_only=True)

    @property
    def sources(self) -> tuple[nn.Parameter, ...]:
        """The frozen weight."""
        return (self.update.weight,)

    @property
    def used_up(self) -> tuple[nn.Parameter, ...]:
        """B and A."""
        return (self.update.b, self.update.a)

    def view(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` as it is: gradients have the shape of W already."""
        return tensor

    def values(self) -> Tensor:
        """Return ΔW."""
        return self.update.delta()

    def spread(self, factors: Tensor) -> Tensor:
        """Return the factors as rows of B."""
        return factors.reshape(-1, *[1] * (self.parameter.ndim - 1))


def find_shrinkable(
    model: nn.Module, grouping: Grouping = "kernel", *, include_frozen: bool = False
) -> tuple[list[ShrinkableTensor], list[str]]:
    """Find the tensors that shrink.

    Args:
        model: any module; wrappers such as DDP are to be taken off before.
        grouping: see :class:`~hf_dash.method.config.DashConfig`.
        include_frozen: take tensors that do not require gradients too.

    Returns:
        The shrinkable tensors in the order of the model's modules, each once, and the names of all
        other parameters, which stay untouched: other layers' and frozen ones. Names are those of
        the model as written, without the prefixes of compiled submodules.

    Raises:
        ValueError: no tensor of the model can shrink.
        NotImplementedError: a weight is parametrized or quantized, so that scaling it would not
            scale what the layer computes with; or tensors overlap in memory.
    """
    found: list[ShrinkableTensor] = []
    taken: set[int] = set()
    for prefix, module in model.named_modules():
        for tensor in _cuts(prefix, module, grouping):
            parameter = tensor.parameter
            _refuse_sharded(tensor)
            if id(parameter) not in taken and (parameter.requires_grad or include_frozen):
                taken.update(map(id, tensor.used_up))
                found.append(tensor)
    if not found:
        raise ValueError(
            f"model {type(model).__name__} has no shrinkable tensor: DASH shrinks trainable weights"
            " and biases of linear, convolution and recurrent layers"
        )
    found = _each_memory_once(found, model)
    changed = {id(p) for tensor in found for p in (tensor.parameter, *tensor.twins)}
    untouched = [plain_name(name) for name, p in model.named_parameters() if id(p) not in changed]
    return found, untouched


def is_sharded(tensors: list[ShrinkableTensor]) -> bool:
    """Tell whether each process holds only a share of these tensors (FSDP2: all or none)."""
    return any(is_dtensor(tensor.parameter) for tensor in tensors)


def _refuse_sharded(tensor: ShrinkableTensor) -> None:
    if not is_dtensor(tensor.parameter):
        return
    if isinstance(tensor, LowRankTensor):
        raise NotImplementedError(
            f"hf_dash cannot shrink {tensor.name!r} under FSDP2: the rows of a LoRA update lie on"
            " several processes"
        )
    if tensor.shape != tuple(tensor.parameter.shape):
        raise NotImplementedError(
            f"hf_dash cannot cut {tensor.name!r} into filters under FSDP2: a grouped transposed"
            " convolution mixes its groups in the rows that are sharded"
        )


def _each_memory_once(found: list[ShrinkableTensor], model: nn.Module) -> list[ShrinkableTensor]:
    """Take tensors on the very same memory once, and refuse those that overlap otherwise.

    Raises:
        NotImplementedError: two tensors share a part of their memory, or one tensor's elements
            share theirs, so that one element would be multiplied twice.
    """
    by_memory: dict[tuple[object, ...], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        held = local(parameter)
        if held.numel():
            place = (held.data_ptr(), held.dtype, tuple(held.shape), held.stride())
            by_memory.setdefault(place, []).append(parameter)
    twins = {id(p): same for same in by_memory.values() for p in same}
    kept: list[ShrinkableTensor] = []
    seen: set[int] = set()
    for tensor in found:
        same = twins.get(id(tensor.parameter), [tensor.parameter])
        if id(same[0]) not in seen:
            others = tuple(p for p in same if p is not tensor.parameter)
            kept.append(replace(tensor, twins=others) if others else tensor)
        seen.add(id(same[0]))
    _refuse_overlap(kept)
    return kept


def _refuse_overlap(tensors: list[ShrinkableTensor]) -> None:
    spans = []
    for tensor in tensors:
        held = local(tensor.parameter).detach()
        if not held.numel():
            continue
        steps = list(zip(held.shape, held.stride(), strict=True))
        if any(size > 1 and step == 0 for size, step in steps):
            raise NotImplementedError(
                f"hf_dash cannot shrink {tensor.name!r}: its elements share their memory"
            )
        begin = held.data_ptr()
        end = begin + (sum((size - 1) * step for size, step in steps) + 1) * held.element_size()
        spans.append((str(held.device), begin, end, tensor.name))
    spans.sort()
    for (device, _, end, name), (other_device, begin, _, other) in pairwise(spans):
        if device == other_device and begin < end:
            raise NotImplementedError(
                f"hf_dash cannot shrink {name!r} and {other!r}: they share a part of their memory"
            )


def _cuts(prefix: str, module: nn.Module, grouping: Grouping) -> Iterator[ShrinkableTensor]:
    """Yield each tensor of this very module that can shrink."""

    def named(local_name: str) -> str:
        return plain_name(f"{prefix}.{local_name}" if prefix else local_name)

    for update in lora_updates(module):
        weight = update.weight
        dims = (0,) if update.transposed else tuple(range(1, weight.ndim))
        shape = tuple(weight.shape)
        yield LowRankTensor(named(update.name), update.b, shape, dims, update=update)
    if not (is_conv1d(module) or isinstance(module, (*_LAYERS, *_RECURRENT))):
        return
    refuse_packed(module)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if (cut := _cut(module, name, tuple(parameter.shape), grouping)) is not None:
            yield ShrinkableTensor(named(name), parameter, *cut)


_Cut = tuple[tuple[int, ...], tuple[int, ...]]


def _cut(module: nn.Module, name: str, shape: tuple[int, ...], grouping: Grouping) -> _Cut | None:
    """Return the shape of a layer's own tensor and the dimensions of its vectors, if it shrinks."""
    recurrent = isinstance(module, _RECURRENT)
    if name in ("bias", "in_proj_bias") or (recurrent and name.startswith("bias")):
        return shape, (0,)
    if name in _ATTENTION_WEIGHTS or (recurrent and name.startswith("weight")):
        return shape, (1,)
    if name != "weight":
        return None
    if isinstance(module, _ConvNd):
        return _conv_cut(module, shape, grouping)
    # transformers' Conv1D is a linear layer whose weight is [in, out].
    return shape, (0,) if is_conv1d(module) else (1,)


def _conv_cut(module: _ConvNd, shape: tuple[int, ...], grouping: Grouping) -> _Cut:
    kernel = shape[2:]
    if grouping == "auto":
        grouping = "filter" if math.prod(kernel) == 1 else "kernel"
    if grouping == "kernel":
        return shape, tuple(range(2, len(shape)))
    if not isinstance(module, _ConvTransposeNd):
        return shape, tuple(range(1, len(shape)))
    # A transposed weight is [in, out / groups, *k]; split off the groups to find its filters.
    if module.groups == 1:
        return shape, (0, *range(2, len(shape)))
    inputs, outputs_per_group = shape[:2]
    grouped = (module.groups, inputs // module.groups, outputs_per_group, *kernel)
    return grouped, (1, *range(3, len(grouped)))
