"""Rounds pushed by the recipes to a double of the Hub."""

import json
import os
import shlex
from pathlib import Path

import pytest
from helpers import QUICK, hub_address, launch
from hub_double import TOKENS, HubDouble
from huggingface_hub import ModelCard

import hf_dash

TOKEN = next(iter(TOKENS))


FAST = ["--save_strategy", "steps", "--save_steps", "5", "--max_eval_samples", "60"]


FAST += ["--num_train_epochs", "1", "--disable_tqdm", "true", "--report_to", "none"]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """Two rounds pushed by the comparison, the third from the Hub by the Trainer, none by hand."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubDouble(hub_address()) as hub:
        online = {"HF_HUB_OFFLINE": "0"}
        alone = {**online, "launcher": False}
        rounds = ["--num_rounds", "2", "--examples_per_round", "60", "--starts", "dash", *QUICK]
        rounds += ["--dataset_name", "digits"]
        push = ["--push_to_hub", "--hub_model_id", "user/digits"]
        done = [
            launch("continual_rounds.py", folder, *rounds, *push, **alone, HF_TOKEN=TOKEN),
            launch(
                "retrain_with_trainer.py",
                folder,
                *("--model_name_or_path", "user/digits", "--revision", "round-002"),
                *("--token", TOKEN, "--hub_token", TOKEN, "--output_dir", "child", *push, *FAST),
                *("--dataset_name", "digits", "--max_train_samples", "60"),
                **alone,
            ),
        ]
        yield folder, hub, done, {**online, "HF_TOKEN": TOKEN}
    assert hub.problems == []


def test_rounds_go_to_the_hub_and_go_on_from_there(pushed):
    folder, hub, done, _ = pushed
    repository = hub.repositories["user/digits"]
    assert repository.private
    assert list(repository.tags) == ["round-001", "round-002", "round-003"]
    assert [c.title.partition(":")[0] for c in repository.log()] == [
        *("Round 3", "Round 2", "Round 1", "initial commit")
    ]
    assert repository.branches["main"] == repository.tags["round-003"]
    second = repository.tags["round-002"]
    (folder / "history.json").write_bytes(hub.files("user/digits")["history.json"])
    records = hf_dash.read_history(folder / "history.json").records
    assert [(r.round_index, r.parent) for r in records] == [
        (1, None),
        (2, "rounds/001/dash_seed0"),
        (3, f"user/digits@{second}"),
    ]
    card = ModelCard(hub.files("user/digits")["README.md"].decode())
    assert card.data.base_model == "user/digits"
    for one in done:
        assert "pushed round" in one.stdout


def test_both_ways_to_the_hub_lay_out_a_round_alike(pushed):
    folder, hub, _, _ = pushed
    by_accelerate, by_trainer = (hub.files("user/digits", f"round-00{i}") for i in (2, 3))
    assert by_trainer.keys() == by_accelerate.keys()
    assert by_trainer.keys() >= {"README.md", "config.json", "dash_report.json", "history.json"}
    assert (folder / "child" / "checkpoint-5" / "training_args.bin").exists()
    layouts = [json.loads(files["config.json"]).keys() for files in (by_accelerate, by_trainer)]
    assert layouts[0] == layouts[1]


def test_the_token_is_written_nowhere(pushed):
    folder, hub, done, _ = pushed
    places = (folder, Path(os.environ["HF_HOME"]))
    written = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    texts = [path.read_bytes() for path in written] + list(hub.objects.values())
    texts += [
        text for tag in (1, 2, 3) for text in hub.files("user/digits", f"round-00{tag}").values()
    ]
    texts += [(one.stdout + one.stderr).encode() for one in done]
    assert not [text for text in texts if TOKEN.encode() in text]


def test_what_was_not_pushed_is_published_later(pushed, fresh):
    folder, hub, _, environment = pushed
    hub.repositories.pop("user/later", None)
    hub.fail("POST .*/user/later/commit/", 403)
    flags = ["--model_dir", "child", "--hub_model_id", "user/later", "--hub_private_repo", "false"]
    failed = launch("publish.py", folder, *flags, check=False, launcher=False, **environment)
    assert failed.returncode == 1
    assert "not pushed to user/later: the token does not allow this" in failed.stderr
    assert TOKEN not in failed.stdout + failed.stderr
    command = failed.stderr.split("push it later by\n\n    ")[1].splitlines()[0]
    hub.faults.clear()
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "recipes/publish.py"]
    launch("publish.py", folder, *words[3:], fresh=fresh, **environment)
    repository = hub.repositories["user/later"]
    assert (repository.private, list(repository.tags)) == (False, ["round-003"])
    own = (folder / "child" / "model.safetensors").read_bytes()
    assert hub.files("user/later")["model.safetensors"] == own


def test_main_follows_a_promotion(pushed):
    folder, hub, _, environment = pushed
    flags = ["--output_dir", "runs/continual_rounds", "--challenger", "rounds/001/dash_seed0"]
    flags += ["--dataset_name", "digits", "--push_to_hub", "--hub_model_id", "user/digits"]
    done = launch("promote.py", folder, *flags, launcher=False, **environment)
    assert "promote: first champion\npushed round 1: user/digits at main" in done.stdout
    assert hub.files("user/digits") == hub.files("user/digits", "round-001")
