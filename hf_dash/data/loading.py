"""Load a run: arrivals and held-out images as the flags name them, every image read once.

Flow: ``DataConfig`` → one dataset cut into equal arrivals; or shards that appear over time, where
those that no recorded round has seen make the next rounds; or the datasets of a single round →
read once, corrupt and repeated images left out, held-out images kept apart → ``Schedule``.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset

from hf_dash.data.arrivals import (
    Arrival,
    EmptyArrivalError,
    arrivals_root,
    arrive,
    left_out_of,
    load_arrival,
    new_arrivals,
    read_once,
    unread,
)
from hf_dash.data.columns import AnyDataset, label_names, whole_numbers
from hf_dash.data.config import DataConfig
from hf_dash.data.held_out import drop_repeated, hold_out
from hf_dash.data.names import check_spelling
from hf_dash.data.order import (
    BUFFER_SIZE,
    check_enough,
    cut_arrivals,
    cut_rows,
    first_examples,
    in_arrival_order,
)
from hf_dash.data.pieces import drawn
from hf_dash.data.schedule import Schedule
from hf_dash.data.shards import check_types
from hf_dash.data.sources import ANONYMOUS, Access
from hf_dash.data.survey import drop_rows
from hf_dash.history import RoundRecord
from hf_dash.utils.distributed import is_main_process
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)

# Images of a class that a round has on average if its absence is no accident.
EXPECTED = 10


def load_schedules(
    data: DataConfig,
    seeds: Sequence[int],
    num_rounds: int,
    examples_per_round: int | None,
    records: Sequence[RoundRecord],
) -> list[Schedule]:
    """Return one schedule per seed; if shards arrive, all seeds share one.

    All images that are used are read once: corrupt ones are refused or left out, and held-out
    images that are also training images are refused.

    Args:
        data: where the images come from and how they arrive.
        seeds: seeds for the order of arrival, at least one.
        num_rounds: number of rounds to cut one dataset into.
        examples_per_round: size of a round of one dataset; None uses all of it.
        records: recorded rounds of the run.

    Raises:
        ValueError: images cannot be found, read or used; the message names them.

    Example:
        >>> import hf_dash
        >>> config = hf_dash.DataConfig("digits")
        >>> first, second = hf_dash.data.load_schedules(config, [0, 1], 2, 10, [])
        >>> [arrival.num_examples for arrival in first.arrivals]
        [10, 10]
    """
    if data.arrive_by == "files":
        return [file_schedule(data, records)] * len(seeds)
    wanted = None if examples_per_round is None else examples_per_round * num_rounds
    split, orders, held_out = _ordered(data, seeds, wanted)
    budget = data.pixel_budget
    schedules = []
    for arrival in orders:
        arrivals = _cut(arrival, num_rounds)
        schedule = Schedule(
            arrivals, (held_out,), data.keeps_images, held_out_split=split, budget=budget
        )
        schedule.check_classes(data)
        schedules.append(schedule.checked(data))
    return schedules


def _ordered(
    data: DataConfig, seeds: Sequence[int], wanted: int | None
) -> tuple[str, list[Arrival], Arrival]:
    """Return one dataset in each seed's order, read once, and what is held out."""
    split, held_out_shards = data.open_held_out()
    shards = data.open_train()
    in_parts = all(shard.pieces is not None for shard in shards)
    arriving = unread(shards, numbered=in_parts or not data.streaming)
    if held_out_shards:
        held_out = arrive(held_out_shards, data)
    else:
        _refuse_stream(data)
    if data.streaming and in_parts:
        arrivals = _draw_parts(arriving, seeds, wanted, data)
    else:
        dataset = first_examples(arriving.dataset, data.max_train_samples)
        arriving = replace(arriving, dataset=dataset)
        if not held_out_shards:
            (arriving,), (held_out,) = _hold_out([read_once(arriving, data)], data)
        orders = [
            in_arrival_order(arriving.dataset, seed=seed, num_examples=wanted) for seed in seeds
        ]
        arrivals = _read_orders(arriving, orders, data)
    arrivals = [replace(a, skipped=(*a.skipped, *left_out_of(shards))) for a in arrivals]
    return split, arrivals, _in_fixed_order(_limited(held_out, data.max_eval_samples))


def _draw_parts(
    arriving: Arrival, seeds: Sequence[int], wanted: int | None, data: DataConfig
) -> list[Arrival]:
    """Return a stream in each seed's order, by the parts of files that can be read alone.

    All files are read once, and the images in use decoded once, whatever the number of orders.
    """
    pieces = arriving.pieces or ()
    every = np.arange(sum(piece.num_rows for piece in pieces))
    rows = every
    if data.max_train_samples is not None:
        rows = drawn(pieces, every, seed=0)[: data.max_train_samples]
    check_enough(len(rows), wanted)
    orders = [drawn(pieces, rows, seed)[:wanted] for seed in seeds]
    used = np.unique(np.concatenate(orders))
    dataset = drop_rows(arriving.dataset, frozenset(np.setdiff1d(every, used).tolist()))
    part = replace(arriving, dataset=dataset)
    (whole,) = drop_repeated([read_once(part, data, example_ids=used)])
    assert whole.survey is not None
    good = whole.survey.example_ids
    return [whole.with_ids(order[np.isin(order, good)]) for order in orders]


def _read_orders(arriving: Arrival, ordered: Sequence[Dataset], data: DataConfig) -> list[Arrival]:
    """Read the examples of several orders of one dataset, each once."""
    if data.streaming:
        read = [read_once(replace(arriving, dataset=order), data) for order in ordered]
        return [drop_repeated([arrival])[0] for arrival in read]
    whole = arriving
    if whole.survey is None:
        used = np.unique(np.concatenate([whole_numbers(order, "example_id") for order in ordered]))
        ids = whole_numbers(arriving.dataset, "example_id")
        part = arriving.dataset.select(np.flatnonzero(np.isin(ids, used)))
        whole = read_once(replace(arriving, dataset=part), data)
    (whole,) = drop_repeated([whole])
    assert whole.survey is not None
    arrivals = []
    for order in ordered:
        ids = whole_numbers(order, "example_id")
        good = order.select(np.flatnonzero(np.isin(ids, whole.survey.example_ids)))
        arrivals.append(whole.with_rows(good))
    return arrivals


def _cut(arrival: Arrival, num_rounds: int) -> tuple[Arrival, ...]:
    """Cut an arrival into equal ones; the first one tells what was left out."""
    if isinstance(arrival.dataset, Dataset):
        parts = [arrival.with_rows(part) for part in cut_arrivals(arrival.dataset, num_rounds)]
    else:
        assert arrival.survey is not None
        ids = arrival.survey.example_ids
        parts = [arrival.with_ids(part) for part in cut_rows(ids, num_rounds)]
        _say_sorted(arrival.survey.labels, parts)
    return (parts[0], *(replace(part, skipped=()) for part in parts[1:]))


def _say_sorted(labels: np.ndarray, parts: Sequence[Arrival]) -> None:
    """Say if a round lacks a class of which a random cut would give it many images."""
    counts = np.bincount(labels, minlength=1)
    expected = np.flatnonzero(counts >= EXPECTED * len(parts))
    for number, part in enumerate(parts, 1):
        assert part.survey is not None
        lacking = np.setdiff1d(expected, part.survey.labels)
        if len(lacking) and is_main_process():
            logger.warning(
                "round %d lacks %d of %d classes: row groups arrive whole, and these seem to be"
                " sorted by class; without streaming, images arrive in random order",
                *(number, len(lacking), len(expected)),
            )


def cut_schedule(
    train: AnyDataset,
    held_out: AnyDataset,
    *,
    num_rounds: int,
    seed: int,
    examples_per_round: int | None = None,
    cache_images: bool = True,
) -> Schedule:
    """Let one dataset arrive in equal rounds, in a random order; nothing is read or checked.

    Args:
        train: from :func:`~hf_dash.data.sources.load_images`.
        held_out: from :func:`~hf_dash.data.sources.load_images`.
        num_rounds: at least 1.
        seed: seed for the order.
        examples_per_round: size of an arrival; None uses the whole dataset.
        cache_images: keep decoded images.

    Raises:
        ValueError: the dataset has too few examples.
    """
    wanted = None if examples_per_round is None else examples_per_round * num_rounds
    arriving = in_arrival_order(train, seed=seed, num_examples=wanted)
    images = in_arrival_order(held_out, seed=0)
    arrivals = _cut(Arrival((), arriving, len(arriving)), num_rounds)
    return Schedule(arrivals, (Arrival((), images, len(images)),), cache_images)


def file_schedule(data: DataConfig, records: Sequence[RoundRecord]) -> Schedule:
    """Let shards arrive: those of recorded rounds as before, new ones in new rounds.

    Args:
        data: ``dataset_name`` is the directory or glob; ``files_per_round`` is the number of new
            shards per round.
        records: recorded rounds of the run, of any start and seed.

    Raises:
        ValueError: there is nothing to train on; a shard of an earlier round has disappeared or
            cannot be read; or see :meth:`Schedule.checked`.
    """
    root = arrivals_root(data.source)
    past = {r.round_index: r for r in records if r.files is not None}
    seen = [past[index] for index in sorted(past)]
    names = [name for r in seen for name in r.files or ()]
    new = new_arrivals(data.source, names, allow_missing=data.allow_missing)
    split, held_out_shards = data.open_held_out()
    size = data.files_per_round or max(1, len(new))
    groups: list[tuple[list[Path], list[str] | None]] = [
        ([root / name for name in r.files or ()], list(r.skipped or ())) for r in seen
    ]
    groups += [(new[begin : begin + size], None) for begin in range(0, len(new), size)]
    if not new and is_main_process():
        logger.warning("nothing new in %s since round %d: no new round", root, len(seen))
    arrivals: list[Arrival] = []
    for files, skip in groups:
        try:
            arrival = load_arrival(files, data, root=root, skip=skip)
        except EmptyArrivalError as error:
            logger.warning("skipping an arrival without examples: %s", error)
            continue
        first = arrivals[0] if arrivals else arrival
        check_types(arrival.files[0], arrival.types, first.files[0], first.types)
        arrivals.append(arrival)
    arrivals = [a for a in drop_repeated(arrivals, num_kept=len(seen)) if a.num_examples]
    if not arrivals:
        raise ValueError(f"{data.source!r} holds no example to train on")
    held_out = _in_fixed_order(_limited(arrive(held_out_shards, data), data.max_eval_samples))
    schedule = Schedule(
        tuple(arrivals),
        (held_out,),
        data.keeps_images,
        held_out_split=split,
        budget=data.pixel_budget,
    )
    schedule.check_classes(data)
    return schedule.checked(data)


def round_schedule(
    data: DataConfig, seen: Sequence[str] = (), *, seed: int = 0, access: Access = ANONYMOUS
) -> Schedule:
    """Load a single round: what arrived before, what is new, and what is held out.

    Args:
        data: the new images and the held-out ones.
        seen: names of the datasets that arrived before, oldest first.
        seed: seed for the order within each arrival.
        access: to the Hub.

    Raises:
        ValueError: a stream has no images held out, nothing is new, or see
            :meth:`Schedule.checked`.

    Example:
        >>> import hf_dash
        >>> data = hf_dash.DataConfig("digits", test_split="test", max_train_samples=100)
        >>> schedule = hf_dash.data.round_schedule(data)
        >>> schedule.arrivals[-1].num_examples, schedule.held_out_split
        (100, 'test')
    """
    split, held_out_shards = data.open_held_out(access)
    if not held_out_shards:
        _refuse_stream(data)
    opened = [*(data.open_train(name, access) for name in seen), data.open_train(access=access)]
    arrivals = [arrive(shards, data) for shards in opened]
    # A shard that is given twice counts where it is newest.
    arrivals = [a for a in drop_repeated(arrivals[::-1])[::-1] if a.num_examples]
    if held_out_shards:
        held_out = [arrive(held_out_shards, data)]
    else:
        arrivals, held_out = _hold_out(arrivals, data)
    arrivals = [_limited(arrival, data.max_train_samples) for arrival in arrivals]
    held_out = [_limited(part, data.max_eval_samples) for part in held_out]
    schedule = single_schedule(
        arrivals, held_out, seed=seed, held_out_split=split, cache_images=data.keeps_images
    )
    return replace(schedule, budget=data.pixel_budget).checked(data)


def load_held_out(data: DataConfig, access: Access = ANONYMOUS) -> Arrival:
    """Load the held-out images alone, read once, in an order that is always the same.

    Args:
        data: names them.
        access: to the Hub.

    Raises:
        ValueError: it is not clear what to hold out, or it cannot be read or used.

    Example:
        >>> import hf_dash
        >>> hf_dash.data.load_held_out(hf_dash.DataConfig("digits")).num_examples
        360
    """
    _, shards = data.open_held_out(access)
    if shards:
        held_out = arrive(shards, data)
    else:
        _, (held_out,) = _hold_out([arrive(data.open_train(access=access), data)], data)
    check_spelling(label_names(held_out.dataset))
    return _in_fixed_order(_limited(held_out, data.max_eval_samples))


def _hold_out(arrivals: Sequence[Arrival], data: DataConfig) -> tuple[list[Arrival], list[Arrival]]:
    """Hold out a share of arrivals; return what is left of them, and what is held out."""
    share = data.train_val_split or 0.0
    cut = [hold_out(arrival, share) for arrival in arrivals]
    held_out = [part for _, part in cut if part is not None]
    if not held_out:
        counts = [arrival.num_examples for arrival in arrivals]
        raise ValueError(
            f"train_val_split {share} holds out none of {counts} images: give a larger share,"
            " or validation_dir or test_dataset_name"
        )
    return [arrival for arrival, _ in cut], held_out


def _refuse_stream(data: DataConfig) -> None:
    if data.streaming:
        raise ValueError(
            "streaming needs held-out images: give validation_dir, test_dataset_name or a dataset"
            " with a split called validation or test"
        )


def _limited(arrival: Arrival, count: int | None) -> Arrival:
    """Return at most ``count`` examples of an arrival."""
    if count is None or (arrival.num_examples or 0) <= count:
        return arrival
    if arrival.pieces is not None:
        return arrival.drawn(0, count)
    dataset = first_examples(arrival.dataset, count)
    if isinstance(dataset, Dataset):
        return arrival.with_rows(dataset)
    return replace(arrival, dataset=dataset, num_examples=count, fingerprint=None)


def _in_fixed_order(arrival: Arrival) -> Arrival:
    return arrival.with_rows(in_arrival_order(arrival.dataset, seed=0))


def single_schedule(
    arrivals: Sequence[Arrival],
    held_out: Sequence[Arrival],
    *,
    seed: int,
    held_out_split: str = "test",
    cache_images: bool = True,
) -> Schedule:
    """Let datasets arrive one after the other, for a model that has seen all but the last.

    Args:
        arrivals: oldest first, the last one new.
        held_out: at least one; labels are merged by name.
        seed: seed for the order within each arrival; streams draw from 10,000 examples at a time,
            or whole row groups where parts of files can be read.
        held_out_split: name of the held-out images, for the card.
        cache_images: keep decoded images.
    """
    ordered = []
    for arrival in arrivals:
        if arrival.pieces is not None:
            ordered.append(replace(arrival.drawn(seed), fingerprint=arrival.fingerprint))
            continue
        if isinstance(arrival.dataset, IterableDataset):
            # The files of a folder come class by class.
            mixed = arrival.dataset.shuffle(seed=seed, buffer_size=BUFFER_SIZE)
        else:
            mixed = in_arrival_order(arrival.dataset, seed=seed)
        ordered.append(replace(arrival, dataset=mixed))
    parts = tuple(_in_fixed_order(part) for part in held_out)
    return Schedule(tuple(ordered), parts, cache_images, held_out_split=held_out_split)
