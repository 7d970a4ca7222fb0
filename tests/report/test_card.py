import ast
import html.parser
import json
import re

import jinja2
import pytest
import yaml
from children import Child, join
from helpers import REPOSITORY, record, tiny_processor, tiny_vit
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from jinja2.sandbox import SecurityError
from markdown_it import MarkdownIt

import hf_dash
from hf_dash.report.card import card_metadata, render_card

SHRINK = {
    "config": {"alpha": 0.3, "lam": 0.25, "grouping": "kernel"},
    "num_batches": 20,
    "num_images": 2560,
    "seconds": 1.5,
    "mean_factor": 0.4321,
    "share_at_lam": 0.6,
    "tensors": [
        {
            "name": "conv.weight",
            "num_vectors": 24,
            "mean_factor": 0.5,
            "min_factor": 0.25,
            "max_factor": 1.0,
            "share_at_lam": 0.5,
        }
    ],
}


MEASURED = {"data_fingerprint": "trained", "held_out_fingerprint": "frozen"}


FIRST = record("dash", held_out_fingerprint="frozen", accuracy=0.75, images_read=30)


SECOND = record(
    "dash",
    0,
    2,
    accuracy=0.875,
    shrink=SHRINK,
    parent=FIRST.folder,
    images_read=2620,
    hardware="1 × cpu, fp32",
    **MEASURED,
)


COLD = record(
    "cold",
    0,
    2,
    accuracy=0.8125,
    per_class_accuracy={"b": 0.25},
    parent="rounds/001/cold_seed0",
    **MEASURED,
)


# What names from data might hold to break out of where they are put.
HOSTILE = [
    "a|b",
    "`x`",
    "```\n# not a heading\n```",
    "{{ 7*7 }}",
    "{% include 'x' %}",
    "<script>alert(1)</script>",
    "- yaml: [",
    "two\nlines\r\n\r\n---\nlicense: mit",
    "![x](https://example.com/x.png)",
    "</details> &lt; &#124;",
    "**bold** _it_ ~~no~~ $x$ __init__",
    "back\\slash\\|pipe\\",
    "www.example.com me@example.com",
    "'single' \"double\": #",
    "null",
    "08",
    "\u202eright to left, tab\tand nul\0",
    "plain name_with_underscores",
]


def info(**changes):
    fields = {
        "model_name": "test_resnet on digits",
        "records": [FIRST, SECOND],
        "settings": {"learning_rate": 0.05},
        "dataset_name": "digits",
        "held_out_split": "test",
        "num_held_out": 360,
    }
    return hf_dash.report.CardInfo(**{**fields, **changes})


class Tables(html.parser.HTMLParser):
    """The cells of a rendered card, and all tags that were met."""

    def __init__(self, card):
        super().__init__()
        self.rows, self.tags, self.cell, self.text = [], set(), False, ""
        text = re.sub(r"\A---\n.*?\n---\n", "", str(card), flags=re.DOTALL)
        rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
        self.feed(rendered)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data


def one_line(name):
    """A name as a table can show it: white space joined, what cannot be shown replaced."""
    return re.sub("[\0\u202e]", "\ufffd", " ".join(name.split()))


def test_the_metadata_is_valid_and_reads_back(small_model):
    commit = "0123456789abcdef0123456789abcdef01234567"
    card = render_card(
        small_model,
        info(
            dataset_name="user/images",
            dataset_revision="v1",
            base_model="user/parent",
            base_model_revision=commit,
        ),
    )
    data = ModelCard(str(card)).data
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["user/images"]
    assert (data.base_model, data.base_model_revision) == ("user/parent", commit)
    assert f"Base model: `user/parent` at commit `{commit}`." in str(card)
    assert {"hf_dash", "dash", "warm-start", "timm", "transformers"} <= set(data.tags)
    raw = yaml.safe_load(str(card).split("---\n")[1])
    name, (result,) = model_index_to_eval_results(raw["model-index"])
    assert name == "test_resnet on digits"
    assert result == EvalResult(
        task_type="image-classification",
        dataset_type="user/images",
        dataset_name="user/images",
        dataset_split="test",
        dataset_revision="v1",
        metric_type="accuracy",
        metric_name="Accuracy",
        metric_value=0.875,
        verified=False,
    )
    assert data.eval_results == [result]
    # None would be left out of the file: False is there to be read.
    assert raw["model-index"][0]["results"][0]["metrics"][0]["verified"] is False


def test_local_data_are_not_called_a_dataset_of_the_hub():
    assert card_metadata(info()).datasets is None
    assert "dash" not in card_metadata(info(records=[record("warm")])).tags


def test_the_hub_accepts_the_metadata_and_bad_metadata_are_reported(small_model, hub):
    render_card(small_model, info(model_name=HOSTILE[7], base_model="user/parent")).validate()
    with pytest.raises(ValueError, match="'no: \\[repository' is no id"):
        render_card(small_model, info(base_model="no: [repository")).validate()
    card = render_card(small_model, info())
    card.data.eval_results[0].metric_value = "high"
    with pytest.raises(ValueError, match="'high' is no number"):
        card.validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"records": []}, "records must hold at least one record, got none"),
        ({"num_held_out": 0}, "num_held_out must be at least 1, got 0"),
        ({"records": [record(accuracy=float("nan"))]}, r"accuracy in \[0, 1\], got nan"),
        ({"records": [record(accuracy=97.5)]}, r"accuracy in \[0, 1\], got 97.5"),
        ({"base_model_revision": "1234"}, "base_model must be given with .* '1234'"),
        (
            {"records": [record(data_fingerprint="same", held_out_fingerprint="same")]},
            "these are the images trained on: both have the fingerprint same",
        ),
        (
            {"settings": {"train_split": "all"}, "held_out_split": "all"},
            "held_out_split must not be the split trained on, .* got 'all'",
        ),
    ],
)
def test_what_is_no_evaluation_on_held_out_images_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        info(**changes)


def test_images_held_out_elsewhere_may_have_the_same_split_name():
    settings = {"train_split": "train", "test_dataset_name": "user/other"}
    assert info(settings=settings, held_out_split="train").record == SECOND


def test_training_accuracy_is_nowhere_in_the_card(small_model):
    records = [FIRST, record("dash", 0, 2, train_accuracy=0.4321, parent="x", accuracy=0.5)]
    text = str(render_card(small_model, info(records=records)))
    assert "43.21" not in text
    assert "0.4321" not in text


def test_the_card_says_what_was_recorded(small_model):
    text = str(
        render_card(
            small_model,
            info(parent="user/parent at 1234", figure="rounds.png", factors_figure="factors.png"),
        )
    )
    for expected in (
        "# test_resnet on digits",
        "373,658 parameters, 10 classes",
        "**dash** start from user/parent at 1234 and was trained on 20 images, 10 of them new.",
        "α = 0.3, λ = 0.25",
        "20 minibatches,\n2,560 images read in 1.50 s",
        "Mean factor 0.432",
        "| `conv.weight` |      24 | 0.500 | 0.250 | 1.000 | 50.0% |",
        "| learning_rate |  0.05 |",
        "Accuracy **87.50 %** on 360 held-out images",
        "![Accuracy and training steps over rounds](rounds.png)",
        "![Mean and range of the factors of every tensor](factors.png)",
        "shin2024dash",
        hf_dash.__version__,
    ):
        assert expected in text, expected
    assert "{{" not in text.replace("{{DASH}", "").replace("{{The hf_dash team}}", "")


def rows_of(model, **changes):
    """Return the rows of the card's tables, each by its first cell; the last one where several."""
    return {row[0]: row[1:] for row in Tables(render_card(model, info(**changes))).rows}


def test_parent_child_and_scratch_stand_side_by_side(small_model):
    rivals = [record("warm", 0, 2, **MEASURED), COLD]
    rows = rows_of(small_model, rivals=rivals)
    assert rows["held-out accuracy"] == ["75.00%", "87.50%", "81.25%"]
    # The parent was a first round, which has no start.
    card = render_card(small_model, info(rivals=rivals))
    assert ["start", "–", "dash", "cold"] in Tables(card).rows
    assert rows["images trained on"] == ["10", "20", "20"]
    assert rows["seconds"] == ["2.5", "2.5", "2.5"]
    assert (rows["a"], rows["b"]) == (["40.00%", "40.00%", "–"], ["60.00%", "60.00%", "25.00%"])


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"round_index": 1},
        {"start": "warm"},
        {"data_fingerprint": "other"},
        {"held_out_fingerprint": "other"},
        {"held_out_fingerprint": None},
    ],
)
def test_what_is_not_known_to_be_comparable_is_not_compared(small_model, changes):
    rival = hf_dash.history.RoundRecord(**{**COLD.__dict__, **changes})
    rows = rows_of(small_model, rivals=[rival])
    assert rows["held-out accuracy"] == ["75.00%", "87.50%", "not measured"]
    assert rows["a"] == ["40.00%", "40.00%"]


def test_without_fingerprints_nothing_is_compared(small_model):
    records = [record("dash"), record("dash", 0, 2, parent="rounds/001/dash_seed0")]
    rivals = [record("cold", 0, 2)]
    rows = rows_of(small_model, records=records, rivals=rivals)
    assert rows["held-out accuracy"] == ["not measured", "50.00%", "not measured"]
    assert rows["images trained on"] == ["10", "20", "–"]
    assert rows["dataset"] == ["digits"]
    assert rows["their fingerprint"] == ["not recorded"]


def test_a_first_round_has_no_parent(small_model):
    alone = record("cold", accuracy=0.25, **MEASURED)
    rows = rows_of(small_model, records=[alone])
    # Trained from scratch itself.
    assert rows["held-out accuracy"] == ["not measured", "25.00%", "25.00%"]
    text = str(render_card(small_model, info(records=[alone])))
    assert "It is a first round, without a parent,\n and was trained on 10 images" in text


def test_cost_and_data_are_those_recorded(small_model):
    rows = rows_of(small_model, dataset_revision="v1")
    assert rows["images read"] == ["2,620", "2,650"]
    assert rows["optimizer steps"] == ["30", "60"]
    assert rows["seconds of the start"] == ["0.50", "1.00"]
    assert rows["seconds of training"] == ["2.0", "4.0"]
    assert rows["hardware"] == ["1 × cpu, fp32", "not recorded; 1 × cpu, fp32"]
    assert rows["revision"] == ["v1"]
    assert rows["held out"] == ["360 images: test"]
    assert rows["their fingerprint"] == ["frozen"]
    files = {"files": ["monday.parquet"], "skipped": ["monday.parquet:3"]}
    rows = rows_of(small_model, records=[record(**files)])
    assert rows["images read"] == ["not recorded"] * 2
    assert rows["revision"] == ["none given"]
    assert (rows["new files"], rows["left out"]) == (
        ["monday.parquet"],
        ["monday.parquet:3"],
    )


def test_a_card_without_a_shrink_says_so(small_model):
    text = str(render_card(small_model, info(records=[record("warm", 0, 2)])))
    assert "No weight was shrunk before this round." in text
    assert "direction-aware" not in text.split("## Limits")[0]


def test_a_variant_is_named_where_there_was_one(small_model):
    assert "variant" not in str(render_card(small_model, info(records=[SECOND])))
    shrink = {**SHRINK, "config": {**SHRINK["config"], "variant": "orthogonal"}}
    one = record("dash", 0, 2, shrink=shrink)
    text = str(render_card(small_model, info(records=[one])))
    assert "grouping = kernel, variant = orthogonal; 20 minibatches" in text


def test_the_citations_are_whole(small_model):
    entries = re.findall(r"```bibtex\n(.*?)```", str(render_card(small_model, info())), re.DOTALL)
    cff = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    for entry, title in zip(
        entries, (cff["preferred-citation"]["title"], cff["title"]), strict=True
    ):
        depths = [0]
        for character in entry.strip():
            depths.append(depths[-1] + {"{": 1, "}": -1}.get(character, 0))
        assert depths[-1] == 0
        assert 0 not in depths[depths.index(1) : -1], "it ends before its last brace"
        assert title in re.sub("[{}]", "", entry)


def use_template(monkeypatch, folder, text):
    monkeypatch.setattr("hf_dash.report.card.__file__", str(folder / "report" / "card.py"))
    (folder / "model_card_template.md").write_text(text)


def test_an_undefined_template_variable_fails(small_model, monkeypatch, tmp_path):
    use_template(monkeypatch, tmp_path, "{{ nobody_gives_this }}")
    with pytest.raises(jinja2.UndefinedError, match="nobody_gives_this"):
        render_card(small_model, info())


def test_the_template_is_rendered_in_a_sandbox(small_model, monkeypatch, tmp_path):
    use_template(monkeypatch, tmp_path, "{{ record.__class__.__mro__ }}")
    with pytest.raises(SecurityError, match="__class__"):
        render_card(small_model, info())


def test_every_expression_of_a_template_is_escaped(small_model, monkeypatch, tmp_path):
    template = "{{ info.model_name }} {{ info.model_name ~ '!' }} {{ [info.model_name] | join }}"
    template = f"---\na: 1\n---\n{template}"
    use_template(monkeypatch, tmp_path, template)
    text = str(render_card(small_model, info(model_name="<b>*")))
    assert text == "---\na: 1\n---\n\\<b>\\* \\<b>\\*! \\<b>\\*"


def test_text_from_data_is_not_run_as_a_template(small_model):
    text = str(render_card(small_model, info(model_name="{{ 7 * 7 }}")))
    assert "# {{ 7 \\* 7 }}" in text
    assert "49" not in text


def test_names_from_data_break_nothing():
    model = hf_dash.create_model("test_resnet", label_names=HOSTILE, image_size=32)
    joined = " ".join(HOSTILE)
    per_class = {name: index / 100 for index, name in enumerate(HOSTILE)}
    tensors = [{**SHRINK["tensors"][0], "name": name} for name in HOSTILE]
    last = record(
        joined,
        0,
        2,
        per_class_accuracy=per_class,
        parent=joined,
        files=HOSTILE,
        skipped=HOSTILE,
        hardware=joined,
        shrink={**SHRINK, "tensors": tensors, "config": {**SHRINK["config"], "grouping": joined}},
        versions={joined: joined},
    )
    last.shrink["config"]["variant"] = joined
    names = ("model_name", "dataset_name", "dataset_revision", "held_out_split", "parent")
    names += ("base_model", "base_model_revision", "license")
    given = dict.fromkeys(names, joined)
    given |= {"settings": {name: name for name in HOSTILE}, "records": [last]}
    card = render_card(model, info(**given))

    data = ModelCard(str(card)).data
    assert data.label_names == HOSTILE
    assert (data.model_name, data.base_model, data.license) == (joined, joined, joined)
    assert data.eval_results[0].dataset_name == joined
    assert set(data.to_dict()) == set(card_metadata(info(**given), "timm", HOSTILE).to_dict())

    harmless = render_card(model, info(license="mit", records=[record("warm")]))
    page, plain = Tables(card), Tables(harmless)
    assert page.tags - plain.tags == set()
    shown = [row[0] for row in page.rows]
    for name in HOSTILE:
        # One row of the classes, one of the settings, one of the tensors, each of all its cells.
        assert shown.count(one_line(name)) == 3
    widths = [len(row) for row in page.rows]
    assert set(widths) == {2, 3, 4, 6, 8}
    assert [one_line(name), one_line(name)] in page.rows
    assert one_line(joined) in page.text
    assert str(card).count("\n## ") == str(harmless).count("\n## ")
    blocks = [re.findall("^```.*$", str(one), re.MULTILINE) for one in (card, harmless)]
    assert blocks[0] == blocks[1]


def test_a_repository_name_cannot_leave_its_string_in_the_code(small_model):
    name = 'x", y)\n```\n<b>\'"""é😀\u2028'
    card = str(render_card(small_model, info(hub_model_id=name)))
    snippets = re.findall(r"```python\n(.*?)```\n", card, flags=re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        constants = [n.value for n in ast.walk(ast.parse(snippet)) if isinstance(n, ast.Constant)]
        assert any(constant in (name, f"hf-hub:{name}") for constant in constants)
    assert Tables(card).tags == Tables(render_card(small_model, info())).tags


def run_each(snippets):
    for code in snippets:
        exec(code, {})  # the names of a snippet are its own
        print("=====")


def run_snippets(folder):
    """Run every Python snippet of a folder's card, by itself, and return what they print."""
    card = (folder / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    (done,) = join([Child(run_each, snippets, folder=folder)])
    assert done.returncode == 0, done.stderr
    return done.stdout.split("=====")[:-1]


def test_the_snippets_of_a_saved_folder_run(small_model, tmp_path):
    hf_dash.save_model(small_model, tmp_path)
    hf_dash.report.write_card(tmp_path, small_model, info())
    pipeline, timm, trainer = run_snippets(tmp_path)
    assert "'score'" in pipeline
    assert "tensor" in timm
    assert "DASH shrank " in trainer
    # 32 images in batches of 8.
    report = json.loads((tmp_path / "next_round" / "dash_report.json").read_text())
    assert report["num_images"] == 32


def test_the_snippets_of_a_native_model_run(tmp_path):
    hf_dash.save_model(tiny_vit(), tmp_path, tiny_processor())
    hf_dash.report.write_card(tmp_path, tiny_vit(), info())
    pipeline, trainer = run_snippets(tmp_path)
    assert "'score'" in pipeline
    assert "DASH shrank " in trainer


def test_a_model_on_the_hub_is_loaded_from_there(small_model):
    text = str(render_card(small_model, info(hub_model_id="user/name")))
    assert 'model="user/name"' in text
    assert '"hf-hub:user/name"' in text
    assert 'load_model("user/name")' in text


def test_a_gray_model_warns_of_the_pipeline():
    model = hf_dash.create_model(
        "test_resnet", label_names=["a"], image_size=32, model_args={"in_chans": 1}
    )
    assert "The pipeline converts images to RGB first" in str(render_card(model, info()))


def test_a_card_of_a_native_model_speaks_of_transformers_alone():
    card = str(render_card(tiny_vit(), info()))
    data = ModelCard(card).data
    assert data.library_name == "transformers"
    assert "timm" not in data.tags
    assert "An image classifier (vit, " in card
    assert 'Image.new("RGB", (16, 16))' in card
    assert "import timm" not in card
