"""Held-out images: chosen by their content, never trained on; and shards that arrive twice.

Flow: arrivals that were read once → a share of their images held out → images that are both held
out and to be trained on refused, before anything is trained.
Differs from a random split: which image is held out depends on nothing but the image, so adding or
deleting others moves none.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hf_dash.data.arrivals import Arrival
from hf_dash.data.columns import label_names
from hf_dash.data.shards import RowNames
from hf_dash.data.survey import Survey
from hf_dash.utils.checks import refuse_unless
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)

# Pairs of images named in a message.
SHOWN = 3


def hold_out(arrival: Arrival, share: float) -> tuple[Arrival, Arrival | None]:
    """Hold out a share of an arrival's images, chosen by their content alone.

    Args:
        arrival: read once.
        share: of all images, in (0, 1). Of few images more or fewer may be chosen, or none.

    Returns:
        What is trained on, and what is held out; None if no image is.

    Raises:
        ValueError: no image is left to train on.
    """
    survey, names = _read(arrival)
    chosen = survey.content < np.uint64(share * 2**64)
    held_out, kept = survey.example_ids[chosen], survey.example_ids[~chosen]
    if len(kept) == 0:
        raise ValueError(
            f"train_val_split {share} holds out all {len(held_out)} images of {names.shards[0]}"
        )
    if len(held_out) == 0:
        return arrival, None
    return arrival.without(frozenset(held_out.tolist())), arrival.without(frozenset(kept.tolist()))


def check_overlap(
    arrivals: Sequence[Arrival], held_out: Arrival, *, allow_overlap: bool = False
) -> int:
    """Check that no held-out image is also a training image.

    Args:
        arrivals: read once.
        held_out: read once.
        allow_overlap: warn and continue.

    Returns:
        The number of held-out images that are.

    Raises:
        ValueError: there are some, and that is not allowed.
    """
    survey, names = _read(held_out)
    both = np.zeros(len(survey.content), dtype=bool)
    pairs: list[str] = []
    for arrival in arrivals:
        other, other_names = _read(arrival)
        found = np.isin(survey.content, other.content)
        both |= found
        for content, example_id in zip(
            survey.content[found][:SHOWN], survey.example_ids[found][:SHOWN], strict=True
        ):
            twin = other.example_ids[np.flatnonzero(other.content == content)[0]]
            pairs.append(f"{names.name(int(example_id))} = {other_names.name(int(twin))}")
    count = int(both.sum())
    if count == 0:
        return 0
    message = (
        f"{count:,} of {len(both):,} held-out images are also training images:"
        f" {', '.join(pairs[:SHOWN])}{', …' if count > SHOWN else ''}"
    )
    remedy = "; allow_overlap=True continues and records it"
    refuse_unless(allow_overlap, message, remedy, logger)
    return count


def drop_repeated(arrivals: Sequence[Arrival], num_kept: int = 0) -> list[Arrival]:
    """Leave out every shard whose images and labels all came in an earlier arrival or shard.

    Args:
        arrivals: read once, in the order in which they count.
        num_kept: so many of the first ones stay as they are.

    Returns:
        The arrivals; one of which nothing is left has no examples.
    """
    seen: dict[bytes, tuple[int, str]] = {}
    kept = []
    for index, arrival in enumerate(arrivals):
        survey, names = _read(arrival)
        repeated: set[int] = set()
        files = list(arrival.files)
        ends = [*names.starts[1:], int(survey.example_ids.max(initial=0)) + 1]
        for shard, start, end in zip(names.shards, names.starts, ends, strict=True):
            inside = (survey.example_ids >= start) & (survey.example_ids < end)
            if not inside.any():
                continue
            digest = _digest(arrival, survey, inside)
            if seen.setdefault(digest, (index, shard)) == (index, shard) or index < num_kept:
                continue
            repeated |= set(survey.example_ids[inside].tolist())
            files = [file for file in files if file != shard]
            logger.warning("%s has the same images as %s: counted once", shard, seen[digest][1])
        kept.append(replace(arrival.without(frozenset(repeated)), files=tuple(files)))
    return kept


def _digest(arrival: Arrival, survey: Survey, inside: np.ndarray) -> bytes:
    """Return what tells a shard's labeled images from others, whatever their order."""
    names = [hashlib.sha256(name.encode()).digest() for name in label_names(arrival.dataset)]
    classes = np.array([int.from_bytes(name[:8], "big") for name in names], dtype=np.uint64)
    rows = np.stack([classes[survey.labels[inside]], survey.content[inside]])
    return hashlib.sha256(rows[:, np.lexsort(rows)].tobytes()).digest()


def _read(arrival: Arrival) -> tuple[Survey, RowNames]:
    if arrival.survey is None or arrival.names is None:
        raise ValueError("arrival must have been read once, got one without a survey")
    return arrival.survey, arrival.names
