"""What arrives when: all rounds of a run, and the held-out images.

Flow: arrivals that were read once → checked against each other and the held-out images → ``Round``
objects and held-out examples, with classes matched by name.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from datasets import Dataset

from hf_dash.data.arrivals import Arrival
from hf_dash.data.columns import (
    all_names,
    fingerprint_of,
    joined,
    label_ids,
    label_names,
    matched,
    whole_numbers,
)
from hf_dash.data.config import DataConfig
from hf_dash.data.examples import ImageExamples, Transform
from hf_dash.data.held_out import check_overlap
from hf_dash.data.names import check_shared, check_spelling, shown
from hf_dash.data.pixel_cache import PixelBudget
from hf_dash.data.rounds import Round
from hf_dash.data.streams import StreamedImages
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)


@dataclass(frozen=True)
class Schedule:
    """All arrivals of a run so far, and its held-out images.

    Args:
        arrivals: one per round, oldest first.
        held_out: at least one; classes are matched by name.
        cache_images: keep decoded images.
        first_names: classes that come first in the model, before those of the arrivals.
        held_out_split: name of the held-out images, for the card.
        overlap: number of held-out images that are trained on, where that was allowed.
        budget: for decoded images; several schedules of a run may share it.

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
    held_out: tuple[Arrival, ...]
    cache_images: bool = True
    first_names: tuple[str, ...] = ()
    held_out_split: str = "test"
    overlap: int = 0
    budget: PixelBudget = field(default_factory=PixelBudget)

    def label_names(self, num_rounds: int | None = None) -> tuple[str, ...]:
        """Return the names of all classes in the first ``num_rounds`` arrivals, oldest first."""
        named = all_names(arrival.dataset for arrival in self.arrivals[:num_rounds])
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
            ValueError: ``label_noise`` is set and the arrivals are streams, or an image has a mode
                that the transform does not take.
        """
        names = self.label_names()
        examples = tuple(
            arrival.examples(
                transform,
                label_ids(arrival.dataset, names),
                cache=self.cache_images,
                label_noise=label_noise,
                noise_seed=noise_seed + 1000 * index,
                budget=self.budget,
            )
            for index, arrival in enumerate(self.arrivals)
        )
        streams = [arrival for arrival in examples if isinstance(arrival, StreamedImages)]
        if not all(stream.cache for stream in streams):
            for stream in streams:  # a loader takes all with a cache or all without
                stream.cache = False
        return [
            Round(
                index,
                examples[:index],
                self.label_names(index),
                self.arrivals[index - 1].files,
                self.arrivals[index - 1].skipped,
                self.overlap,
            )
            for index in range(1, len(examples) + 1)
        ]

    def held_out_examples(
        self, transform: Transform, *, allow_unknown: bool = True
    ) -> ImageExamples:
        """Return the held-out examples; a class that no arrival contains gets the label −1.

        Args:
            transform: from a PIL image to a tensor.
            allow_unknown: False refuses such classes.

        Raises:
            ValueError: there is such a class and ``allow_unknown`` is False, or an image has a
                mode that the transform does not take.
        """
        known = {name: index for index, name in enumerate(self.label_names())}
        names = self.held_out_names
        unknown = [name for name in names if name not in known]
        if unknown and not allow_unknown:
            raise ValueError(
                f"neither the model nor the training images know the labels {unknown} of the"
                " held-out images"
            )
        for part in self.held_out:
            part.check_mode(transform)
        label_ids = [known.get(name, -1) for name in names]
        keys = [part.cache_key(transform) for part in self.held_out]
        examples = ImageExamples(
            self.held_out_images,
            transform,
            in_memory=self.cache_images,
            label_ids=label_ids,
            fingerprint=self._held_out_fingerprint(),
            cache_key=None if None in keys else hashlib.sha256(repr(keys).encode()).hexdigest(),
            budget=self.budget,
        )
        examples.open()
        return examples

    def _held_out_fingerprint(self) -> str | None:
        """Return the fingerprint of the held-out images, if all of them were read."""
        names, labels, sha256 = self.held_out_names, [], []
        for part in self.held_out:
            if part.survey is None:
                return None
            found = part.survey.of(whole_numbers(cast(Dataset, part.dataset), "example_id"))
            places = np.array(label_ids(part.dataset, names))
            labels.append(places[found.labels])
            sha256.append(found.sha256)
        return fingerprint_of(names, np.concatenate(labels), np.concatenate(sha256))

    @property
    def held_out_images(self) -> Dataset:
        """The held-out images as one dataset, classes matched by name."""
        parts = [matched(part.dataset, self.held_out_names) for part in self.held_out]
        return cast(Dataset, joined(parts))

    @property
    def held_out_names(self) -> list[str]:
        """The names of all classes that are held out."""
        return all_names(part.dataset for part in self.held_out)

    def checked(self, data: DataConfig) -> "Schedule":
        """Check that names of classes differ clearly and that no held-out image is trained on.

        Args:
            data: says what is allowed.

        Returns:
            The schedule, with the number of held-out images that are trained on.

        Raises:
            ValueError: names of classes look alike, or held-out images are trained on and that is
                not allowed.
        """
        check_spelling([*self.label_names(), *self.held_out_names])
        overlap = sum(
            check_overlap(self.arrivals, part, allow_overlap=data.allow_overlap)
            for part in self.held_out
        )
        return replace(self, overlap=overlap)

    def check_classes(self, data: DataConfig) -> None:
        """Check that every arrival, and what is held out, shares a class with those before.

        Raises:
            ValueError: one does not, and ``data`` does not allow that.
        """
        allow = data.allow_disjoint_classes
        for index, arrival in enumerate(self.arrivals):
            known = self.label_names(index) if index else self.first_names
            what = f"the arrival {list(arrival.files)}"
            check_shared(known, label_names(arrival.dataset), what, allow_disjoint=allow)
        known, held_out = self.label_names(), self.held_out_names
        check_shared(known, held_out, "the held-out images", allow_disjoint=allow)
        unknown = sorted(set(held_out) - set(known))
        if unknown:
            logger.warning("no image to train on has the held-out classes %s", shown(unknown))

    def after(self, names: Sequence[str], data: DataConfig) -> "Schedule":
        """Let a model that knows these classes continue with the newest arrival.

        Raises:
            ValueError: the arrival or the held-out images share no class with them, and ``data``
                does not allow that; or names of classes look alike.
        """
        allow = data.allow_disjoint_classes
        new = label_names(self.arrivals[-1].dataset)
        check_shared(names, new, f"the new arrival {data.source!r}", allow_disjoint=allow)
        continued = replace(self, first_names=tuple(names))
        known, held_out = continued.label_names(), self.held_out_names
        check_shared(known, held_out, "the held-out images", allow_disjoint=allow)
        check_spelling([*known, *held_out])
        return continued
