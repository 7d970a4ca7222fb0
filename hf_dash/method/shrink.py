"""From the averaged gradient to smaller weights.

Flow: G and w, vector by vector → cosine → factor in [λ, 1] → w multiplied in place → report.
Source: Algorithm 1 (arXiv:2410.23495): w ← w · clamp(cos(G, w), min=λ, max=1). With a base w₀ the
change since it takes the place of w: w ← w₀ + (w − w₀) · clamp(cos(G, w − w₀), λ, 1).
Differs from the authors' commit 3d3cea6: the cosine is free of scale. ``cosine_similarity`` raises
each norm to at least 1e-8, so there vectors with tiny gradients count as disagreeing.
Symbols: G (``gradient``), w (``weight``), λ (``lam``).
"""

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_dash.method.base import Base
from hf_dash.method.config import ZERO, DashConfig
from hf_dash.method.gradients import GradientAverage
from hf_dash.method.tensors import ShrinkableTensor, is_sharded
from hf_dash.utils.distributed import gather, local, whole, whole_like

# Elements whose factors are computed at a time; keeps the memory of the computation small.
SLICE = 2**18

# Squared norms that float32 holds with all their digits.
SAFE_SQUARES = (1e-28, 1e28)

# Equal bins from 0 to 1 that a report counts the factors of each tensor in.
HISTOGRAM_BINS = 20


class NoEffectWarning(UserWarning):
    """A call that should have changed weights changed none.

    Example:
        >>> import torch, warnings
        >>> from hf_dash import dash_shrink_
        >>> batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     report = dash_shrink_(torch.nn.Linear(3, 2), [batch], lam=1.0, disable_tqdm=True)
        >>> caught[-1].category.__name__
        'NoEffectWarning'
    """


@dataclass(frozen=True)
class TensorReport:
    """What happened to one tensor: its vectors' factors, each in [λ, 1].

    ``histogram`` counts them in ``HISTOGRAM_BINS`` equal bins from 0 to 1, for trackers that draw
    it; ``ShrinkReport.to_dict`` leaves it out.
    """

    name: str
    num_vectors: int
    mean_factor: float
    min_factor: float
    max_factor: float
    share_at_lam: float
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True)
class ShrinkReport:
    """What a shrink did, or would do.

    Args:
        tensors: one entry per tensor that shrinks, in the order of the model.
        untouched: names of the parameters left alone.
        config: the settings.
        num_batches: minibatches read by each process.
        num_images: images read by all processes.
        seconds: duration of the pass and the shrink.
        dry_run: True where the weights were left as they are.
        towards_zero: names of the tensors that the base lacks, such as a new head, which shrank
            towards zero; empty without a base.
        no_gradient: those of the untouched that could have shrunk, but got no gradient in any
            minibatch.

    Example:
        >>> import torch
        >>> from hf_dash import dash_shrink_
        >>> batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> report = dash_shrink_(torch.nn.Linear(3, 2), [batch], disable_tqdm=True)
        >>> [tensor.name for tensor in report.tensors]
        ['weight', 'bias']
        >>> 0.3 <= report.mean_factor <= 1
        True
    """

    tensors: tuple[TensorReport, ...]
    untouched: tuple[str, ...]
    config: DashConfig
    num_batches: int
    num_images: int
    seconds: float
    dry_run: bool = False
    towards_zero: tuple[str, ...] = ()
    no_gradient: tuple[str, ...] = ()

    @property
    def num_vectors(self) -> int:
        """Number of vectors over all tensors."""
        return sum(tensor.num_vectors for tensor in self.tensors)

    @property
    def mean_factor(self) -> float:
        """Mean factor over all vectors."""
        return sum(t.mean_factor * t.num_vectors for t in self.tensors) / self.num_vectors

    @property
    def share_at_lam(self) -> float:
        """Share of all vectors whose factor is λ, the smallest allowed."""
        return sum(t.share_at_lam * t.num_vectors for t in self.tensors) / self.num_vectors

    def summary(self) -> dict[str, float]:
        """Return the few numbers worth logging, under names that begin with ``dash/``."""
        return {
            "dash/mean_factor": self.mean_factor,
            "dash/share_at_lam": self.share_at_lam,
            "dash/num_batches": self.num_batches,
            "dash/num_images": self.num_images,
            "dash/seconds": round(self.seconds, 4),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        overall = {"mean_factor": self.mean_factor, "share_at_lam": self.share_at_lam}
        plain = asdict(self)
        for tensor in plain["tensors"]:
            del tensor["histogram"]
        return {
            **plain,
            "tensors": list(plain["tensors"]),
            "untouched": list(self.untouched),
            "towards_zero": list(self.towards_zero),
            "no_gradient": list(self.no_gradient),
            **overall,
        }

    def __str__(self) -> str:
        did = "would shrink" if self.dry_run else "shrank"
        variant = "" if self.config.variant is None else f", {self.config.variant} variant"
        based = self.config.base not in (None, ZERO)
        towards = f" towards {self.config.base}" if based else ""
        lines = [
            f"DASH {did} {self.num_vectors} vectors in {len(self.tensors)} tensors{towards}: mean"
            f" factor {self.mean_factor:.3f}, {self.share_at_lam:.1%} at λ = {self.config.lam}"
            f" (α = {self.config.alpha}, {self.num_batches} minibatches, {self.num_images} images,"
            f" {self.seconds:.2f} s; {len(self.untouched)} parameters untouched{variant})",
        ]
        if self.towards_zero:
            names = ", ".join(self.towards_zero)
            lines.append(f"towards zero, since the base lacks them: {names}")
        if self.no_gradient:
            lines.append(
                f"untouched, since no gradient reached them: {', '.join(self.no_gradient)}"
            )
        width = max(len(tensor.name) for tensor in self.tensors)
        lines.append(f"{'tensor':<{width}}  vectors   mean    min    max   at λ")
        lines += [
            f"{t.name:<{width}}  {t.num_vectors:7d}  {t.mean_factor:.3f}  {t.min_factor:.3f}"
            f"  {t.max_factor:.3f}  {t.share_at_lam:5.1%}"
            for t in self.tensors
        ]
        return "\n".join(lines)


def shrink_factors(gradient: Tensor, weight: Tensor, dims: tuple[int, ...], lam: float) -> Tensor:
    """Return clamp(cos(G, w), λ, 1) for every vector.

    Args:
        gradient: G, of any shape.
        weight: w, of the same shape.
        dims: the dimensions one vector spans.
        lam: the smallest factor, in [0, 1].

    Returns:
        The factors, of the same shape with ``dims`` reduced to 1. A vector whose w or G is zero
        has cosine 0, hence factor λ.
    """
    g, w = _as_rows(gradient, dims), _as_rows(weight.to(gradient.dtype), dims)
    squares = _dots(g, g), _dots(w, w)
    cosine = _dots(g, w) / (squares[0].sqrt() * squares[1].sqrt())
    # Squares of very small or large numbers leave float32: these few are computed with more care.
    low, high = SAFE_SQUARES
    odd = ~((squares[0] > low) & (squares[0] < high) & (squares[1] > low) & (squares[1] < high))
    if odd.any():
        cosine[odd] = _dots(_unit(g[odd]), _unit(w[odd]))
    shape = _reduced(gradient, dims)
    factors: Tensor = cosine.clamp_(min=lam, max=1.0).view(shape)
    return factors


def _reduced(tensor: Tensor, dims: tuple[int, ...]) -> list[int]:
    """Return the shape of one number per vector, with ``dims`` reduced to 1."""
    return [1 if dim in dims else size for dim, size in enumerate(tensor.shape)]


def _as_rows(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return a tensor [vectors, elements], to be read only: it may be a copy."""
    others = [dim for dim in range(tensor.ndim) if dim not in dims]
    vectors = math.prod(tensor.shape[dim] for dim in others)
    return tensor.permute(*others, *dims).reshape(vectors, -1)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each pair of rows, in full precision even under autocast."""
    # Not vecdot or a matmul: autocast and TF32 would round their inputs.
    return (left * right).sum(1)


def _unit(rows: Tensor) -> Tensor:
    """Scale every row to length 1 whatever its size; zero rows stay zero."""
    largest = rows.abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled.div_(torch.where(norm > 0, norm, 1))


@torch.no_grad()
def all_factors(
    tensors: list[ShrinkableTensor], average: GradientAverage, lam: float, base: Base | None = None
) -> list[Tensor]:
    """Return the factors of every tensor; uses up ``average``, whose memory they take.

    Of a sharded tensor each process gets the factors of its own rows, and all those of vectors
    that are cut across processes.

    Args:
        tensors: what shrinks.
        average: G.
        lam: the smallest factor, in [0, 1].
        base: the checkpoint to shrink towards; None stands for zero.

    Raises:
        FloatingPointError: a factor is not finite, because a weight is not.
    """
    factors = []
    for tensor, part in zip(tensors, average.parts, strict=True):
        if tensor.is_cut:
            gradient, weight = whole_like(part, tensor.parameter), whole(tensor.parameter)
            if base is not None and base.holds(tensor):
                weight = weight - base.origin(tensor, whole=True)
            factors.append(shrink_factors(gradient, weight, tensor.dims, lam))
        else:
            factors.append(_factors_in_place(part, tensor, lam, base))
    finite = [bool(factor.isfinite().all()) for factor in factors]
    names = [tensor.name for tensor, good in zip(tensors, finite, strict=True) if not good]
    if is_sharded(tensors):
        # The bad weight may be in the rows of another process.
        names = sorted({name for rank in gather(names) for name in rank})
    if names:
        raise FloatingPointError(f"factors of {names} are not finite; no weight was changed")
    return factors


def _factors_in_place(
    gradient: Tensor, tensor: ShrinkableTensor, lam: float, base: Base | None
) -> Tensor:
    """Compute factors slice by slice and write them over the beginning of the gradient's memory.

    A slice never has more factors than elements, so what is overwritten has been read.
    """
    shape, weight = _reduced(gradient, tensor.dims), tensor.values()
    factors = gradient.view(-1)[: math.prod(shape)].view(shape)
    for rows in _slices(gradient, tensor.dims):
        change = weight[rows]
        if base is not None and base.holds(tensor):
            change = change - base.origin(tensor, rows)
        values = shrink_factors(gradient[rows], change, tensor.dims, lam)
        factors[rows if 0 not in tensor.dims else slice(None)] = values
    return factors


def _slices(tensor: Tensor, dims: tuple[int, ...]) -> list[slice]:
    """Return rows that are few at a time and cut no vector."""
    rows = tensor.shape[0]
    if 0 in dims:
        return [slice(0, rows)]
    step = max(1, SLICE * rows // max(1, tensor.numel()))
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


@torch.no_grad()
def shrink_(
    tensors: list[ShrinkableTensor], factors: list[Tensor], base: Base | None = None
) -> None:
    """Multiply every vector, or its change since the base, by its factor, in place.

    Args:
        tensors: what to shrink.
        factors: one tensor of factors each, as :func:`all_factors` returns them.
        base: the checkpoint to shrink towards; None stands for zero.

    Warns:
        NoEffectWarning: every factor is 1, or the weights are those of the base.
    """
    changed = False
    for tensor, factor in zip(tensors, factors, strict=True):
        weight = tensor.view(local(tensor.parameter))
        if base is None or not base.holds(tensor):
            weight.mul_(tensor.spread(factor))
            changed = changed or not bool((factor == 1).all())
            continue
        for rows in _slices(weight, tensor.dims):
            own = factor if 0 in tensor.dims else factor[rows]
            origin = base.origin(tensor, rows)
            shrunk = origin + (weight[rows] - origin) * own
            # A factor of 1 keeps the weight to the bit, which the sum does not promise.
            shrunk = torch.where(own == 1, weight[rows], shrunk.to(weight.dtype))
            changed = changed or not torch.equal(shrunk, weight[rows])
            weight[rows] = shrunk
    if not changed:
        reason = "every factor is 1" if base is None else f"the weights are those of {base.name}"
        warnings.warn(f"the shrink changed nothing: {reason}", NoEffectWarning, stacklevel=3)


def report_tensors(
    tensors: list[ShrinkableTensor], factors: list[Tensor], lam: float
) -> tuple[TensorReport, ...]:
    """Sum up the factors of every tensor, over all processes where it is sharded."""
    rows = [_sums(factor, lam) for factor in factors]
    by_rank = gather(rows) if is_sharded(tensors) else [rows]
    reports = []
    for index, tensor in enumerate(tensors):
        held = [rank[index] for rank in by_rank if rank[index] is not None]
        # Every process has the factors of a vector that is cut: the first will do.
        held = held[:1] if tensor.is_cut else held
        counts, sums, at_lam, lowest, highest, *bins = zip(*held, strict=True)
        count = sum(counts)
        mean, share = sum(sums) / count, sum(at_lam) / count
        histogram = tuple(int(sum(bin_)) for bin_ in bins)
        reports.append(
            TensorReport(tensor.name, count, mean, min(lowest), max(highest), share, histogram)
        )
    return tuple(reports)


def _sums(factor: Tensor, lam: float) -> tuple[float, ...] | None:
    """Return count, sum, number at λ, smallest, largest, and the number in each bin.

    None where this process has none.
    """
    if factor.numel() == 0:
        return None
    at_lam = (factor <= lam).sum().to(factor.dtype)
    numbers = torch.stack([factor.sum(), at_lam, factor.amin(), factor.amax()])
    # Not histc, which has no deterministic form on some devices; bincount of integers has.
    bins = (factor.flatten() * HISTOGRAM_BINS).long().clamp_(0, HISTOGRAM_BINS - 1)
    counts = torch.bincount(bins, minlength=HISTOGRAM_BINS)
    return (factor.numel(), *torch.cat([numbers, counts.to(factor.dtype)]).tolist())
