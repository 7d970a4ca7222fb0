"""The images of one round of retraining, labelled as the model that goes on with them.

Flow: earlier arrivals, the new one and held-out images → labels matched by name → a ``Round`` and
held-out examples, map-style or streamed.
"""

from dataclasses import dataclass
from typing import Any

from datasets import IterableDataset
from torch.utils.data import ConcatDataset
from transformers import PreTrainedModel

from hf_dash.arrivals import in_arrival_order
from hf_dash.columns import AnyDataset, label_names
from hf_dash.examples import ImageExamples, Transform
from hf_dash.models import model_labels
from hf_dash.rounds import Round
from hf_dash.streams import StreamedImages

# Examples of a stream among which its order is drawn.
BUFFER_SIZE = 10_000


@dataclass(frozen=True)
class RoundData:
    """The images of one round of retraining.

    Args:
        arrivals: to train on, oldest first, the last one new; columns ``image`` and ``label``.
        held_out: likewise, one or several.
        held_out_split: what the held-out images are, in words for the card.
    """

    arrivals: tuple[AnyDataset, ...]
    held_out: tuple[AnyDataset, ...]
    held_out_split: str

    @property
    def label_names(self) -> list[str]:
        """The names of all classes to train on, each once, oldest first."""
        return list(dict.fromkeys(name for part in self.arrivals for name in label_names(part)))

    def make_round(
        self,
        index: int,
        model: PreTrainedModel,
        transform: Transform,
        *,
        seed: int = 0,
        in_memory: bool = True,
    ) -> Round:
        """Return the round: what arrived, in an order drawn from ``seed``, labelled as the model.

        Args:
            index: number of the round.
            model: whose labels count.
            transform: from a PIL image to a tensor.
            seed: of the order of each arrival; a stream's is drawn among 10,000 examples at a time.
            in_memory: decode every image once; streams never do.

        Raises:
            ValueError: the model does not know a class.
        """
        arrivals: list[ImageExamples | StreamedImages] = []
        for part in self.arrivals:
            ids = _label_ids(model, part)
            if isinstance(part, IterableDataset):
                # Files of a folder come class by class.
                shuffled = part.shuffle(seed=seed, buffer_size=BUFFER_SIZE)
                arrivals.append(StreamedImages(shuffled, transform, label_ids=ids))
            else:
                ordered = in_arrival_order(part, seed=seed)
                arrivals.append(
                    ImageExamples(ordered, transform, in_memory=in_memory, label_ids=ids)
                )
        return Round(index, tuple(arrivals))

    def held_out_examples(
        self, model: PreTrainedModel, transform: Transform, *, in_memory: bool = True
    ) -> "ConcatDataset[dict[str, Any]]":
        """Return the held-out examples, labelled as the model.

        Raises:
            ValueError: the model does not know a class.
        """
        return ConcatDataset(
            [
                ImageExamples(
                    in_arrival_order(part, seed=0),
                    transform,
                    in_memory=in_memory,
                    label_ids=_label_ids(model, part),
                )
                for part in self.held_out
            ]
        )


def _label_ids(model: PreTrainedModel, dataset: AnyDataset) -> list[int]:
    known = {name: index for index, name in enumerate(model_labels(model))}
    unknown = [name for name in label_names(dataset) if name not in known]
    if unknown:
        raise ValueError(
            f"labels {unknown} are known neither to the model nor from the images to train on"
        )
    return [known[name] for name in label_names(dataset)]
