import dataclasses
import logging
import shlex
import typing

import pytest
from helpers import content_of, log_of, make_round, record, save_round
from hub_double import TOKENS
from huggingface_hub import ModelCard
from transformers import HfArgumentParser, TrainingArguments

import hf_dash
from hf_dash.hub.sharing import HubArguments, push_command, push_folder, push_promotion, push_rounds
from hf_dash.runs.dropped import drop_rounds

TOKEN = next(iter(TOKENS))


ON = HubArguments(push_to_hub=True, hub_model_id="user/model")


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the package warns of; transformers keeps its loggers to itself."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture
def run(tmp_path):
    """The output folder of a run of three rounds, and what was recorded."""
    names = [str(digit) for digit in range(10)]
    history = hf_dash.History(tmp_path / "run" / "history.jsonl", {"lam": 0.3})
    history.path.parent.mkdir()
    for index in (1, 2, 3):
        model = hf_dash.create_model("test_resnet", label_names=names, image_size=32, seed=index)
        parent = None if index == 1 else history.records[-1].folder
        one = record("dash", 0, index, accuracy=0.5 + index / 10, parent=parent)
        history.append(save_round(tmp_path / "run", model, {}, one, history.settings, history.head))
    return tmp_path / "run", history


def push(run, hub_arguments=ON):
    output_dir, history = run
    data = hf_dash.report.CardData("digits", "test", 360)
    return push_rounds(hub_arguments, output_dir, hf_dash.report.Chain(history, "dash", 0, data))


def test_the_flags_are_those_of_training_arguments():
    # Not the fields' types, into which HfArgumentParser writes.
    theirs = typing.get_type_hints(TrainingArguments)
    for name, kind in typing.get_type_hints(HubArguments).items():
        assert kind == theirs[name], name
    flags = ["--push_to_hub", "--hub_model_id", "user/model", "--hub_private_repo", "false"]
    (hub,) = HfArgumentParser(HubArguments).parse_args_into_dataclasses(flags)
    assert hub == HubArguments(True, "user/model", None, False, None)


def test_the_token_leaves_the_trainers_arguments(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), push_to_hub=True, hub_model_id="user/model", hub_token=TOKEN
    )
    hub = HubArguments.taken_from(args)
    assert (hub.push_to_hub, hub.hub_model_id, hub.hub_token) == (True, "user/model", TOKEN)
    assert (args.push_to_hub, args.hub_token) == (False, None)
    assert TOKEN not in repr(hub)
    with pytest.raises(ValueError, match="token must be one word") as caught:
        HubArguments(hub_token="hf_one two")
    assert "hf_one" not in str(caught.value)
    assert TOKEN not in repr(hf_dash.trainer.ModelArguments("user/model", token=TOKEN))


def test_nothing_is_asked_of_the_hub_unasked(hub, run, tmp_path):
    off = dataclasses.replace(ON, push_to_hub=False)
    assert push_folder(off, tmp_path) is None
    assert push(run, off) is None
    assert push_promotion(off, run[0], "rounds/001/dash_seed0", "") is None
    assert hub.requests == []


@pytest.mark.parametrize("status", [401, 403, 409, 500, "drop"])
def test_a_failure_ends_no_training_and_tells_the_command(
    hub,
    quick,
    warnings,
    capfd,
    tmp_path,
    status,
):
    folder = tmp_path / "a folder"
    make_round(folder, 1)
    before = content_of(folder)
    hub.fail("POST .*/commit/", status)
    own = dataclasses.replace(ON, hub_token=TOKEN, hub_private_repo=False)
    assert push_folder(own, folder) is None
    (told,) = [one for one in warnings.messages if one.startswith("not pushed")]
    assert told.startswith("not pushed to user/model: ")
    command = told.split("later by\n\n    ")[1].strip()
    assert command == push_command(own, folder, "user/model")
    assert shlex.split(command)[:5] == [
        *("accelerate", "launch", "recipes/publish.py", "--model_dir"),
        str(folder),
    ]
    written = capfd.readouterr()
    assert TOKEN not in warnings.text + written.out + written.err
    assert content_of(folder) == before
    hub.faults.clear()
    assert push_folder(own, folder).revision == "round-001"
    assert "pushed round 1: user/model at round-001" in capfd.readouterr().out


def test_the_command_repeats_what_was_asked_for(tmp_path):
    hub = HubArguments(True, "user/model", TOKEN, False, "challenger")
    assert push_command(hub, "runs/x", "user/model") == (
        "accelerate launch recipes/publish.py --model_dir runs/x --hub_model_id user/model"
        " --hub_revision challenger --hub_private_repo false"
    )
    assert push_command(ON, "runs/x", "user/model", create_pr=True).endswith(" --create_pr")


def test_every_round_of_a_run_is_pushed_once(hub, run):
    done = push(run)
    assert done.revision == "round-003"
    tags = hub.repositories["user/model"].tags
    assert list(tags) == ["round-001", "round-002", "round-003"]
    assert [title[:7] for title in log_of(hub)] == ["Round 3", "Round 2", "Round 1", "initial"]
    files = [hub.files("user/model", tag) for tag in tags]
    for index, held in enumerate(files):
        own = run[0] / run[1].records[index].folder
        assert held["model.safetensors"] == (own / "model.safetensors").read_bytes()
        base = ModelCard(held["README.md"].decode()).data.base_model
        assert base == (None if index == 0 else "user/model")
    assert content_of(run[0] / "model").items() <= files[2].items()
    assert len(hf_dash.hub.rebuild_chain("user/model")) == 3
    requests = len(hub.requests)
    assert push(run) == done
    assert not any(" /api/models/user/model/commit/" in r for r in hub.requests[requests:])


def test_rounds_that_were_not_pushed_are_caught_up_with(hub, run, quick, warnings):
    hub.fail("POST .*/tag/", 500)
    assert push(run) is None
    (told,) = [one for one in warnings.messages if one.startswith("not pushed")]
    assert "the same command as before pushes them later" in told
    hub.faults.clear()
    assert push(run).revision == "round-003"
    assert len(log_of(hub)) == 4


def test_pruned_rounds_are_left_out_and_another_runs_rounds_refused(hub, run, warnings, tmp_path):
    (run[0] / run[1].records[0].folder / "model.safetensors").unlink()
    assert push(run).revision == "round-003"
    assert list(hub.repositories["user/model"].tags) == ["round-002", "round-003"]
    other = dataclasses.replace(run[1].records[1], weights_sha256="0" * 64)
    records = [run[1].records[0], other, run[1].records[2]]
    assert push((run[0], dataclasses.replace(run[1], records=records))) is None
    assert "holds round-002 already, with other weights" in warnings.text


def test_rounds_dropped_before_they_were_pushed_are_named(hub, run, warnings):
    drop_rounds(*run, 2)
    assert push(run).revision == "round-003"
    assert list(hub.repositories["user/model"].tags) == ["round-002", "round-003"]
    assert "user/model gets no round 1: save_total_limit 2 dropped the weights" in warnings.text


def test_rounds_are_dropped_once_they_are_pushed(hub, run, quick):
    data = hf_dash.report.CardData("digits", "test", 360)
    chain = hf_dash.report.Chain(run[1], "dash", 0, data)
    hub.fail("POST .*/tag/", 500)
    assert push_rounds(ON, run[0], chain, save_total_limit=1) is None
    assert run[1].dropped == {}
    hub.faults.clear()
    assert push_rounds(ON, run[0], chain, save_total_limit=1).revision == "round-003"
    assert list(run[1].dropped) == [record.folder for record in run[1].records[:2]]
    # What is on the Hub is not missed there.
    assert push_rounds(ON, run[0], chain).revision == "round-003"
    assert list(hub.repositories["user/model"].tags) == ["round-001", "round-002", "round-003"]


def test_a_challenger_is_promoted_and_rolled_back(hub, run, quick, warnings):
    output_dir, history = run
    first = dataclasses.replace(history, records=history.records[:2])
    push((output_dir, first))
    waiting = dataclasses.replace(ON, hub_revision="challenger")
    assert push(run, waiting).revision == "challenger"
    assert len(log_of(hub)) == 3
    assert "user/model" in hub.files("user/model", "challenger")["README.md"].decode()

    third = history.records[2].folder
    hub.fail("POST .*/commit/", 403)
    assert push_promotion(waiting, output_dir, third, "forced") is None
    assert "user/model stays at main as it is: the token does not allow this" in warnings.text
    code = "import hf_dash; hf_dash.hub.promote_on_hub('user/model', 'challenger')"
    assert shlex.join(["python", "-c", code]) in warnings.text
    hub.faults.clear()
    assert push_promotion(waiting, output_dir, third, "forced").revision == "main"
    assert hub.repositories["user/model"].commit("main").description == "forced"
    assert hub.files("user/model") == hub.files("user/model", "round-003")
    push_promotion(ON, output_dir, history.records[1].folder, "rolled back")
    assert hub.files("user/model") == hub.files("user/model", "round-002")
