"""Which tensors of a model shrink, and how each is cut into vectors.

Flow: modules → weights and biases of linear and convolution layers → :class:`ShrinkableTensor`.
Source: the authors' commit 3d3cea6 shrinks ``nn.Linear`` and ``nn.Conv2d``: rows of a linear
weight, single kernels of a convolution, a bias as one vector.
Differs: 1-d, 3-d and transposed convolutions and the in-projections of ``nn.MultiheadAttention``
count too; convolutions may be cut into filters instead (see ``grouping``); a tied tensor is taken
once; frozen tensors are left alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hf_dash.method.config import Grouping
from hf_dash.method.wrappers import plain_name, refuse_packed
from hf_dash.utils.distributed import is_dtensor

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class ShrinkableTensor:
    """One tensor that shrinks and the way it falls into vectors.

    Args:
        name: its (first) name in the model.
        parameter: the tensor itself, changed in place.
        shape: the shape it is viewed in; the same number of elements, never a copy.
        dims: the dimensions of ``shape`` that one vector spans; the others count the vectors.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def num_vectors(self) -> int:
        """Number of vectors the tensor holds."""
        return math.prod(size for dim, size in enumerate(self.shape) if dim not in self.dims)

    @property
    def is_cut(self) -> bool:
        """Whether vectors lie across processes: sharding is by rows, and they span all rows."""
        return is_dtensor(self.parameter) and 0 in self.dims

    def view(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, laid out as the parameter is, as a view of shape ``self.shape``.

        A process's share of a sharded tensor keeps its own number of rows.
        """
        return tensor if self.shape == tuple(self.parameter.shape) else tensor.view(self.shape)


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
        NotImplementedError: a linear or convolution weight is parametrized or quantized, so that
            scaling it would not scale what the layer computes with.
    """
    found: list[ShrinkableTensor] = []
    taken: set[int] = set()
    for prefix, module in model.named_modules():
        for local_name, parameter, shape, dims in _cuts(module, grouping):
            name = plain_name(f"{prefix}.{local_name}" if prefix else local_name)
            if is_dtensor(parameter) and shape != tuple(parameter.shape):
                raise NotImplementedError(
                    f"hf_dash cannot cut {name!r} into filters under FSDP2: a grouped transposed"
                    " convolution mixes its groups in the rows that are sharded"
                )
            if (parameter.requires_grad or include_frozen) and id(parameter) not in taken:
                taken.add(id(parameter))
                found.append(ShrinkableTensor(name, parameter, shape, dims))
    if not found:
        raise ValueError(
            f"model {type(model).__name__} has no shrinkable tensor: DASH shrinks trainable weights"
            " and biases of linear and convolution layers"
        )
    untouched = [plain_name(name) for name, p in model.named_parameters() if id(p) not in taken]
    return found, untouched


def is_sharded(tensors: list[ShrinkableTensor]) -> bool:
    """Tell whether each process holds only a share of these tensors (FSDP2: all or none)."""
    return any(is_dtensor(tensor.parameter) for tensor in tensors)


_Cut = tuple[str, nn.Parameter, tuple[int, ...], tuple[int, ...]]


def _cuts(module: nn.Module, grouping: Grouping) -> Iterator[_Cut]:
    """Yield (name, parameter, shape, dims) for each tensor of this very module that can shrink."""
    if not isinstance(module, nn.Linear | _ConvNd | nn.MultiheadAttention):
        return
    refuse_packed(module)
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    for name, parameter in own.items():
        shape = tuple(parameter.shape)
        if name in ("bias", "in_proj_bias"):
            yield name, parameter, shape, (0,)
        elif name in _ATTENTION_WEIGHTS or (name == "weight" and isinstance(module, nn.Linear)):
            yield name, parameter, shape, (1,)
        elif name == "weight" and isinstance(module, _ConvNd):
            yield name, parameter, *_conv_cut(module, shape, grouping)


def _conv_cut(
    module: _ConvNd, shape: tuple[int, ...], grouping: Grouping
) -> tuple[tuple[int, ...], tuple[int, ...]]:
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
