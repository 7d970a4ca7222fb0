"""What the gradient pass needs of other processes: agreement, then one mean.

Every rank keeps its own moving average and nothing is exchanged until the end: the average is
linear in the gradients, so the mean of the ranks' averages is the average of the mean gradients.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

_REFUSED = {
    "FullyShardedDataParallel": "FSDP1 keeps flattened shards, in which no vector is whole",
    "FSDPModule": "FSDP2 keeps sharded tensors, which the pass does not read yet",
    "DeepSpeedEngine": "DeepSpeed owns the backward pass",
    "DataParallel": "DataParallel replicas do not fire the hooks of the pass; use DDP",
}


@dataclass(frozen=True)
class RankStatus:
    """What one rank has to tell the others before the mean.

    Args:
        batch_sizes: number of images in each of its minibatches, oldest to newest.
        error: the message of what went wrong on it, or None.
    """

    batch_sizes: tuple[int, ...]
    error: str | None = None


def num_processes() -> int:
    """Return the number of processes of the default group, 1 where none is set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def refuse_unsupported(model: nn.Module) -> None:
    """Refuse the wrappers the pass cannot work through.

    Raises:
        NotImplementedError: ``model`` or one of its modules is wrapped by FSDP, DeepSpeed or
            ``nn.DataParallel``; the message says which and why.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _REFUSED:
                raise NotImplementedError(
                    f"hf_dash cannot shrink a model under {cls.__name__}: {_REFUSED[cls.__name__]}"
                )


def agree(status: RankStatus) -> None:
    """Let all ranks learn of each other's batches and errors, so that all go on or none.

    Raises:
        RuntimeError: another rank failed.
        ValueError: the ranks have different batch counts or sizes, so that their mean would not
            be the gradient of the global minibatches.
    """
    if num_processes() == 1:
        return
    statuses: list[RankStatus | None] = [None] * num_processes()
    dist.all_gather_object(statuses, status)
    for rank, other in enumerate(statuses):
        assert other is not None
        if other.error is not None and status.error is None:
            raise RuntimeError(f"the gradient pass failed on rank {rank}: {other.error}")
    sizes = {rank: other.batch_sizes for rank, other in enumerate(statuses) if other is not None}
    if status.error is None and len(set(sizes.values())) > 1:
        raise ValueError(
            "every rank must pass the same number of batches of the same sizes to the shrink, got"
            f" the sizes {sizes} by rank"
        )


def mean_across_ranks_(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its mean over all processes, with a single all-reduce."""
    if num_processes() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        tensor.div_(num_processes())
    return tensor


def synchronise(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock read next tells the truth."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
