"""hf_dash: direction-aware shrinking for vision models that are retrained on arriving data."""

from hf_dash._version import __version__
from hf_dash.arrivals import DataConfig, in_arrival_order, label_names, load_images
from hf_dash.callback import DashCallback
from hf_dash.card import CardInfo, library_versions, write_card
from hf_dash.config import DashConfig, StartsConfig
from hf_dash.continual import run_rounds
from hf_dash.dash import dash_shrink_
from hf_dash.evaluation import ClassAccuracy, evaluate_model
from hf_dash.history import History, RoundRecord, read_history, write_history
from hf_dash.hub import push_folder
from hf_dash.models import check_label_names, create_model, image_transform, load_model, save_model
from hf_dash.plots import plot_rounds
from hf_dash.rounds import ImageExamples, Round, cut_rounds, gradient_batches, train_batches
from hf_dash.shrink import NoEffectWarning, ShrinkReport
from hf_dash.starts import STARTS, Start, StartContext, Started, find_start
from hf_dash.stream_loader import StreamLoader
from hf_dash.streams import (
    StreamedImages,
    derive_max_steps,
    newest_examples,
    stream_gradient_batches,
)
from hf_dash.tables import markdown_table, rounds_table, starts_table
from hf_dash.training import TrainingConfig, TrainingResult, train_round

__all__ = [
    "STARTS",
    "CardInfo",
    "ClassAccuracy",
    "DashCallback",
    "DashConfig",
    "DataConfig",
    "History",
    "ImageExamples",
    "NoEffectWarning",
    "Round",
    "RoundRecord",
    "ShrinkReport",
    "Start",
    "StartContext",
    "Started",
    "StartsConfig",
    "StreamLoader",
    "StreamedImages",
    "TrainingConfig",
    "TrainingResult",
    "__version__",
    "check_label_names",
    "create_model",
    "cut_rounds",
    "dash_shrink_",
    "derive_max_steps",
    "evaluate_model",
    "find_start",
    "gradient_batches",
    "image_transform",
    "in_arrival_order",
    "label_names",
    "library_versions",
    "load_images",
    "load_model",
    "markdown_table",
    "newest_examples",
    "plot_rounds",
    "push_folder",
    "read_history",
    "rounds_table",
    "run_rounds",
    "save_model",
    "starts_table",
    "stream_gradient_batches",
    "train_batches",
    "train_round",
    "write_card",
    "write_history",
]
