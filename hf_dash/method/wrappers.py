"""Everything known about what may wrap a model: DDP, torch.compile, DeepSpeed, FSDP2, PEFT."""

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

if TYPE_CHECKING:
    pass


_REFUSED = {
    "FullyShardedDataParallel": "FSDP1 keeps flattened shards, in which no vector is whole; use"
    " FSDP2 (fsdp_version=2)",
    "PipelineEngine": "DeepSpeed's pipeline keeps a part of the model on each process",
    "DataParallel": "its replicas do not fire the hooks of the pass; use DDP",
}


def refuse_unsupported(model: nn.Module) -> None:
    """Refuse what the pass cannot work through.

    Raises:
        NotImplementedError: ``model`` is wrapped by FSDP1, DeepSpeed or ``nn.DataParallel``, its
            parameters are partitioned by ZeRO-3, or sharded by tensor parallelism or by anything
            but FSDP2 on dimension 0; the message says which and why.
    """
    fully_sharded = False
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _REFUSED:
                raise NotImplementedError(
                    f"hf_dash cannot shrink a model under {cls.__name__}: {_REFUSED[cls.__name__]}"
                )
            fully_sharded = fully_sharded or cls.__name__ == "FSDPModule"
    sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise NotImplementedError(
                "hf_dash cannot shrink a model under DeepSpeed ZeRO-3: it partitions every"
                f" parameter, {name!r} among them; shrink before accelerator.prepare"
            )
        if isinstance(parameter, DTensor) and not (fully_sharded and _by_rows(parameter)):
            raise NotImplementedError(
                f"hf_dash cannot shrink {name!r}, sharded as {parameter.placements} outside FSDP2:"
                " tensor parallelism is not supported"
            )
    if any(sharded) and not all(sharded):
        raise NotImplementedError(
            "hf_dash cannot shrink a model that is only partly sharded: wrap the whole of it in"
            " fully_shard"
        )


def deepspeed_engine(model: nn.Module) -> Any:
    """Return the model where it is a DeepSpeed engine (ZeRO-0, 1 or 2), else None."""
    is_engine = any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__)
    return model if is_engine else None


def refresh_master_weights_(engine: Any) -> None:
    """Let a DeepSpeed optimizer take over the model's weights, of which it keeps copies."""
    refresh = getattr(engine.optimizer, "refresh_fp32_params", None)
    if refresh is not None:
        refresh()


def _by_rows(parameter: DTensor) -> bool:
    return all(isinstance(p, Replicate) or p == Shard(0) for p in parameter.placements)
