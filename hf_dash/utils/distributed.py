"""What every process needs of the others: agreement, one mean, and whole tensors of sharded ones.

Plain and DDP models: every rank keeps its own moving average and exchanges nothing until the end.
The average is linear in the gradients, so the mean of the ranks' averages is the average of the
mean gradients.
FSDP2 models (``fully_shard``): every rank holds some rows of each tensor as a ``DTensor``. FSDP
itself has averaged the gradients, so rows stay where they are, and only vectors that are cut across
ranks, such as biases, are put together.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class RankStatus:
    """What one rank has to tell the others.

    Args:
        batch_sizes: number of images in each of its minibatches, oldest to newest.
        error: the message of what went wrong on it, or None.
        items: number of items, such as labels, that the loss of each is the mean of.
        reached: whether each tensor got a gradient.
    """

    batch_sizes: tuple[int, ...]
    error: str | None = None
    items: tuple[int, ...] = ()
    reached: tuple[bool, ...] = ()


def num_processes() -> int:
    """Return the number of processes of the default group, 1 where none is set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return this process's place among all, from 0."""
    return 0 if num_processes() == 1 else dist.get_rank()


def is_main_process() -> bool:
    """Tell whether this is the process that reports."""
    return process_index() == 0


def is_dtensor(tensor: object) -> "TypeGuard[DTensor]":
    """Tell whether a tensor is distributed.

    The module of such a tensor has been imported by whoever made it. To import it here would make
    ``import hf_dash`` a third slower for everyone else.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of a plain one."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def held_rows(tensor: Tensor) -> tuple[int, int]:
    """Return the first row of a tensor that this process holds, and how many rows it holds."""
    if not is_dtensor(tensor):
        return 0, tensor.shape[0]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return offset[0], shape[0]


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor on every process; gathers a sharded one."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def whole_like(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole of what ``part`` is this process's share of, sharded as ``like`` is."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    shape, stride = like.shape, torch.empty(like.shape, device="meta").stride()
    placed = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
    return whole(placed)


def agree(status: RankStatus) -> list[RankStatus]:
    """Let all ranks learn of each other's batches and errors, so that all go on or none.

    Returns:
        What every rank has told, in their order.

    Raises:
        RuntimeError: another rank failed.
        ValueError: the ranks have different batch counts or sizes, so that their mean would not
            be the gradient of the global minibatches.
    """
    statuses = gather(status)
    if status.error is not None:
        return statuses
    for rank, other in enumerate(statuses):
        if other.error is not None:
            raise RuntimeError(f"the gradient pass failed on rank {rank}: {other.error}")
    for what in ("batch_sizes", "items"):
        numbers = {rank: getattr(other, what) for rank, other in enumerate(statuses)}
        if len(set(numbers.values())) > 1:
            raise ValueError(
                "every rank must pass the same number of batches of the same sizes, with the same"
                f" number of labels that count, to the shrink, got the {what} {numbers} by rank"
            )
    return statuses


def by_main(action: Callable[[], Result]) -> Result:
    """Let the main process act alone; every process gets its result, or stops with it.

    Args:
        action: its result must be picklable.

    Raises:
        RuntimeError: on the other processes, where the action failed; the main one raises the
            error itself.
    """
    result: Any = None
    error: Exception | None = None
    if is_main_process():
        try:
            result = action()
        except Exception as failure:  # raised below, once the others know
            error = failure
    result, message = gather((result, None if error is None else str(error)))[0]
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(f"the main process failed: {message}")
    return result  # type: ignore[no-any-return]


def gather(item: Any) -> list[Any]:
    """Return what every rank brought, in the order of the ranks."""
    if num_processes() == 1:
        return [item]
    items = [None] * num_processes()
    dist.all_gather_object(items, item)
    return items


def mean_across_ranks_(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its mean over all processes, with a single all-reduce."""
    if num_processes() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        tensor.div_(num_processes())
    return tensor


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock read next tells the truth."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def hardware(accelerator: "Accelerator") -> str:
    """Name the processes, the kind of device and the precision, such as ``"2 × cuda, bf16"``."""
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"{accelerator.num_processes} × {accelerator.device.type}, {precision}"
