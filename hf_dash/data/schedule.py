"""What arrives when: all rounds of a run, and the held-out images.

Flow: ``DataConfig`` → one dataset cut into equal arrivals; or shards that appear over time, where
those that no recorded round has seen make the next rounds; or the datasets of a single round →
``Round`` objects and held-out examples, with classes matched by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset, concatenate_datasets

from hf_dash.data.columns import AnyDataset, label_names
from hf_dash.data.examples import ImageExamples, Transform
from hf_dash.data.rounds import Round, cut_arrivals
from hf_dash.data.shards import (
    Arrival,
    EmptyArrivalError,
    arrivals_root,
    check_schema,
    load_arrival,
    new_arrivals,
)
from hf_dash.data.sources import DataConfig, in_arrival_order
from hf_dash.data.streams import StreamedImages
from hf_dash.history import RoundRecord
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)

# Examples of a stream to draw the next one from.
BUFFER_SIZE = 10_000


@dataclass(frozen=True)
class Schedule:
    """All arrivals of a run so far, and its held-out images.

    Args:
        arrivals: one per round, oldest first.
        held_out: with the columns ``image`` and ``label``.
        cache_images: keep decoded images in memory.
        first_names: classes that come first in the model, before those of the arrivals.
        held_out_split: name of the held-out images, for the card.

    Example:
        >>> import hf_dash
        >>> config = hf_dash.DataConfig("digits")
        >>> (schedule,) = hf_dash.data.load_schedules(config, [0], 3, 100, [])
        >>> model = hf_dash.create_model("test_resnet", label_names=list(schedule.label_names()))
        >>> rounds = schedule.rounds(hf_dash.models.image_transform(model))
        >>> [round_.num_total for round_ in rounds]
        [100, 200, 300]
    """

    arrivals: tuple[Arrival, ...]
    held_out: Dataset
    cache_images: bool = True
    first_names: tuple[str, ...] = ()
    held_out_split: str = "test"

    def label_names(self, num_rounds: int | None = None) -> tuple[str, ...]:
        """Return the names of all classes in the first ``num_rounds`` arrivals, oldest first."""
        named = [name for a in self.arrivals[:num_rounds] for name in label_names(a.dataset)]
        return tuple(dict.fromkeys([*self.first_names, *named]))

    def rounds(
        self, transform: Transform, *, label_noise: float = 0.0, noise_seed: int = 0
    ) -> list[Round]:
        """Return the rounds.

        Args:
            transform: from a PIL image to a tensor.
            label_noise: fraction of each arrival that gets wrong labels, in [0, 1].
            noise_seed: seed for choosing them; the choice differs between arrivals.

        Raises:
            ValueError: ``label_noise`` is set and the arrivals are streams.
        """
        names = self.label_names()
        examples = tuple(
            self._examples(arrival, transform, names, label_noise, noise_seed + 1000 * index)
            for index, arrival in enumerate(self.arrivals)
        )
        return [
            Round(
                index,
                examples[:index],
                self.label_names(index),
                self.arrivals[index - 1].files,
                self.arrivals[index - 1].skipped,
            )
            for index in range(1, len(examples) + 1)
        ]

    def _examples(
        self,
        arrival: Arrival,
        transform: Transform,
        names: tuple[str, ...],
        label_noise: float,
        noise_seed: int,
    ) -> ImageExamples | StreamedImages:
        label_ids = [names.index(name) for name in label_names(arrival.dataset)]
        if isinstance(arrival.dataset, IterableDataset):
            if label_noise:
                raise ValueError(f"label_noise must be 0 for streams, got {label_noise!r}")
            return StreamedImages(
                arrival.dataset,
                transform,
                num_examples=arrival.num_examples,
                label_ids=label_ids,
                cache=self.cache_images,
                fingerprint=arrival.fingerprint,
            )
        return ImageExamples(
            arrival.dataset,
            transform,
            in_memory=self.cache_images,
            label_ids=label_ids,
            label_noise=label_noise,
            noise_seed=noise_seed,
            fingerprint=arrival.fingerprint,
        )

    def held_out_examples(
        self, transform: Transform, *, allow_unknown: bool = True
    ) -> ImageExamples:
        """Return the held-out examples; a class that no arrival contains gets the label −1.

        Args:
            transform: from a PIL image to a tensor.
            allow_unknown: False refuses such classes.

        Raises:
            ValueError: there is such a class and ``allow_unknown`` is False.
        """
        known = {name: index for index, name in enumerate(self.label_names())}
        unknown = [name for name in label_names(self.held_out) if name not in known]
        if unknown and not allow_unknown:
            raise ValueError(
                f"neither the model nor the training images know the labels {unknown} of the"
                " held-out images"
            )
        label_ids = [known.get(name, -1) for name in label_names(self.held_out)]
        return ImageExamples(
            self.held_out, transform, in_memory=self.cache_images, label_ids=label_ids
        )


def load_schedules(
    data: DataConfig,
    seeds: Sequence[int],
    num_rounds: int,
    examples_per_round: int | None,
    records: Sequence[RoundRecord],
) -> list[Schedule]:
    """Return one schedule per seed; if shards arrive, all seeds share one.

    Args:
        data: where the images come from and how they arrive.
        seeds: seeds for the order of arrival, at least one.
        num_rounds: number of rounds to cut one dataset into.
        examples_per_round: size of a round of one dataset; None uses all of it.
        records: recorded rounds of the run.

    Example:
        >>> import hf_dash
        >>> config = hf_dash.DataConfig("digits")
        >>> first, second = hf_dash.data.load_schedules(config, [0, 1], 2, 10, [])
        >>> [arrival.num_examples for arrival in first.arrivals]
        [10, 10]
    """
    if data.arrive_by == "files":
        return [file_schedule(data, records)] * len(seeds)
    train, held_out = data.load_train(), data.load_held_out()
    return [
        cut_schedule(
            train,
            held_out,
            num_rounds=num_rounds,
            seed=seed,
            examples_per_round=examples_per_round,
            cache_images=data.cache_images,
        )
        for seed in seeds
    ]


def cut_schedule(
    train: AnyDataset,
    held_out: AnyDataset,
    *,
    num_rounds: int,
    seed: int,
    examples_per_round: int | None = None,
    cache_images: bool = True,
) -> Schedule:
    """Let one dataset arrive in equal rounds, in a random order.

    Args:
        train: from :func:`~hf_dash.data.sources.load_images`.
        held_out: from :func:`~hf_dash.data.sources.load_images`.
        num_rounds: at least 1.
        seed: seed for the order.
        examples_per_round: size of an arrival; None uses the whole dataset.
        cache_images: keep decoded images in memory.

    Raises:
        ValueError: the dataset has too few examples.
    """
    wanted = None if examples_per_round is None else examples_per_round * num_rounds
    arriving = in_arrival_order(train, seed=seed, num_examples=wanted)
    arrivals = tuple(Arrival((), part, len(part)) for part in cut_arrivals(arriving, num_rounds))
    return Schedule(arrivals, in_arrival_order(held_out, seed=0), cache_images)


def file_schedule(data: DataConfig, records: Sequence[RoundRecord]) -> Schedule:
    """Let shards arrive: those of recorded rounds as before, new ones in new rounds.

    Args:
        data: ``dataset_name`` is the directory or glob; ``files_per_round`` is the number of new
            shards per round.
        records: recorded rounds of the run, of any start and seed.

    Raises:
        ValueError: there is nothing to train on; a shard of an earlier round has disappeared or
            cannot be read.
    """
    root = arrivals_root(data.dataset_name)
    past = {r.round_index: r for r in records if r.files is not None}
    seen = [past[index] for index in sorted(past)]
    new = new_arrivals(data.dataset_name, [name for r in seen for name in r.files or ()])
    size = data.files_per_round or max(1, len(new))
    groups: list[tuple[list[Path], list[str] | None]] = [
        ([root / name for name in r.files or ()], list(r.skipped or ())) for r in seen
    ]
    groups += [(new[begin : begin + size], None) for begin in range(0, len(new), size)]
    if not new:
        logger.warning("nothing new in %s since round %d: no new round", root, len(seen))
    arrivals: list[Arrival] = []
    for files, skip in groups:
        try:
            arrival = load_arrival(files, data, root=root, skip=skip)
        except EmptyArrivalError as error:
            logger.warning("skipping an arrival without examples: %s", error)
            continue
        first = arrivals[0] if arrivals else arrival
        check_schema(arrival.files[0], arrival.types, first.files[0], first.types)
        arrivals.append(arrival)
    if not arrivals:
        raise ValueError(f"{data.dataset_name!r} holds no example to train on")
    held_out = in_arrival_order(replace(data, streaming=False).load_held_out(), seed=0)
    return Schedule(tuple(arrivals), held_out, data.cache_images)


def single_schedule(
    arrivals: Sequence[AnyDataset],
    held_out: Sequence[Dataset],
    *,
    seed: int,
    held_out_split: str = "test",
    cache_images: bool = True,
) -> Schedule:
    """Let datasets arrive one after the other, for a model that has seen all but the last.

    Args:
        arrivals: oldest first, the last one new; columns ``image`` and ``label``.
        held_out: at least one; labels are merged by name.
        seed: seed for the order within each arrival; streams draw from 10,000 examples at a time.
        held_out_split: name of the held-out images, for the card.
        cache_images: keep decoded images in memory.
    """
    ordered: list[Arrival] = []
    for part in arrivals:
        if isinstance(part, IterableDataset):
            # The files of a folder come class by class.
            ordered.append(Arrival((), part.shuffle(seed=seed, buffer_size=BUFFER_SIZE), None))
        else:
            ordered.append(Arrival((), in_arrival_order(part, seed=seed), len(part)))
    images = _merged([in_arrival_order(part, seed=0) for part in held_out])
    return Schedule(tuple(ordered), images, cache_images, held_out_split=held_out_split)


def _merged(parts: Sequence[Dataset]) -> Dataset:
    """Concatenate datasets; match their labels by name."""
    names = list(dict.fromkeys(name for part in parts for name in label_names(part)))
    if all(label_names(part) == names for part in parts):
        return concatenate_datasets(list(parts))
    translated = []
    for part in parts:
        label_ids = np.array([names.index(name) for name in label_names(part)])
        plain = part.remove_columns("label").add_column("label", label_ids[part["label"][:]])
        translated.append(plain.cast_column("label", ClassLabel(names=names)))
    return concatenate_datasets(translated)
