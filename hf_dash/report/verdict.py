"""Decide from the records of a run which start to use, and say what it costs.

Flow: records of all starts and seeds → ``StartVerdict`` → ``recommendation.json`` → the start of
the next round, followed by name and settings.

The rule:

1. Rounds from the second on count, as far as at least two starts have finished them. Starts that
   stopped earlier are left out, and so are seeds in which one of the others did.
2. The accuracy of a start and seed is the mean over these rounds. Its price is the mean number of
   optimizer steps.
3. One start beats another if the 95 % paired t interval of their difference over seeds lies above
   zero. With fewer than three seeds, no start beats another.
4. The recommended start is the cheapest one that no other start beats.

A tie in price goes to the start that reads fewer images, then to warm, then to the earlier record.

Source: the paired t interval of Student (1908), as in ``paired.py``.
Differs from taking the best mean: a difference that may be noise never makes a user pay more.
The intervals are not corrected for the number of starts: compare few, or use more seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_dash.history import RoundRecord, starts_of
from hf_dash.report.paired import paired_difference
from hf_dash.report.tables import Run, mean_accuracy, mean_steps
from hf_dash.utils.checks import check_confidence

MIN_SEEDS = 3
BASELINE = "cold"
# It changes nothing, so it wins a tie.
SIMPLEST = "warm"


class NothingToCompareError(ValueError):
    """No two starts have finished a second round with the same seed.

    Example:
        >>> start_verdict([])
        Traceback (most recent call last):
            ...
        hf_dash.report.verdict.NothingToCompareError: records must hold a second round of at least \
two starts with the same seed, got finished rounds {}
    """


@dataclass(frozen=True)
class StartComparison:
    """One start vs. the baseline, over the rounds from the second on.

    Args:
        start: its name.
        points: its accuracy minus the baseline's, in percentage points, mean over seeds.
        low: lower end of the interval of ``points``; None with one seed.
        high: upper end; None with one seed.
        steps: its optimizer steps divided by the baseline's, geometric mean over seeds.
    """

    start: str
    points: float
    low: float | None
    high: float | None
    steps: float


@dataclass(frozen=True)
class StartVerdict:
    """Which start to use, and why.

    Args:
        start: the recommended one.
        sentence: the verdict in words, with intervals and prices.
        baseline: what the others are compared with: cold, or the cheapest start if cold is missing.
        comparisons: one per other start; the recommended one comes first.
        last_round: the rounds from 2 to this one were compared.
        seeds: those that count.
        left_out: the starts and seeds that do not, such as ``"fire"`` or ``"seed 2"``.
        confidence: of the intervals, in (0, 1).

    Example:
        >>> sentence = "no start differs by more than the noise: keep warm, it is the cheapest"
        >>> StartVerdict("warm", sentence, "cold", (), 5, (0, 1, 2), (), 0.95).start
        'warm'
    """

    start: str
    sentence: str
    baseline: str
    comparisons: tuple[StartComparison, ...]
    last_round: int
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]
    confidence: float


def start_verdict(records: Sequence[RoundRecord], *, confidence: float = 0.95) -> StartVerdict:
    """Recommend a start by the rule above.

    Args:
        records: of all starts, seeds and rounds of a run.
        confidence: of the intervals, in (0, 1).

    Raises:
        NothingToCompareError: no two starts have finished a second round with the same seed.
        ValueError: ``confidence`` is out of range, an accuracy is not in [0, 1], a number of steps
            is less than 1, or two starts saw different images in the same seed and round.

    Example:
        >>> from hf_dash.history import RoundRecord
        >>> records = [
        ...     RoundRecord(start, seed, index, 8, 8 * index, accuracy, {}, 1.0, True, 3, 30, 0, 1)
        ...     for start, accuracy in {"cold": 0.5, "warm": 0.4, "dash": 0.6}.items()
        ...     for seed in range(3) for index in (1, 2)
        ... ]
        >>> print(start_verdict(records).sentence.replace("; ", "\\n"))
        dash: +10.0 points (10.0 … 10.0) vs. cold in 1.00 of the steps
        warm −10.0 in 1.00: use dash
    """
    check_confidence(confidence)
    _check(records)
    last_round, starts, seeds = _finished(records)
    counted = [
        record
        for record in records
        if record.start in starts and record.seed in seeds and record.round_index <= last_round
    ]
    by_price = sorted(starts, key=lambda start: _price(counted, start))
    unbeaten = [
        start
        for start in by_price
        if not any(_beats(counted, other, start, confidence) for other in starts)
    ]
    chosen, baseline = unbeaten[0], BASELINE if BASELINE in starts else by_price[0]
    others = sorted(set(starts) - {baseline}, key=lambda s: (s != chosen, starts.index(s)))
    comparisons = tuple(_compare(counted, start, baseline, confidence) for start in others)
    left_out = [start for start in starts_of(records) if start not in starts]
    left_out += [f"seed {seed}" for seed in _seeds_of(records) if seed not in seeds]
    return StartVerdict(
        chosen,
        _sentence(comparisons, baseline, left_out, _conclusion(unbeaten, starts, len(seeds))),
        baseline,
        comparisons,
        last_round,
        tuple(seeds),
        tuple(left_out),
        confidence,
    )


def _check(records: Sequence[RoundRecord]) -> None:
    """Refuse numbers that cannot be compared, and rounds of different images."""
    images: dict[tuple[int, int, str], str] = {}
    for record in records:
        where = f"start {record.start!r}, seed {record.seed} and round {record.round_index}"
        if not 0 <= record.accuracy <= 1:  # nor is NaN
            raise ValueError(
                f"accuracy must be in [0, 1], got {record.accuracy!r} for {where}: no verdict"
            )
        if not 1 <= record.steps < math.inf:
            raise ValueError(f"steps must be at least 1, got {record.steps!r} for {where}")
        for name in ("data_fingerprint", "held_out_fingerprint"):
            own = getattr(record, name)
            key = (record.seed, record.round_index, name)
            if own is not None and images.setdefault(key, own) != own:
                raise ValueError(
                    f"{name} must be the same for all starts, got {own!r} for {where} and"
                    f" {images[key]!r} for another start"
                )


def _finished(records: Sequence[RoundRecord]) -> tuple[int, list[str], list[int]]:
    """Return the last round to compare, the starts that reach it, and the seeds in which all do."""
    indices: dict[str, dict[int, set[int]]] = {}
    for record in records:
        own = indices.setdefault(record.start, {})
        own.setdefault(record.seed, set()).add(record.round_index)
    lengths = {
        start: {seed: _length(rounds) for seed, rounds in own.items()}
        for start, own in indices.items()
    }
    reached = {start: max(own.values()) for start, own in lengths.items()}
    last_round = sorted(reached.values())[-2] if len(reached) > 1 else 0
    starts = [start for start in reached if reached[start] >= last_round]
    seeds = [
        seed
        for seed in _seeds_of(records)
        if all(lengths[start].get(seed, 0) >= last_round for start in starts)
    ]
    if last_round < 2 or not seeds:
        raise NothingToCompareError(
            "records must hold a second round of at least two starts with the same seed, got"
            f" finished rounds {lengths}"
        )
    return last_round, starts, seeds


def _length(rounds: set[int]) -> int:
    """Return how many rounds there are from the first on without a gap."""
    return next(index for index in range(len(rounds) + 1) if index + 1 not in rounds)


def _seeds_of(records: Sequence[RoundRecord]) -> list[int]:
    return sorted({record.seed for record in records})


def _runs(records: Sequence[RoundRecord], start: str) -> list[Run]:
    """Return the records of a start by seed; the seeds are in order."""
    own = [record for record in records if record.start == start]
    return [[record for record in own if record.seed == seed] for seed in _seeds_of(own)]


def _price(records: Sequence[RoundRecord], start: str) -> tuple[float, float, bool]:
    """Return what to sort starts by: steps, images read, and whether it is not the simplest."""
    runs = _runs(records, start)
    images = [r.images_read for run in runs for r in run if r.round_index > 1]
    read = math.inf if None in images else float(sum(count or 0 for count in images))
    return round(_mean_log_steps(runs), 9), read, start != SIMPLEST


def _mean_log_steps(runs: Sequence[Run]) -> float:
    return sum(math.log(mean_steps(run)) for run in runs) / len(runs)


def _beats(records: Sequence[RoundRecord], start: str, other: str, confidence: float) -> bool:
    if start == other or len(_seeds_of(records)) < MIN_SEEDS:
        return False
    return paired_difference(records, start, other, mean_accuracy, confidence=confidence).low > 0


def _compare(
    records: Sequence[RoundRecord], start: str, baseline: str, confidence: float
) -> StartComparison:
    own, other = _runs(records, start), _runs(records, baseline)
    points = [mean_accuracy(a) - mean_accuracy(b) for a, b in zip(own, other, strict=True)]
    low = high = None
    if len(points) > 1:
        pair = paired_difference(records, start, baseline, mean_accuracy, confidence=confidence)
        low, high = pair.low, pair.high
    steps = math.exp(_mean_log_steps(own) - _mean_log_steps(other))
    return StartComparison(start, sum(points) / len(points), low, high, steps)


def _conclusion(unbeaten: Sequence[str], starts: Sequence[str], num_seeds: int) -> str:
    chosen = unbeaten[0]
    advice = f"{'keep' if chosen == SIMPLEST else 'use'} {chosen}"
    if num_seeds < MIN_SEEDS:
        seeds = "1 seed is" if num_seeds == 1 else f"{num_seeds} seeds are"
        return (
            f"; {seeds} too few to choose by, {MIN_SEEDS} are needed: {advice}, it is the cheapest"
        )
    if len(unbeaten) == len(starts):
        return f"; no start differs by more than the noise: {advice}, it is the cheapest"
    if len(unbeaten) == 1:
        return f": {advice}"
    return f": {advice}, the cheapest that no other start beats"


def _sentence(
    comparisons: Sequence[StartComparison],
    baseline: str,
    left_out: Sequence[str],
    conclusion: str,
) -> str:
    first, *others = comparisons
    interval = ""
    if first.low is not None and first.high is not None:
        interval = f" ({_decimal(first.low)} … {_decimal(first.high)})"
    clauses = [
        f"{first.start}: {_decimal(first.points, '+')} points{interval} vs. {baseline} in"
        f" {first.steps:.2f} of the steps",
        *(f"{one.start} {_decimal(one.points, '+')} in {one.steps:.2f}" for one in others),
    ]
    if left_out:
        clauses.append(f"incomplete and left out: {', '.join(left_out)}")
    return "; ".join(clauses) + conclusion


def _decimal(value: float, sign: str = "") -> str:
    """Return a number with one decimal and a minus sign of full width, never minus zero."""
    return format(round(value, 1) + 0.0, f"{sign}.1f").replace("-", "−")
