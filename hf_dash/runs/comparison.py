"""Is one model better than another on the same held-out examples?

Flow: predictions of both on the same examples → how often each alone is right → accuracies,
interval of their difference, exact test, overall and per class → a verdict in words.
Source: exact test of paired predictions: McNemar (1947). Interval of a difference of paired
proportions: Bonett & Price (2012), "Adjusted Wald Confidence Interval for a Difference of Binomial
Proportions Based on Paired Data"; unlike a bootstrap's it stays open where few or no predictions
differ, and needs no resampling.
Differs from comparing two accuracies: examples that both models get right or wrong say nothing
about which is better, so pairing detects smaller differences with the same examples.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from hf_dash.utils.checks import check_confidence, check_number

Labels: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PairedAccuracy:
    """Two models on the same examples.

    Args:
        num_examples: held out.
        champion: its accuracy, in [0, 1].
        challenger: its accuracy, in [0, 1].
        difference: challenger − champion, in [−1, 1].
        low: lower end of the confidence interval of the difference.
        high: upper end.
        p_value: of the exact McNemar test that both are equally good, two-sided.

    Example:
        >>> import hf_dash
        >>> hf_dash.runs.PairedAccuracy(100, 0.5, 0.75, 0.25, 0.1, 0.4, 0.001).difference
        0.25
    """

    num_examples: int
    champion: float
    challenger: float
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """A challenger compared with the champion.

    Args:
        overall: over all held-out examples.
        per_class: the same by name of the class. The intervals of all classes hold together with
            the given confidence (Bonferroni), so that of many classes none stands out by chance;
            the p-values are those of each class alone.
        confidence: of the intervals, in (0, 1).

    Example:
        >>> import numpy as np
        >>> import hf_dash
        >>> labels = np.array([0, 0, 1, 1])
        >>> comparison = hf_dash.runs.compare_models(labels, 1 - labels, labels)
        >>> comparison.to_dict()["overall"]["difference"]
        1.0
    """

    overall: PairedAccuracy
    per_class: dict[str, PairedAccuracy]
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger takes the champion's place.

    Args:
        promote: whether it does.
        reason: in plain words.
        comparison: on which the verdict rests; None where there was no champion yet.

    Example:
        >>> import hf_dash
        >>> hf_dash.runs.Verdict(True, "first champion").promote
        True
    """

    promote: bool
    reason: str
    comparison: Comparison | None = None


def compare_models(
    challenger: Labels,
    champion: Labels,
    references: Labels,
    *,
    label_names: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> Comparison:
    """Compare two models by their predictions on the same held-out examples.

    Args:
        challenger: its predicted labels, integers of shape [num_examples].
        champion: those of the model in use, of the same shape.
        references: the true labels, of the same shape. A negative one means a class without a
            name: both models are wrong about it, and it has no entry among the classes.
        label_names: of the labels 0, 1, …; by default the labels themselves.
        confidence: of the intervals, in (0, 1).

    Raises:
        TypeError: an array does not hold integers.
        ValueError: the arrays differ in shape or are empty, ``label_names`` are too few or repeat,
            or ``confidence`` is out of range.

    Example:
        >>> import numpy as np
        >>> import hf_dash
        >>> labels = np.arange(20) % 2
        >>> hf_dash.runs.compare_models(labels, np.zeros(20, int), labels).overall.champion
        0.5
    """
    arrays = {"challenger": challenger, "champion": champion, "references": references}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.ndim != 1 or array.size == 0 or array.shape != arrays["references"].shape:
            raise ValueError(
                f"{name} must have one label for every held-out example, of which there are"
                f" {arrays['references'].size}, got the shape {array.shape}"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name} must hold integer labels, got {array.dtype}")
    check_confidence(confidence)
    true = arrays["references"]
    classes = np.unique(true[true >= 0]).tolist()
    _check_names(label_names, classes)
    right = [(arrays[name] == true) & (true >= 0) for name in ("challenger", "champion")]
    together = 1 - (1 - confidence) / max(len(classes), 1)
    per_class = {
        str(label if label_names is None else label_names[label]): _compare_paired(
            right[0][true == label], right[1][true == label], together
        )
        for label in classes
    }
    return Comparison(_compare_paired(right[0], right[1], confidence), per_class, confidence)


def _check_names(label_names: Sequence[str] | None, classes: list[int]) -> None:
    if label_names is None:
        return
    if len(set(label_names)) != len(label_names):
        raise ValueError(f"label_names must be different, got {list(label_names)}")
    if classes and len(label_names) <= classes[-1]:
        raise ValueError(
            f"label_names must name the labels 0 … {classes[-1]}, got {list(label_names)}"
        )


def _compare_paired(challenger: Labels, champion: Labels, confidence: float) -> PairedAccuracy:
    """Compare two arrays that tell, by example, whether a model is right."""
    from scipy.stats import binomtest, norm

    count = len(challenger)
    gained, lost = int((challenger & ~champion).sum()), int((champion & ~challenger).sum())
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    # One example more on either side, which also keeps the interval open where the models agree.
    gain, loss = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    reach = float(norm.ppf((1 + confidence) / 2))
    reach *= ((gain + loss - (gain - loss) ** 2) / (count + 2)) ** 0.5
    return PairedAccuracy(
        num_examples=count,
        champion=float(champion.mean()),
        challenger=float(challenger.mean()),
        difference=(gained - lost) / count,
        low=max(-1.0, gain - loss - reach),
        high=min(1.0, gain - loss + reach),
        p_value=p_value,
    )


@dataclass(frozen=True)
class PromotionRules:
    """When a challenger takes the champion's place.

    The defaults let a model that is retrained on more data and is as good as before take over, as
    long as the held-out examples suffice to exclude a loss of two points.

    Args:
        confidence: of the intervals, in (0, 1).
        min_gain: smallest measured gain in accuracy, in [−1, 1].
        max_loss: loss of accuracy that the interval must exclude, in [0, 1].
        max_class_drop: largest significant drop of the accuracy of one class, in [0, 1].

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range.

    Example:
        >>> import hf_dash
        >>> hf_dash.runs.PromotionRules(min_gain=0.01).max_loss
        0.02
    """

    confidence: float = 0.95
    min_gain: float = 0.0
    max_loss: float = 0.02
    max_class_drop: float = 0.05

    def __post_init__(self) -> None:
        check_number("confidence", self.confidence, "(0, 1)", 0, 1)
        check_number("min_gain", self.min_gain, "[-1, 1]", -1, 1)
        check_number("max_loss", self.max_loss, "[0, 1]", 0, 1)
        check_number("max_class_drop", self.max_class_drop, "[0, 1]", 0, 1)


def decide(comparison: Comparison, rules: PromotionRules | None = None) -> Verdict:
    """Decide whether a challenger takes the champion's place.

    It is promoted if none of these holds, and the reason names all that do:

    1. it is significantly worse: the whole interval of the overall difference is below 0;
    2. it gains less than ``min_gain`` overall, as measured;
    3. a loss of more than ``max_loss`` overall is not excluded: the interval reaches below it.
       With few held-out examples only a clear gain passes;
    4. a class drops by more than ``max_class_drop``, as measured, and significantly: the whole
       interval of its difference is below 0.

    Args:
        comparison: as :func:`compare_models` returns it; its intervals have their confidence.
        rules: the limits above; by default those of :class:`PromotionRules`.

    Example:
        >>> import numpy as np
        >>> import hf_dash
        >>> labels = np.zeros(1000, dtype=int)
        >>> champion = np.where(np.arange(1000) < 100, 1, labels)  # wrong about 100 of them
        >>> hf_dash.runs.decide(hf_dash.runs.compare_models(labels, champion, labels)).promote
        True
    """
    rules = rules or PromotionRules()
    overall = comparison.overall
    interval = f"{comparison.confidence:.0%} interval {overall.low:+.2%} to {overall.high:+.2%}"
    measured = f"the difference in accuracy is {overall.difference:+.2%} ({interval})"
    reasons = []
    if overall.high < 0:
        reasons.append("significantly worse overall")
    if overall.difference < rules.min_gain:
        reasons.append(f"the gain is below min_gain, {rules.min_gain:.2%}")
    if overall.low < -rules.max_loss:
        reasons.append(f"a loss of more than max_loss, {rules.max_loss:.2%}, is not excluded")
    dropped = [
        f"{name!r} {paired.difference:+.2%}"
        for name, paired in comparison.per_class.items()
        if paired.high < 0 and -paired.difference > rules.max_class_drop
    ]
    if dropped:
        reasons.append(
            f"significantly worse by more than max_class_drop, {rules.max_class_drop:.2%}, on"
            f" {', '.join(dropped)}"
        )
    reason = "; ".join(reasons or ["not worse overall, and no class drops"])
    return Verdict(not reasons, f"{reason}; {measured}", comparison)
