"""A training step recorded as one CUDA graph: the host launches it whole, not kernel by kernel.

Flow: the first steps of a shape run as they are, on a stream of their own → one step is recorded,
over tensors that keep their place → every further batch is copied there and the record replayed.
Source: "CUDA graphs, whole-network capture" in PyTorch's notes. ``torch.compile`` with
``mode="reduce-overhead"`` records forward and backward only; what the optimizer, Accelerate and
the guards cost the host stays.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor

Step = Callable[[Mapping[str, Tensor]], Tensor]

# Takes what is to be recorded; gives how to replay it, and the tensor that every replay writes.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]

# Modes of torch.compile that record CUDA graphs themselves.
RECORDING = ("reduce-overhead", "max-autotune")

# Steps of a shape before one is recorded: they compile, choose algorithms and make the optimizer's
# state, none of which can be recorded.
WARM_UP = 2


def records_itself(accelerator: Accelerator) -> bool:
    """Tell whether ``torch.compile`` records what it compiles, as the accelerator sets it up."""
    plugin = accelerator.state.dynamo_plugin
    return plugin.backend != DynamoBackend.NO and plugin.mode in RECORDING


def check_recordable(accelerator: Accelerator) -> None:
    """Check that a training step can be recorded.

    Raises:
        ValueError: ``cuda_graphs`` is asked for, but there is no CUDA device, there are several
            processes, gradients are scaled, or ``torch.compile`` records already.
    """
    mode = accelerator.state.dynamo_plugin.mode
    hindrances = {
        f"on {accelerator.device.type}": accelerator.device.type != "cuda",
        f"with {accelerator.num_processes} processes": accelerator.num_processes > 1,
        "with fp16, whose scaled gradients the host looks at": accelerator.scaler is not None,
        f"with torch.compile's mode {mode!r}, which records too": records_itself(accelerator),
    }
    for hindrance, applies in hindrances.items():
        if applies:
            raise ValueError(f"cuda_graphs must be False {hindrance}")


def record_cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a step as one CUDA graph; it is not computed yet."""
    graph = torch.cuda.CUDAGraph()
    # Threads that load data may allocate meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result


class RecordedStep:
    """A training step that is recorded for each shape of batch and then replayed.

    Args:
        step: takes a batch of tensors on the device to a tensor, changes weights in place, and
            never waits for the device.
        record: see :data:`Recorder`.
    """

    def __init__(self, step: Step, record: Recorder = record_cuda_graph) -> None:
        self._step, self._record = step, record
        self._seen: Counter[Any] = Counter()
        self._recorded: dict[Any, tuple[dict[str, Tensor], Callable[[], None], Tensor]] = {}

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the step; what it gives holds until the next one."""
        shape = tuple((name, value.shape, value.dtype) for name, value in batch.items())
        if shape not in self._recorded:
            self._seen[shape] += 1
            if self._seen[shape] <= WARM_UP:
                return self._aside(batch)
            places = {name: value.clone() for name, value in batch.items()}
            self._recorded[shape] = (places, *self._record(lambda: self._step(places)))
        places, replay, result = self._recorded[shape]
        for name, value in batch.items():
            places[name].copy_(value)
        replay()
        return result

    def _aside(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute a step as it is, on another stream, as PyTorch asks for before a recording."""
        if not torch.cuda.is_available():
            return self._step(batch)
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self._step(batch)
        current.wait_stream(stream)
        return result
