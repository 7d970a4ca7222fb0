"""Everything known about what may wrap a model, and what is refused by name.

Flow: a user's model → :func:`unwrap` → the module to compute with, and how its wrapper hears of
new weights.
Works: DDP, ``torch.compile``, DeepSpeed ZeRO-0, 1 and 2, FSDP2 (``fully_shard``), PEFT.
Refused: FSDP1, ZeRO-3, tensor parallelism, pipelines, ``nn.DataParallel``, parametrized and
quantized layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from hf_dash.utils.distributed import is_dtensor

Kind = Literal["plain", "ddp", "deepspeed", "fsdp2"]

_REFUSED = {
    "FullyShardedDataParallel": "FSDP1 keeps flattened shards, in which no vector is whole; use"
    " FSDP2 (fsdp_version=2)",
    "PipelineEngine": "DeepSpeed's pipeline keeps a part of the model on each process",
    "DataParallel": "its replicas do not fire the hooks of the pass; use DDP",
}

_PACKED = (
    "is parametrized or quantized: its stored tensors are not the weights it computes with, so"
    " scaling them would not scale the layer"
)

_COMPILED = "_orig_mod."
_PEFT = "base_model.model."


@dataclass(frozen=True)
class Wrapped:
    """A model without its wrappers.

    Args:
        module: the module itself; FSDP2 and PEFT, which change a module in place, stay.
        kind: what holds the weights and their gradients together across processes.
        refresh: to be called after the weights have changed in place: some wrappers keep copies.
    """

    module: nn.Module
    kind: Kind
    refresh: Callable[[], None]

    @property
    def has_foreign_hooks(self) -> bool:
        """Whether a backward pass would fire hooks that belong to the wrapper's own training."""
        return self.kind == "deepspeed"


def unwrap(model: nn.Module) -> Wrapped:
    """Find the module inside of DDP, DeepSpeed's engine and compilation.

    Compiling evaluation with gradients anew would cost more than the pass.

    Raises:
        NotImplementedError: the shrink cannot work through a wrapper or on the way the weights are
            stored; the message says which and why.

    Example:
        >>> from torch import nn
        >>> from hf_dash.method.wrappers import unwrap
        >>> layer = nn.Linear(2, 2)
        >>> wrapped = unwrap(layer)
        >>> wrapped.module is layer, wrapped.kind
        (True, 'plain')
    """
    _refuse_modules(model)
    _refuse_shards(model)
    _refuse_dead_tensors(model)
    kind: Kind = "fsdp2" if any(map(is_dtensor, model.parameters())) else "plain"
    refresh = _nothing
    while (inner := _inner(model)) is not None:
        if _is_engine(model):
            kind, refresh = "deepspeed", _refresh_of(model)
        elif isinstance(model, DistributedDataParallel):
            kind = "ddp"
        model = inner
    return Wrapped(model, kind, refresh)


def as_trained(model: nn.Module, args: Any, trainer: Any = None) -> nn.Module:
    """Return a Trainer's model, in DeepSpeed's engine if there is one, as the shrink needs it.

    A Trainer hands its callbacks the model alone, whose weights the engine would overwrite. Before
    the engine is made, it will copy the weights from the model: then the model will do.

    Args:
        model: the Trainer's, as its callbacks get it.
        args: its ``TrainingArguments``.
        trainer: the Trainer itself, where it is known.

    Raises:
        NotImplementedError: DeepSpeed trains the model and ``trainer`` is not known.
    """
    if getattr(args, "deepspeed_plugin", None) is None:
        return model
    if trainer is None:
        raise NotImplementedError(
            "a DashCallback cannot shrink under DeepSpeed unless it is bound: the Trainer hands it"
            " the model without the engine, which would undo the shrink; use"
            " trainer.add_callback(DashCallback().bind(trainer))"
        )
    wrapped: nn.Module = trainer.model_wrapped
    return wrapped if _is_engine(wrapped) and wrapped.module is model else model


def refuse_packed(module: nn.Module) -> None:
    """Raise ``NotImplementedError`` where scaling a layer's tensors would not scale the layer."""
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    has_weight = any("weight" in name for name in own)
    plain = all(t.is_floating_point() and _holds_its_numbers(t) for t in own.values())
    if parametrize.is_parametrized(module) or not (has_weight and plain):
        raise NotImplementedError(f"{type(module).__name__} {_PACKED}")


def without_adapter(model: nn.Module) -> nn.Module:
    """Return the model inside of PEFT's, whose own ``forward`` does not show its parameters."""
    inner: Any = getattr(model, "get_base_model", lambda: model)
    return cast(nn.Module, inner())


def is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' ``Conv1D``, a linear layer with weight [in, out], without importing it."""
    return any(
        (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for cls in type(module).__mro__
    )


@dataclass(frozen=True)
class LoraUpdate:
    """The update ΔW = B·A that an adapter of PEFT's LoRA adds to a frozen weight W.

    Args:
        name: of B, below the layer.
        a, b: its factors, [rank, in, …] and [out, rank, …].
        weight: W, [out, in, …], or [in, out] where it is ``transposed``.
        transposed: W is the weight of a ``Conv1D``.
        delta: returns ΔW, scaled and laid out like W.
    """

    name: str
    a: nn.Parameter
    b: nn.Parameter
    weight: nn.Parameter
    transposed: bool
    delta: Callable[[], Tensor]


def lora_updates(module: Any) -> Iterator[LoraUpdate]:
    """Yield the updates that the active adapters of one LoRA layer make.

    Embeddings and attention layers with adapters have none.

    Raises:
        NotImplementedError: an adapter is merged into its layer, or is one of DoRA, whose update
            is not B·A.
    """
    if not any(cls.__name__ == "LoraLayer" for cls in type(module).__mro__):
        return
    layer = module.get_base_layer()
    if not (is_conv1d(layer) or isinstance(layer, nn.Linear | _ConvNd)):
        return
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        if module.merged:
            raise NotImplementedError(
                f"hf_dash cannot shrink the LoRA adapter {adapter!r} while it is merged: call"
                " unmerge_adapter() first"
            )
        if adapter in getattr(module, "lora_magnitude_vector", ()):
            raise NotImplementedError(
                f"hf_dash cannot shrink the adapter {adapter!r}: of DoRA the update is not B·A"
            )
        yield LoraUpdate(
            name=f"lora_B.{adapter}.weight",
            a=module.lora_A[adapter].weight,
            b=module.lora_B[adapter].weight,
            weight=layer.weight,
            transposed=is_conv1d(layer),
            delta=partial(module.get_delta_weight, adapter),
        )


def plain_name(name: str) -> str:
    """Return a parameter's name as it was before parts of the model were compiled."""
    return name.replace(_COMPILED, "")


def base_name(name: str) -> str:
    """Return a parameter's name without the prefix that PEFT puts in front of every name."""
    return name.removeprefix(_PEFT)


def _nothing() -> None:
    pass


def _inner(model: nn.Module) -> nn.Module | None:
    """Return what a wrapper is around; None where the model is not a wrapper."""
    if _is_engine(model) or isinstance(model, DistributedDataParallel):
        return cast(nn.Module, model.module)
    return getattr(model, "_orig_mod", None)


def _is_engine(model: nn.Module) -> bool:
    """Tell a DeepSpeed engine (ZeRO-0, 1 or 2) without importing DeepSpeed."""
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__)


def _refresh_of(engine: Any) -> Callable[[], None]:
    """Return what lets DeepSpeed's optimizer take over the weights, of which it keeps copies."""
    refresh: Callable[[], None] = getattr(engine.optimizer, "refresh_fp32_params", _nothing)
    return refresh


def _refuse_modules(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise NotImplementedError(f"{type(module).__name__} {_PACKED}")
        for cls in type(module).__mro__:
            if cls.__name__ in _REFUSED:
                raise NotImplementedError(
                    f"hf_dash cannot shrink a model under {cls.__name__}: {_REFUSED[cls.__name__]}"
                )


def _refuse_shards(model: nn.Module) -> None:
    """Refuse parameters of which this process holds a part in which no vector is whole."""
    fully_sharded = any(
        cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__
    )
    sharded = [is_dtensor(parameter) for parameter in model.parameters()]
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise NotImplementedError(
                "hf_dash cannot shrink a model under DeepSpeed ZeRO-3: it partitions every"
                f" parameter, {name!r} among them; shrink before accelerator.prepare"
            )
        if is_dtensor(parameter) and not (fully_sharded and _by_rows(parameter)):
            raise NotImplementedError(
                f"hf_dash cannot shrink {name!r}, sharded as {parameter.placements} outside FSDP2:"
                " tensor parallelism is not supported"
            )
    if any(sharded) and not all(sharded):
        raise NotImplementedError(
            "hf_dash cannot shrink a model that is only partly sharded: wrap the whole of it in"
            " fully_shard"
        )


def _refuse_dead_tensors(model: nn.Module) -> None:
    """Refuse parameters that have no values, or that can have no gradient."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise NotImplementedError(
                f"hf_dash cannot shrink {name!r} on the meta device: load the weights first"
            )
        if parameter.is_inference():
            raise NotImplementedError(
                f"hf_dash cannot shrink {name!r}, made in torch.inference_mode(): such tensors have"
                " no gradients; make or load the model outside of it"
            )


def _by_rows(parameter: Any) -> bool:
    return all(place.is_replicate() or place.is_shard(0) for place in parameter.placements)


def _holds_its_numbers(tensor: Tensor) -> bool:
    """Tell a tensor that holds its numbers from one that packs them, such as a quantized one."""
    return type(tensor.data) in (Tensor, nn.Parameter) or is_dtensor(tensor.data)
