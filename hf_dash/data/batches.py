"""Training batches whose sizes within an epoch differ by at most one.

Flow: examples in a new random order every epoch → as many batches as before, none of them left with
the remainder.
Source: the order is torch's ``RandomSampler``'s.
Differs from a ``DataLoader`` with ``shuffle``: there the last batch holds what is left, down to one
image, which batch norm refuses; and a small last batch disturbs training. Nothing is dropped.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler


def even_sizes(
    num_examples: int, batch_size: int, num_processes: int = 1, *, drop_last: bool = False
) -> list[int]:
    """Return the sizes of an epoch's batches, all processes together.

    Args:
        num_examples: at least 0.
        batch_size: the largest size, at least 1.
        num_processes: of whose number the number of batches is a multiple, if there are enough
            examples.
        drop_last: make all batches of ``batch_size``, or one per process where there are fewer
            examples, and leave out the rest.

    Returns:
        Sizes that differ by at most one and add up to ``num_examples``; with ``drop_last`` one
        size, whose sum may be less.

    Example:
        >>> from hf_dash.data.batches import even_sizes
        >>> even_sizes(13, 4), even_sizes(13, 4, num_processes=2)
        ([3, 3, 3, 4], [3, 3, 3, 4])
        >>> even_sizes(13, 4, drop_last=True)
        [4, 4, 4]
    """
    if drop_last:
        size = min(batch_size, num_examples // num_processes)
        return [size] * (num_examples // (size * num_processes) * num_processes if size else 0)
    num_batches = num_processes * math.ceil(num_examples / (batch_size * num_processes))
    return cut_evenly(num_examples, min(num_batches, num_examples))


def cut_evenly(num_examples: int, num_batches: int) -> list[int]:
    """Return the sizes of so many batches, which differ by at most one."""
    ends = [num_examples * number // max(1, num_batches) for number in range(num_batches + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Return a weight for each class that makes all of them count equally.

    Args:
        counts: number of examples of each class.

    Returns:
        [classes]: n / (classes · n_c), as in scikit-learn, over the classes that occur; 0 for
        others. The mean over examples is 1.

    Example:
        >>> from hf_dash.data.batches import balanced_weights
        >>> balanced_weights([30, 10, 0]).tolist()  # 40 / (2 · 30), 40 / (2 · 10)
        [0.6666666865348816, 2.0, 0.0]
    """
    numbers = torch.tensor(counts, dtype=torch.float32)
    present = numbers > 0
    weights = numbers.sum() / (present.sum() * numbers.clamp(min=1))
    return torch.where(present, weights, torch.zeros(()))


class NewShareSampler(Sampler[int]):
    """The order of an epoch in which new examples have the same share everywhere.

    An epoch has as many places as there are examples. Old and new ones fill theirs in random
    orders of their own, which begin again where there are more places than examples.

    Args:
        num_old: number of old examples, whose indices come first; at least 1.
        num_new: number of new examples; at least 1.
        new_share: in (0, 1).
        seed: seed for the orders, at least 0; each epoch has its own.

    Example:
        >>> from hf_dash.data.batches import NewShareSampler
        >>> order = list(NewShareSampler(num_old=90, num_new=10, new_share=0.5, seed=0))
        >>> len(order), [sum(index >= 90 for index in order[i : i + 20]) for i in (0, 20, 80)]
        (100, [10, 10, 10])
    """

    def __init__(self, num_old: int, num_new: int, new_share: float, seed: int) -> None:
        self.num_old, self.num_new = num_old, num_new
        self.new_share, self.seed, self.epoch = new_share, seed, 0

    def __len__(self) -> int:
        return self.num_old + self.num_new

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        is_new = np.diff(np.floor(np.arange(len(self) + 1) * self.new_share + 0.5)) > 0
        order = np.empty(len(self), dtype=np.int64)
        order[is_new] = self.num_old + _repeated(self.num_new, int(is_new.sum()), generator)
        order[~is_new] = _repeated(self.num_old, int((~is_new).sum()), generator)
        return iter(order.tolist())


def _repeated(count: int, places: int, generator: np.random.Generator) -> np.ndarray:
    """Return so many of ``count`` numbers, in random orders one after the other."""
    orders = [generator.permutation(count) for _ in range(math.ceil(places / count))]
    return np.concatenate([np.zeros(0, dtype=np.int64), *orders])[:places]


class EvenBatchSampler(BatchSampler):
    """Batches of examples drawn by a sampler, with sizes that differ by at most one.

    Accelerate gives every process its batches; it takes a number of batches that the number of
    processes divides as it is.

    Args:
        sampler: draws the order, and has a length.
        batch_size: the largest size, per process.
        num_processes: that share the batches.
        drop_last: as for :func:`even_sizes`.

    Raises:
        ValueError: there are fewer examples than processes.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> from hf_dash.data.batches import EvenBatchSampler
        >>> list(EvenBatchSampler(SequentialSampler(range(5)), 4))
        [[0, 1], [2, 3, 4]]
    """

    def __init__(
        self,
        sampler: "Sampler[int]",
        batch_size: int,
        num_processes: int = 1,
        *,
        drop_last: bool = False,
    ) -> None:
        self.sampler = sampler
        self.drop_last = False  # of what is drawn here nothing more is dropped
        # Accelerate takes a number here for the size of every batch and drops smaller ones.
        self.batch_size = None  # type: ignore[assignment]
        num_examples = len(sampler)  # type: ignore[arg-type]
        if num_examples < num_processes:
            raise ValueError(
                f"num_processes is {num_processes}, but there are only {num_examples} examples"
            )
        self.sizes: Sequence[int] = even_sizes(
            num_examples, batch_size, num_processes, drop_last=drop_last
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.sampler)
        for size in self.sizes:
            yield [next(order) for _ in range(size)]
