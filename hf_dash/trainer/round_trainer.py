"""A Trainer for one round: even batches, accuracy as a metric, classes weighted if asked for.

Flow: a round's images, map-style or streamed → batches whose sizes differ by at most one → a
``Trainer`` that reports ``eval_accuracy``.
Differs from ``Trainer``: its last batch of an epoch holds what is left, down to one image.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_dash.data.batches import EvenBatchSampler, balanced_weights, cut_evenly
from hf_dash.data.rounds import Round, training_stream
from hf_dash.data.stream_loader import StreamedExamples, cut_batches
from hf_dash.method.batches import derive_max_steps
from hf_dash.method.loss import WeightedLoss


class RoundTrainer(Trainer):
    """A ``Trainer`` over the images of a round.

    Args:
        model: an image classifier of transformers.
        args: settings of the training. For streams, whose length a Trainer does not know,
            ``max_steps`` is set from ``num_train_epochs``.
        round_: the images, old and new.
        settings: further arguments of ``Trainer``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hf_dash
        >>> from transformers import TrainingArguments
        >>> model = hf_dash.create_model("test_resnet", label_names=list("0123456789"))
        >>> transform = hf_dash.models.image_transform(model)
        >>> images = hf_dash.load_images("digits").select(range(13))
        >>> (round_,) = hf_dash.data.cut_rounds(images, 1, transform)
        >>> with TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, per_device_train_batch_size=4, report_to="none")
        ...     trainer = hf_dash.trainer.RoundTrainer(model, args, round_)
        ...     [len(batch["labels"]) for batch in trainer.get_train_dataloader()]
        [3, 3, 3, 4]
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, round_: Round, **settings: Any
    ) -> None:
        self.round = round_
        if round_.streams and args.max_steps < 1:
            args.max_steps = derive_max_steps(
                round_.num_total,
                args.per_device_train_batch_size,
                args.world_size,
                args.num_train_epochs,
                args.gradient_accumulation_steps,
            )
        streams = round_.streams
        images = training_stream(round_, seed=args.seed) if streams else round_.examples
        settings = {"compute_metrics": accuracy, **settings}
        if getattr(args, "class_weights", None) is not None:
            weighted = WeightedLoss(balanced_weights(round_.class_counts()))
            settings["compute_loss_func"] = partial(_loss, weighted)
        super().__init__(model, args, train_dataset=images, **settings)

    def get_train_dataloader(self) -> "DataLoader[Any]":
        """Return the training batches of this process, prepared by Accelerate."""
        args, num_processes = self.args, self.accelerator.num_processes
        images: Any = self.train_dataset
        options: dict[str, Any] = {
            "num_workers": args.dataloader_num_workers,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }
        size = args.train_batch_size
        if self.round.streams:
            # Smaller ones than batches, so that a batch mixes what several workers read.
            share = math.ceil(size / max(1, args.dataloader_num_workers))
            chunks = DataLoader(images, batch_size=share, collate_fn=self.data_collator, **options)
            sizes = step_sizes(self.round.num_total, size, num_processes)
            loader: DataLoader[Any] = DataLoader(EvenStream(chunks, sizes), batch_size=None)
        else:
            sampler = EvenBatchSampler(self.round.order(args.seed), size, num_processes)
            loader = DataLoader(
                images,
                batch_sampler=sampler,
                collate_fn=self.data_collator,
                pin_memory=args.dataloader_pin_memory and self.accelerator.device.type != "cpu",
                **options,
            )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared


def _loss(
    weighted: WeightedLoss, outputs: Any, labels: Tensor, num_items_in_batch: Any = None
) -> Tensor:
    """Return the loss as a Trainer wants it: of accumulated batches, the sum over all images."""
    loss = weighted.of(outputs["logits"], labels)
    return loss if num_items_in_batch is None else loss * len(labels) / num_items_in_batch


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of right predictions, as a Trainer's ``compute_metrics`` does."""
    logits = prediction.predictions
    predicted = np.argmax(logits[0] if isinstance(logits, tuple) else logits, axis=-1)
    return {"accuracy": float((predicted == prediction.label_ids).mean())}


def step_sizes(num_examples: int, batch_size: int, num_processes: int) -> list[int]:
    """Return the sizes of the batches that the first process reads for all of them in turn.

    In every step but the last all processes get equally many, since Accelerate deals out a step's
    images equally and completes the last one.
    """
    whole, rest = divmod(num_examples, num_processes)
    steps = cut_evenly(whole, math.ceil(num_examples / (batch_size * num_processes)))
    last = [size + (rank < rest) for rank, size in enumerate([steps[0]] * num_processes)]
    # The smallest step comes last, so that completing it leaves sizes that differ by one.
    sizes = [size for step in steps[:0:-1] for size in [step] * num_processes]
    return [size for size in [*sizes, *last] if size]


class EvenStream(IterableDataset[dict[str, Tensor]]):
    """A stream's batches, cut to sizes of their own.

    Args:
        chunks: batches of any size, of a stream.
        sizes: of an epoch's batches.
    """

    def __init__(self, chunks: "DataLoader[Any]", sizes: Sequence[int]) -> None:
        self.chunks = chunks
        self.sizes = sizes

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        stream = self.chunks.dataset
        if isinstance(stream, StreamedExamples):
            stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        parts = ((chunk["pixel_values"], chunk["labels"]) for chunk in self.chunks)
        return cut_batches(parts, self.sizes)
