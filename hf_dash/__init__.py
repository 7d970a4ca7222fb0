"""hf_dash: direction-aware shrinking for vision models that are retrained on arriving data."""

from hf_dash._hub_calls import HubError
from hf_dash._version import __version__, library_versions
from hf_dash.arrivals import DataConfig, in_arrival_order, load_images
from hf_dash.augmentation import RandomCropFlip
from hf_dash.batches import derive_max_steps
from hf_dash.callback import DashCallback
from hf_dash.card import CardInfo, write_card
from hf_dash.checkpoints import only_one
from hf_dash.classifiers import (
    architecture_of,
    classifier_transform,
    load_classifier,
    save_classifier,
)
from hf_dash.columns import fingerprint, label_names
from hf_dash.comparison import Comparison, PairedAccuracy, Verdict, compare_models, decide
from hf_dash.config import DashConfig, StartsConfig
from hf_dash.continual import run_rounds
from hf_dash.convergence import TrainAccuracyStop
from hf_dash.dash import dash_shrink_
from hf_dash.evaluation import ClassAccuracy, evaluate_model, predict
from hf_dash.evidence import (
    PairedDifference,
    cost_table,
    join_histories,
    paired_difference,
    paired_table,
)
from hf_dash.examples import ImageExamples, flip_labels
from hf_dash.framework import Simulation, simulate, write_simulations
from hf_dash.history import (
    MAY_DIFFER,
    History,
    Promotion,
    RoundRecord,
    open_history,
    read_history,
    write_history,
)
from hf_dash.hub import HubRound, promote_on_hub, push_round
from hf_dash.incoming import Arrival, arrivals_root, list_arrivals, load_arrival, new_arrivals
from hf_dash.lineage import Parent, find_parent, rebuild_chain
from hf_dash.memorisation import measure_memorisation
from hf_dash.models import (
    black_pixel,
    check_label_names,
    create_model,
    grow_head,
    image_transform,
    load_model,
    save_model,
)
from hf_dash.named_starts import find_start
from hf_dash.plots import plot_factors, plot_pretraining, plot_rounds, plot_simulations
from hf_dash.pretraining import pretrained_epochs, run_pretraining
from hf_dash.promotion import promote, rollback
from hf_dash.results import (
    export_model,
    trainer_record,
    training_settings,
    write_model_folder,
    write_results,
)
from hf_dash.round_data import RoundData
from hf_dash.rounds import (
    Round,
    cut_rounds,
    gradient_batches,
    train_batches,
    training_stream,
)
from hf_dash.schedule import Schedule, cut_schedule, file_schedule, load_schedules
from hf_dash.script_arguments import DataTrainingArguments, ModelArguments
from hf_dash.sharing import HubArguments, share_folder, share_promotion, share_rounds
from hf_dash.shrink import NoEffectWarning, ShrinkReport
from hf_dash.starts import STARTS, Start, StartContext, Started, every_round
from hf_dash.stream_loader import StreamLoader
from hf_dash.streams import (
    StreamedImages,
    newest_examples,
    stream_gradient_batches,
)
from hf_dash.tables import (
    markdown_table,
    memorisation_table,
    pretraining_table,
    rounds_table,
    simulations_table,
    starts_table,
)
from hf_dash.training import TrainingResult, train_round
from hf_dash.training_config import TrainingConfig

__all__ = [
    "MAY_DIFFER",
    "STARTS",
    "Arrival",
    "CardInfo",
    "ClassAccuracy",
    "Comparison",
    "DashCallback",
    "DashConfig",
    "DataConfig",
    "DataTrainingArguments",
    "History",
    "HubArguments",
    "HubError",
    "HubRound",
    "ImageExamples",
    "ModelArguments",
    "NoEffectWarning",
    "PairedAccuracy",
    "PairedDifference",
    "Parent",
    "Promotion",
    "RandomCropFlip",
    "Round",
    "RoundData",
    "RoundRecord",
    "Schedule",
    "ShrinkReport",
    "Simulation",
    "Start",
    "StartContext",
    "Started",
    "StartsConfig",
    "StreamLoader",
    "StreamedImages",
    "TrainAccuracyStop",
    "TrainingConfig",
    "TrainingResult",
    "Verdict",
    "__version__",
    "architecture_of",
    "arrivals_root",
    "black_pixel",
    "check_label_names",
    "classifier_transform",
    "compare_models",
    "cost_table",
    "create_model",
    "cut_rounds",
    "cut_schedule",
    "dash_shrink_",
    "decide",
    "derive_max_steps",
    "evaluate_model",
    "every_round",
    "export_model",
    "file_schedule",
    "find_parent",
    "find_start",
    "fingerprint",
    "flip_labels",
    "gradient_batches",
    "grow_head",
    "image_transform",
    "in_arrival_order",
    "join_histories",
    "label_names",
    "library_versions",
    "list_arrivals",
    "load_arrival",
    "load_classifier",
    "load_images",
    "load_model",
    "load_schedules",
    "markdown_table",
    "measure_memorisation",
    "memorisation_table",
    "new_arrivals",
    "newest_examples",
    "only_one",
    "open_history",
    "paired_difference",
    "paired_table",
    "plot_factors",
    "plot_pretraining",
    "plot_rounds",
    "plot_simulations",
    "predict",
    "pretrained_epochs",
    "pretraining_table",
    "promote",
    "promote_on_hub",
    "push_round",
    "read_history",
    "rebuild_chain",
    "rollback",
    "rounds_table",
    "run_pretraining",
    "run_rounds",
    "save_classifier",
    "save_model",
    "share_folder",
    "share_promotion",
    "share_rounds",
    "simulate",
    "simulations_table",
    "starts_table",
    "stream_gradient_batches",
    "train_batches",
    "train_round",
    "trainer_record",
    "training_settings",
    "training_stream",
    "write_card",
    "write_history",
    "write_model_folder",
    "write_results",
    "write_simulations",
]
