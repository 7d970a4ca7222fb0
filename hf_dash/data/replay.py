"""Bounded replay: a round trains on its new images and on a sample of the old ones.

Flow: settings → how many old images a round draws → how many from each arrival, and of each class
if classes are balanced → which ones → a ``Round`` of the drawn images and the new ones.
Source: experience replay (Rolnick et al., NeurIPS 2019, arXiv:1811.11682).
Differs: no buffer is kept. Old images stay where they are, and every round draws from all of them
anew; an arrival of which nothing is drawn is not opened. Where only whole row groups of a stream
can be read, images are drawn in runs that follow one another, so that few of the groups are read.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import numpy as np

from hf_dash.data.examples import ImageExamples
from hf_dash.data.names import shown
from hf_dash.data.rounds import Round
from hf_dash.data.streams import StreamedImages
from hf_dash.utils.checks import check_count, check_number
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)

STRATEGIES = ("uniform", "class_balanced", "recency")

# Images that are drawn together where reading one costs as much as reading its row group.
RUN = 32

Images: TypeAlias = ImageExamples | StreamedImages

# Rows of an arrival, by class.
ClassRows: TypeAlias = Callable[[Images], list[np.ndarray]]


@dataclass(frozen=True)
class Replay:
    """How many old images a round trains on, and which.

    Args:
        samples: an integer of at least 1 is a number of images; any other number, above 0, is a
            ratio to the new images of the round, so 1 is one image and 1.0 as many as are new.
            None trains on all old images.
        strategy: ``"uniform"`` gives every old image the same chance; ``"class_balanced"`` draws
            equally many of each class, and all of a class that has fewer; ``"recency"`` gives an
            image that arrived j rounds ago the weight 1/j.
        new_share: share of the new images in every batch, in (0, 1); None mixes in proportion. An
            epoch keeps its length: of the kind that is too few for it, images come again.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> digits = hf_dash.load_images("digits").select(range(90))
        >>> rounds = list(hf_dash.data.cut_rounds(digits, 3, pil_to_tensor))
        >>> drawn = hf_dash.data.Replay(samples=0.5).rounds(rounds, seed=0)
        >>> [round_.num_total for round_ in drawn], drawn[2].replay["num_old"]
        ([30, 45, 45], 60)
    """

    samples: int | float | None = None
    strategy: str = "uniform"
    new_share: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.samples, int):
            check_count("replay_samples", self.samples)
        elif self.samples is not None:
            check_number("replay_samples", self.samples, "(0, inf)", 0, np.inf)
        if self.strategy not in STRATEGIES:
            raise ValueError(f"replay_strategy must be one of {STRATEGIES}, got {self.strategy!r}")
        if self.new_share is not None:
            check_number("new_share", self.new_share, "(0, 1)", 0, 1)

    def rounds(self, rounds: Sequence[Round], seed: int) -> list[Round]:
        """Return rounds of their new images and a sample of the old ones, and say what was drawn.

        The sample of a round follows from the seed, its index, and the number and labels of the
        old images; it is the same on every process and for every start.

        Args:
            rounds: each of all images.
            seed: of the run, at least 0.

        Raises:
            ValueError: a round holds streams that can only be read from their beginning.
        """
        by_class = cache(_rows_by_class)
        applied = [self._applied(round_, seed, by_class) for round_ in rounds]
        self._say(rounds, applied, by_class)
        return applied

    def _applied(self, round_: Round, seed: int, by_class: ClassRows) -> Round:
        if self == Replay():
            return round_
        old = round_.arrivals[:-1]
        if self.samples is None or not old:
            return replace(round_, new_share=self.new_share)
        wanted = self.samples
        if not isinstance(wanted, int):
            wanted = max(1, round(wanted * round_.num_new))
        rows = self._draw(old, wanted, np.random.default_rng([seed, round_.index]), by_class)
        parts = [_part(arrival, own) for arrival, own in zip(old, rows, strict=True) if len(own)]
        record = {
            "samples": self.samples,
            "strategy": self.strategy,
            "seed": seed,
            "num_drawn": sum(len(own) for own in rows),
            "num_old": sum(len(arrival) for arrival in old),
            "num_arrivals": len(parts),
            "sha256": _digest(rows),
        }
        return replace(
            round_, arrivals=(*parts, round_.new), replay=record, new_share=self.new_share
        )

    def _draw(
        self,
        old: Sequence[Images],
        wanted: int,
        generator: np.random.Generator,
        by_class: ClassRows,
    ) -> list[np.ndarray]:
        """Return the rows to take of each arrival, in ascending order."""
        counts = np.array([len(arrival) for arrival in old])
        if wanted >= counts.sum():
            return [np.arange(count) for count in counts]
        if self.strategy == "class_balanced":
            return _balanced([by_class(arrival) for arrival in old], wanted, generator)
        if self.strategy == "recency":
            ages = np.arange(len(old), 0, -1)
            taken = whole(quotas(counts, counts / ages, wanted), generator)
        else:
            taken = generator.multivariate_hypergeometric(counts, wanted)
        return [
            _chosen(arrival, number, generator)
            for arrival, number in zip(old, taken.tolist(), strict=True)
        ]

    def _say(self, rounds: Sequence[Round], applied: Sequence[Round], by_class: ClassRows) -> None:
        drawn = {one.index: one.replay for one in applied if one.replay is not None}
        if not drawn:
            return
        told = [f"{r['num_drawn']:,} of {r['num_old']:,} in round {i}" for i, r in drawn.items()]
        logger.info(
            "old images are replayed (%s, seed %d): %s; every start sees these and the new ones"
            " alone, a cold start too",
            *(self.strategy, next(iter(drawn.values()))["seed"], shown(told)),
        )
        few = [i for i, r in drawn.items() if r["num_drawn"] == r["num_old"]]
        if few:
            logger.warning(
                "replay_samples %s: all old images are taken in the rounds %s, which have no more",
                *(self.samples, shown([str(index) for index in few])),
            )
        if self.strategy == "class_balanced":
            _say_unseen(next(one for one in rounds if one.index == max(drawn)), by_class)


def parse_samples(value: str | int | float | None) -> int | float | None:
    """Return the number that a flag's text stands for: with a decimal point a ratio, else a count.

    Raises:
        ValueError: the text is not a number.

    Example:
        >>> from hf_dash.data.replay import parse_samples
        >>> parse_samples("1"), parse_samples("1.0"), parse_samples(None)
        (1, 1.0, None)
    """
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "." in value else int(value)
    except ValueError:
        raise ValueError(
            "replay_samples must be a number of images, such as 500, or a ratio to the new images"
            f" with a decimal point, such as 1.0, got {value!r}"
        ) from None


def quotas(counts: np.ndarray, weights: np.ndarray, wanted: int) -> np.ndarray:
    """Share a number out in proportion to weights, where no part can give more than it has.

    Args:
        counts: what each part has, at least 0.
        weights: of the parts, at least 0; above 0 where there is something.
        wanted: at most the sum of ``counts``.

    Returns:
        Real numbers that add up to ``wanted``; what full parts cannot give, the others give in
        proportion.

    Example:
        >>> import numpy as np
        >>> from hf_dash.data.replay import quotas
        >>> quotas(np.array([1, 9, 9, 0]), np.array([1, 1, 2, 1]), 7).tolist()
        [1.0, 2.0, 4.0, 0.0]
    """
    shares = np.zeros(len(counts))
    open_ = counts > 0
    while open_.any():
        level = (wanted - shares[~open_].sum()) / weights[open_].sum()
        full = open_ & (weights * level >= counts)
        if not full.any():
            shares[open_] = weights[open_] * level
            break
        shares[full] = counts[full]
        open_ &= ~full
    return shares


def whole(shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Round real numbers with a whole sum up or down at random, so that sum and means stay.

    Source: systematic sampling (Madow, 1949).

    Example:
        >>> import numpy as np
        >>> from hf_dash.data.replay import whole
        >>> int(whole(np.array([0.5, 1.25, 1.25]), np.random.default_rng(0)).sum())
        3
    """
    below = np.floor(shares + 1e-9)
    ends = np.round(np.cumsum([0.0, *(shares - below).clip(min=0)]), 6)
    more = np.diff(np.floor(ends + generator.random() * (1 - 1e-6)))
    return (below + more).astype(np.int64)


def _part(arrival: Images, rows: np.ndarray) -> Images:
    return arrival if len(rows) == len(arrival) else arrival.select(rows)


def _chosen(arrival: Images, number: int, generator: np.random.Generator) -> np.ndarray:
    """Return so many rows of an arrival, in ascending order."""
    count = len(arrival)
    if isinstance(arrival, ImageExamples) or arrival.is_scattered:
        return np.sort(generator.choice(count, number, replace=False, shuffle=False))
    runs = generator.permutation(math.ceil(count / RUN))[:, None] * RUN + np.arange(RUN)
    return np.sort(runs[runs < count][:number])


def _rows_by_class(arrival: Images) -> list[np.ndarray]:
    labels = np.array(arrival.labels, dtype=np.int64)
    ends = np.cumsum(np.bincount(labels))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])


def _class_counts(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Return the number of examples of each class in each arrival, [arrivals, classes]."""
    counts = np.zeros((len(rows), max(len(own) for own in rows)), dtype=np.int64)
    for place, own in enumerate(rows):
        counts[place, : len(own)] = [len(one) for one in own]
    return counts


def _balanced(
    rows: Sequence[Sequence[np.ndarray]], wanted: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Return rows of each arrival, equally many of each class; ``rows`` are given by class."""
    counts = _class_counts(rows)
    totals = counts.sum(axis=0)
    of_class = whole(quotas(totals, np.ones(len(totals)), wanted), generator)
    taken = np.stack(
        [
            generator.multivariate_hypergeometric(column, number)
            for column, number in zip(counts.T, of_class.tolist(), strict=True)
        ],
        axis=1,
    )
    drawn = []
    for own, numbers in zip(rows, taken.tolist(), strict=True):
        parts = [
            generator.choice(one, number, replace=False, shuffle=False)
            for one, number in zip(own, numbers, strict=False)
            if number
        ]
        drawn.append(np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64))
    return drawn


def _digest(rows: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for place, own in enumerate(rows):
        digest.update(np.array([place, len(own), *own], dtype="<i8").tobytes())
    return digest.hexdigest()


def _say_unseen(round_: Round, by_class: ClassRows) -> None:
    """Name the classes that the model knows and of which no old image can be drawn."""
    old = [by_class(arrival) for arrival in round_.arrivals[:-1]]
    totals = _class_counts(old).sum(axis=0).tolist()
    names = round_.label_names or [str(index) for index in range(len(totals))]
    missing = [name for index, name in enumerate(names) if not sum(totals[index : index + 1])]
    if missing:
        logger.warning(
            "class_balanced: round %d has no old image of the classes %s",
            *(round_.index, shown(missing)),
        )
