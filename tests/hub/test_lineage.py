import dataclasses
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import make_round, record, tiny_processor, tiny_vit
from huggingface_hub import HfApi, constants
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

import hf_dash
from hf_dash import push_round
from hf_dash.hub import HubError, find_parent, rebuild_chain


@pytest.fixture
def chain(hub, tmp_path):
    """Rounds 1 and 2 in one repository, round 3 from there in another, 4 after it in a folder."""
    pushed, records, parent = [], [], None
    for index, repo in enumerate(["user/one", "user/one", "user/two", "user/two"], 1):
        if index == 3:
            parent = find_parent("user/one", revision="round-002").name
        elif index > 1:
            parent = "rounds/000/anything"
        records = make_round(tmp_path / str(index), index, parent=parent, before=records)
        pushed.append(push_round(tmp_path / str(index), repo))
    return pushed


def forget_downloads():
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


def test_the_parent_is_the_exact_commit_with_its_history(hub, tmp_path):
    first = make_round(tmp_path / "1", 1)
    pushed = push_round(tmp_path / "1", "user/model")
    for revision in ("main", "round-001", pushed.commit, None):
        parent = find_parent("user/model", revision=revision)
        assert parent.name == f"user/model@{pushed.commit}"
        assert (parent.repo_id, parent.commit) == ("user/model", pushed.commit)
        assert parent.records == first
    local = find_parent(str(tmp_path / "1"))
    assert (local.name, local.folder, local.records) == ("1", tmp_path / "1", first)
    assert local.weights_sha256 == parent.weights_sha256 == first[0].weights_sha256
    assert (local.repo_id, local.commit) == (None, None)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("where", ["local", "hub"])
def test_a_parent_is_verified(hub, tmp_path, name, where):
    make_round(tmp_path, 1)
    push_round(tmp_path, "user/model")
    content = (tmp_path / name).read_bytes()
    changed = content.replace(b'"0"', b'"x"') if name == "config.json" else content[:-1] + b"!"
    assert changed != content
    (tmp_path / name).write_bytes(changed)
    files = hub.repositories["user/model"].commit("main").files
    files[name] = dataclasses.replace(files[name], content=changed)
    forget_downloads()
    with pytest.raises(ValueError, match=rf"{name} is not what .* its checksum differs"):
        find_parent(str(tmp_path) if where == "local" else "user/model")


def test_a_history_that_cannot_be_read_is_not_passed_over(tmp_path):
    """The rounds behind the model would be lost."""
    make_round(tmp_path, 1)
    (tmp_path / "history.json").unlink()
    (tmp_path / "history.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"history\.json"):
        find_parent(str(tmp_path))


def test_what_is_no_folder_must_be_an_id(hub):
    with pytest.raises(ValueError, match="model_name_or_path must be 'user/name' or 'name' of"):
        find_parent("runs/no/folder")
    assert hub.requests == []
    with pytest.raises(HubError, match="there is no such repository or revision"):
        find_parent("user/nothing")


def test_a_revision_that_is_not_there_is_named(hub, tmp_path):
    make_round(tmp_path, 1)
    push_round(tmp_path, "user/model")
    with pytest.raises(HubError, match=r"no such repository or revision.*round-007"):
        find_parent("user/model", revision="round-007")


def logits(model, pixels):
    with torch.no_grad():
        output = model.eval()(pixels)
    return output if isinstance(output, torch.Tensor) else output.logits


def test_every_library_computes_the_same_from_the_hub_as_from_the_folder(hub, tmp_path):
    make_round(tmp_path / "1", 1)
    push_round(tmp_path / "1", "user/all")
    # Round 2 starts from round 1 as the Hub has it, and is pushed in its turn.
    parent = find_parent("user/all", revision="round-001")
    started = hf_dash.load_model("user/all", revision=parent.commit)
    with torch.no_grad():
        started.timm_model.get_classifier().weight.mul_(0.5)
    second = dataclasses.replace(
        parent.records[0],
        round_index=2,
        parent=parent.name,
        weights_sha256=None,
        file_sha256=None,
    )
    info = hf_dash.report.CardInfo(
        model_name="round 2",
        records=[*parent.records, second],
        settings={},
        dataset_name="digits",
        held_out_split="test",
        num_held_out=360,
        base_model=parent.repo_id,
        base_model_revision=parent.commit,
    )
    hf_dash.report.write_model_folder(started, tmp_path / "2", info)
    push_round(tmp_path / "2", "user/all")

    image = Image.effect_noise((32, 32), 80).convert("RGB")
    for index in (1, 2):
        local = hf_dash.load_model(str(tmp_path / str(index)))
        pixels = hf_dash.models.image_transform(local)(image)[None]
        expected, tag = logits(local, pixels), f"round-00{index}"
        assert torch.equal(logits(started, pixels), expected) == (index == 2)
        name = "hf-hub:user/all" + (f"@{tag}" if index == 1 else "")
        assert torch.equal(logits(timm.create_model(name, pretrained=True), pixels), expected)
        auto = AutoModelForImageClassification.from_pretrained("user/all", revision=tag)
        assert torch.equal(logits(auto, pixels), expected)
        revision = tag if index == 1 else "main"
        classify = pipeline("image-classification", model="user/all", revision=revision)
        scores = classify(image, top_k=10, function_to_apply="none")
        by_label = {one["label"]: one["score"] for one in scores}
        assert by_label == {str(label): one for label, one in enumerate(expected[0].tolist())}


def test_a_native_model_brings_its_image_processor(hub, tmp_path):
    info = hf_dash.report.CardInfo(
        "a vit", [record(weights_sha256=None)], {}, "digits", "test", 360
    )
    hf_dash.report.write_model_folder(tiny_vit(), tmp_path, info, image_processor=tiny_processor())
    push_round(tmp_path, "user/vit")
    assert "preprocessor_config.json" in hub.files("user/vit")
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    both = [
        pipeline("image-classification", model=name)(image, function_to_apply="none")
        for name in (str(tmp_path), "user/vit")
    ]
    assert both[0] == both[1]


def test_the_chain_is_rebuilt_from_the_hub_alone(hub, chain, tmp_path):
    records = hf_dash.read_history(tmp_path / "4" / "history.json").records
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    forget_downloads()
    rebuilt = rebuild_chain("user/two")
    assert [one.record for one in rebuilt] == records
    assert [one.commit for one in rebuilt] == [one.commit for one in chain]
    assert [one.repo_id for one in rebuilt] == ["user/one"] * 2 + ["user/two"] * 2
    assert rebuilt[1].revision == chain[1].commit  # as round 3 names its parent
    written = tmp_path / "history.json"
    hf_dash.history.write_history(written, {}, [one.record for one in rebuilt])
    assert hf_dash.read_history(written).records == records
    assert rebuild_chain("user/one", revision="round-001") == [
        dataclasses.replace(chain[0], revision="round-001")
    ]
    # No weights were fetched for that.
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_a_chain_that_contradicts_itself_is_refused(hub, chain):
    other = hub.repositories["user/one"]
    tagged = other.tags["round-001"]
    other.tags["round-001"] = other.tags["round-002"]
    with pytest.raises(ValueError, match="tells of other rounds at round-001 than round 2: user/o"):
        rebuild_chain("user/two")
    other.tags["round-001"] = tagged
    files = other.commits[tagged].files
    files["model.safetensors"] = other.commit("main").files["model.safetensors"]
    with pytest.raises(ValueError, match="user/one holds other weights at round-001 than its hist"):
        rebuild_chain("user/two")
    del other.tags["round-001"]
    with pytest.raises(HubError, match="there is no such repository or revision"):
        rebuild_chain("user/two")
    del other.commit("main").files["history.json"]
    with pytest.raises(ValueError, match=r"user/one has no history.json at .*: no round was publ"):
        rebuild_chain("user/two")


def test_a_chain_that_bites_its_tail_is_refused(hub, tmp_path):
    make_round(tmp_path, 2, parent="rounds/001/dash_seed0")
    commit = push_round(tmp_path, "user/model").commit
    hub.repositories["user/model"].tags["round-001"] = commit
    with pytest.raises(ValueError, match="tells of other rounds at round-001"):
        rebuild_chain("user/model")


def test_a_chain_ends_at_a_model_that_was_trained_elsewhere(hub, tmp_path):
    make_round(tmp_path / "base", 1)
    push_round(tmp_path / "base", "user/base")
    del hub.repositories["user/base"].commit("main").files["history.json"]
    parent = find_parent("user/base")
    assert parent.records == []
    make_round(tmp_path / "1", 1, parent=parent.name)
    push_round(tmp_path / "1", "user/model")
    assert [one.repo_id for one in rebuild_chain("user/model")] == ["user/model"]


def upload(repo, **files):
    HfApi().create_repo(repo)
    for name, content in files.items():
        path = name.replace("__", ".")
        HfApi().upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo)


def test_weights_that_can_run_code_are_refused(hub, tmp_path):
    make_round(tmp_path, 1)
    config = (tmp_path / "config.json").read_bytes()
    upload("user/pickled", config__json=config, pytorch_model__bin=b"cos\nsystem\n")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for name in ("user/pickled", str(tmp_path)):
        for load in (find_parent, hf_dash.load_model, hf_dash.load_model):
            with pytest.raises(ValueError, match=r"holds no model\.safetensors: only safetensors"):
                load(name)
    assert not any("pytorch_model" in r and r.startswith(("GET", "HEAD")) for r in hub.requests)


def test_no_code_of_a_repository_is_run(hub, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    config = b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'
    make_round(tmp_path / "1", 1)
    weights = (tmp_path / "1" / "model.safetensors").read_bytes()
    upload("user/code", config__json=config, own__py=code, model__safetensors=weights)
    for load in (hf_dash.load_model, hf_dash.load_model):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load("user/code")
    assert not (tmp_path / "ran").exists()
