"""The model card: what is recorded, laid into ``model_card_template.md``.

Flow: history and model → YAML metadata and template variables → ``README.md``.
Every value is given or recorded, none is inferred; a variable the template asks for and nobody
gives is an error.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_dash._files import write_text
from hf_dash._version import library_versions
from hf_dash.arrivals import is_local
from hf_dash.classifiers import architecture_of
from hf_dash.history import RoundRecord
from hf_dash.models import IMAGE_MODES, is_timm, model_labels
from hf_dash.tables import markdown_table, rounds_table

TEMPLATE_NAME = "model_card_template.md"


@dataclass(frozen=True)
class CardInfo:
    """What a card needs to know beside the model.

    Args:
        model_name: title of the card.
        records: of the run, oldest first; the last one is the round the model comes from.
        settings: everything that was set for the run.
        dataset_name: as it was loaded.
        held_out_split: name of the split that was evaluated on.
        num_held_out: number of held-out images.
        dataset_revision: branch, tag or commit of a Hub dataset.
        parent: what the round started from: a Hub repository, or words; None for a first round.
        base_model: the parent's id on the Hub, where it has one.
        hub_model_id: where the model is to be found on the Hub, where it is.
        license: of the model, an identifier of the Hub's list; None leaves it out.
        figure: name of a figure beside the card.
        base_model_revision: exact commit of ``base_model`` that the round started from.
    """

    model_name: str
    records: list[RoundRecord]
    settings: dict[str, Any]
    dataset_name: str
    held_out_split: str
    num_held_out: int
    dataset_revision: str | None = None
    parent: str | None = None
    base_model: str | None = None
    hub_model_id: str | None = None
    license: str | None = None
    figure: str | None = None
    tags: list[str] = field(default_factory=lambda: ["timm", "transformers", "hf_dash"])
    base_model_revision: str | None = None

    @property
    def record(self) -> RoundRecord:
        """The round the model comes from."""
        return self.records[-1]


def card_metadata(info: CardInfo, library_name: str = "timm") -> ModelCardData:
    """Return the YAML metadata of a card, with the held-out accuracy as model-index.

    Args:
        info: what the card knows.
        library_name: ``"timm"`` for a timm wrapper, else ``"transformers"``.
    """
    result = EvalResult(
        task_type="image-classification",
        dataset_type=info.dataset_name,
        dataset_name=info.dataset_name,
        dataset_split=info.held_out_split,
        dataset_revision=info.dataset_revision,
        metric_type="accuracy",
        metric_name="Accuracy",
        metric_value=info.record.accuracy,
        verified=False,
    )
    own = [tag for tag in info.tags if tag != "timm" or library_name == "timm"]
    tags = [*own, "image-classification", "warm-start"]
    if info.record.shrink is not None:
        tags.append("dash")
    return ModelCardData(
        model_name=info.model_name,
        library_name=library_name,
        pipeline_tag="image-classification",
        license=info.license,
        tags=tags,
        datasets=None if is_local(info.dataset_name) else [info.dataset_name],
        base_model=info.base_model,
        metrics=["accuracy"],
        eval_results=[result],
    )


def render_card(model: PreTrainedModel, info: CardInfo) -> ModelCard:
    """Return the card of a model.

    Args:
        model: an image classifier of transformers; its config is described.
        info: everything else.

    Raises:
        jinja2.UndefinedError: the template asks for something that was not given.
    """
    config, record, hub_id = model.config, info.record, info.hub_model_id
    channels, size = _input_size(model)
    library_name = "timm" if is_timm(model) else "transformers"
    content = _template().render(
        card_data=card_metadata(info, library_name).to_yaml(),
        model_name=info.model_name,
        architecture=architecture_of(model),
        num_parameters=f"{model.num_parameters():,}",
        num_classes=config.num_labels,
        label_names=model_labels(model),
        image_mode=IMAGE_MODES.get(channels, "RGB"),
        image_size=size,
        library_name=library_name,
        load_from=hub_id or ".",
        timm_load_from=f"hf-hub:{hub_id}" if hub_id else "local-dir:.",
        parent=info.parent,
        record=record,
        rounds_table=rounds_table(info.records),
        factors_table=_factors_table(record),
        per_class_table=_per_class_table(record),
        settings_table=_settings_table(info.settings),
        dataset_name=info.dataset_name,
        held_out_split=info.held_out_split,
        num_held_out=info.num_held_out,
        figure=info.figure,
        versions=library_versions(),
    )
    return ModelCard(content)


def write_card(folder: str | Path, model: PreTrainedModel, info: CardInfo) -> None:
    """Write the card of a model as ``README.md`` into ``folder``, in one step."""
    write_text(Path(folder) / "README.md", str(render_card(model, info)))


def _input_size(model: PreTrainedModel) -> tuple[int, int]:
    """Return the number of channels and the width of a model's images."""
    if is_timm(model):
        channels, _, width = model.config.pretrained_cfg["input_size"]
        return channels, width
    size = getattr(model.config, "image_size", None)
    # Convolutional models name no size: theirs is the image processor's business.
    return getattr(model.config, "num_channels", 3), size if isinstance(size, int) else 224


def _template() -> jinja2.Template:
    here = Path(__file__).parent
    # In a wheel the template lies in the package, in a checkout beside it.
    path = next(p / TEMPLATE_NAME for p in (here, here.parent) if (p / TEMPLATE_NAME).exists())
    environment = jinja2.sandbox.SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(path.read_text(encoding="utf-8"))


def _factors_table(record: RoundRecord) -> str:
    if record.shrink is None:
        return ""
    header = ["tensor", "vectors", "mean", "min", "max", "at λ"]
    rows = [
        [
            f"`{tensor['name']}`",
            str(tensor["num_vectors"]),
            *(f"{tensor[key]:.3f}" for key in ("mean_factor", "min_factor", "max_factor")),
            f"{tensor['share_at_lam']:.1%}",
        ]
        for tensor in record.shrink["tensors"]
    ]
    return markdown_table(header, rows)


def _per_class_table(record: RoundRecord) -> str:
    rows = [[name, f"{value:.2%}"] for name, value in record.per_class_accuracy.items()]
    return markdown_table(["class", "accuracy"], rows)


def _settings_table(settings: dict[str, Any]) -> str:
    return markdown_table(["setting", "value"], [[k, str(v)] for k, v in settings.items()])
