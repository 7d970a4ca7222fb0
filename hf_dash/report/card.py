"""The model card: what is recorded, laid into ``model_card_template.md``.

Flow: history and model → YAML metadata and template variables → ``README.md``.
Every value is given or recorded, never inferred; a variable of the template without a value is an
error. Names and settings come from data: the template is rendered in a sandbox, which
escapes all that is not made here, and text from data is never a template itself.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_dash._version import __version__
from hf_dash.data.shards import loader_of
from hf_dash.data.sources import is_local
from hf_dash.history import RoundRecord
from hf_dash.models import IMAGE_MODES, architecture_of, is_timm, model_labels
from hf_dash.report import card_tables as tables
from hf_dash.report.markdown import Markdown, code_span, escape_markdown
from hf_dash.report.tables import rounds_table
from hf_dash.utils.files import public_name, write_text

TEMPLATE_NAME = "model_card_template.md"


@dataclass(frozen=True)
class CardData:
    """The images of a round as its card names them.

    Args:
        dataset_name: as it was loaded.
        held_out_split: name of the split that was evaluated on.
        num_held_out: number of held-out images, at least 1.
        dataset_revision: branch, tag or commit of a Hub dataset.

    Example:
        >>> import hf_dash
        >>> hf_dash.report.CardData("digits", "test", 360).num_held_out
        360
    """

    dataset_name: str
    held_out_split: str
    num_held_out: int
    dataset_revision: str | None = None


@dataclass(frozen=True)
class CardInfo:
    """What a card needs to know besides the model.

    Args:
        model_name: title of the card.
        records: of the chain of rounds that led to the model, oldest first, each begun from the one
            before; the last one is the round the model comes from.
        settings: everything that was set for the run.
        dataset_name: as it was loaded.
        held_out_split: name of the split that was evaluated on.
        num_held_out: number of held-out images, at least 1.
        dataset_revision: branch, tag or commit of a Hub dataset.
        parent: what the round started from: a Hub repository, or words; None for a first round.
        base_model: the parent's id on the Hub, where it has one.
        hub_model_id: where the model is to be found on the Hub, where it is.
        license: of the model, an identifier of the Hub's list; None leaves it out.
        figure: file name of a figure of the rounds.
        base_model_revision: exact commit of ``base_model`` that the round started from.
        rivals: records of other starts, such as ``"cold"``, in the same round.
        factors_figure: file name of a figure of the shrink's factors.
        followed: sentence of the recommendation that chose the start, if one did.
        local_data: whether ``dataset_name`` means embedded or local data; None finds out.

    Raises:
        ValueError: there is no record or no held-out image; the accuracy is not a number in
            [0, 1]; it was measured on the images or the split trained on; or
            ``base_model_revision`` is given without ``base_model``.

    Example:
        >>> import hf_dash
        >>> hf_dash.report.CardInfo("my model", [], {}, "digits", "test", 360)
        Traceback (most recent call last):
            ...
        ValueError: records must hold at least one record, got none
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
    rivals: list[RoundRecord] = field(default_factory=list)
    factors_figure: str | None = None
    followed: str | None = None
    local_data: bool | None = None

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("records must hold at least one record, got none")
        if self.num_held_out < 1:
            raise ValueError(f"num_held_out must be at least 1, got {self.num_held_out!r}")
        accuracy = self.record.accuracy
        if not (math.isfinite(accuracy) and 0 <= accuracy <= 1):
            raise ValueError(f"records must end with an accuracy in [0, 1], got {accuracy!r}")
        if self.base_model_revision is not None and self.base_model is None:
            raise ValueError(
                f"base_model must be given with base_model_revision {self.base_model_revision!r}"
            )
        _check_held_out(self)

    @property
    def record(self) -> RoundRecord:
        """The round the model comes from."""
        return self.records[-1]


def card_info(
    model: PreTrainedModel,
    records: Sequence[RoundRecord],
    settings: dict[str, Any],
    data: CardData,
    *,
    rivals: Sequence[RoundRecord] = (),
    base: tuple[str, str] | None = None,
    hub_model_id: str | None = None,
) -> CardInfo:
    """Return what a card says of a model: the one way from records to a card.

    Args:
        model: whose architecture the title names.
        records: see :class:`CardInfo`.
        settings: see :class:`CardInfo`.
        data: trained and evaluated on.
        rivals: see :class:`CardInfo`.
        base: id and exact commit of the parent on the Hub, where it is there.
        hub_model_id: see :class:`CardInfo`.

    Raises:
        ValueError: see :class:`CardInfo`.

    Example:
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> data = hf_dash.report.CardData("digits", "test", 360)
        >>> hf_dash.report.card_info(model, [record], {}, data).model_name
        'test_resnet on digits'
    """
    base_model, base_model_revision = base or (None, None)
    return CardInfo(
        model_name=f"{architecture_of(model)} on {title_of(data.dataset_name)}",
        records=list(records),
        settings=settings,
        dataset_name=public_name(data.dataset_name),
        local_data=is_local(data.dataset_name),
        held_out_split=data.held_out_split,
        num_held_out=data.num_held_out,
        dataset_revision=data.dataset_revision,
        parent=None if records[-1].parent is None else "the model of the round before",
        rivals=list(rivals),
        base_model=base_model,
        base_model_revision=base_model_revision,
        hub_model_id=hub_model_id,
    )


def title_of(dataset_name: str) -> str:
    """Return a dataset's name for a title: without folders, owner and the ending of a file."""
    path = Path(dataset_name)
    return path.name.partition(".")[0] if loader_of(path.name) else path.name


def _check_held_out(info: CardInfo) -> None:
    """Refuse an evaluation on what was trained on, as far as the records and settings tell."""
    fingerprint = info.record.held_out_fingerprint
    allowed = info.record.overlap is not None  # and said on the card
    if not allowed and fingerprint is not None and fingerprint == info.record.data_fingerprint:
        raise ValueError(
            "records must end with an accuracy of held-out images, but these are the images trained"
            f" on: both have the fingerprint {fingerprint}"
        )
    elsewhere = info.settings.get("test_dataset_name") or info.settings.get("validation_dir")
    if info.held_out_split == info.settings.get("train_split") and not elsewhere:
        raise ValueError(
            "held_out_split must not be the split trained on, settings['train_split'], got"
            f" {info.held_out_split!r}: accuracy on it is not an evaluation"
        )


def card_metadata(
    info: CardInfo, library_name: str = "timm", label_names: list[str] | None = None
) -> ModelCardData:
    """Return the YAML metadata of a card, with the held-out accuracy as model-index.

    Args:
        info: what the card knows.
        library_name: ``"timm"`` for a timm wrapper, else ``"transformers"``.
        label_names: of the classes, in the order of the logits; None leaves them out.
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
    local = is_local(info.dataset_name) if info.local_data is None else info.local_data
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
        datasets=None if local else [info.dataset_name],
        base_model=info.base_model,
        metrics=["accuracy"],
        eval_results=[result],
        base_model_revision=info.base_model_revision,
        label_names=label_names,
    )


def render_card(model: PreTrainedModel, info: CardInfo) -> ModelCard:
    """Return the card of a model.

    Args:
        model: an image classifier of transformers; its config is described.
        info: everything else.

    Raises:
        jinja2.UndefinedError: the template asks for something that was not given.
    """
    record, hub_id = info.record, info.hub_model_id
    channels, size = _input_size(model)
    library_name = "timm" if is_timm(model) else "transformers"
    label_names = model_labels(model)
    content = _template().render(
        card_data=Markdown(card_metadata(info, library_name, label_names).to_yaml()),
        info=info,
        record=record,
        architecture=architecture_of(model),
        num_parameters=f"{model.num_parameters():,}",
        label_names=label_names,
        image_mode=IMAGE_MODES.get(channels, "RGB"),
        image_size=size,
        library_name=library_name,
        load_from=hub_id or ".",
        timm_load_from=f"hf-hub:{hub_id}" if hub_id else "local-dir:.",
        lineage_table=tables.lineage_table(info.records, info.rivals),
        rounds_table=rounds_table(info.records),
        per_class_table=tables.per_class_table(info.records, info.rivals),
        factors_table=tables.factors_table(record),
        cost_table=tables.cost_table(info.records),
        data_table=tables.data_table(
            record,
            info.dataset_name,
            info.dataset_revision,
            info.held_out_split,
            info.num_held_out,
        ),
        settings_table=tables.settings_table(info.settings),
        hf_dash_version=__version__,
    )
    return ModelCard(content)


def write_card(folder: str | Path, model: PreTrainedModel, info: CardInfo) -> None:
    """Write the card of a model as ``README.md`` into ``folder``, in one step.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> info = hf_dash.report.CardInfo("my model", [record], {}, "digits", "test", 360)
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.report.write_card(folder, model, info)
    """
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
    package = Path(__file__).parent.parent
    # In a wheel the template lies in the package, in a checkout next to it.
    places = (package / TEMPLATE_NAME, package.parent / TEMPLATE_NAME)
    path = next(place for place in places if place.exists())
    environment = jinja2.sandbox.SandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What autoescape does for HTML, for Markdown: no expression gets past it.
        finalize=lambda value: escape_markdown(value if isinstance(value, str) else str(value)),
    )
    environment.filters |= {"code": code_span, "python": _python_literal}
    return environment.from_string(path.read_text(encoding="utf-8"))


def _python_literal(text: str) -> Markdown:
    """Return a string of Python's in ASCII, which cannot end itself, its line or its code block."""
    quoted = json.dumps(text, ensure_ascii=False)
    return Markdown(quoted.encode("ascii", "backslashreplace").decode())
