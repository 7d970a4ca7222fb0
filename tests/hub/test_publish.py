import dataclasses
import hashlib
import urllib.error
import urllib.request

import pytest
from helpers import log_of, make_round, same_state
from hub_double import TOKENS, HubDouble
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

import hf_dash
from hf_dash import push_round
from hf_dash.history import write_history
from hf_dash.hub import HubError, promote_on_hub

USER_TOKEN, OTHER_TOKEN = TOKENS


FILES = ["README.md", "config.json", "history.json", "model.safetensors", "rounds.png"]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """Folders of rounds 1 and 2, for reading only."""
    root, records = tmp_path_factory.mktemp("rounds"), []
    for index in (1, 2):
        parent = f"rounds/{index - 1:03d}/dash_seed0" if index > 1 else None
        records = make_round(root / str(index), index, parent=parent, before=records)
    return {index: root / str(index) for index in (1, 2)}


def content_of_files(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def send(double, method, path, body):
    """The status of one request that no client of the Hub's would make."""
    headers = {} if method == "PUT" else {"Authorization": f"Bearer {USER_TOKEN}"}
    address = f"{double.endpoint}/{path}"
    request = urllib.request.Request(address, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_the_double_does_not_say_yes_to_all():
    with HubDouble() as double:
        assert send(double, "POST", "api/repos/create", b'{"name": "model"}') == 200
        oid = hashlib.sha256(b"weights").hexdigest()
        assert send(double, "PUT", f"lfs/{oid}?size=7", b"weighty") == 400
        assert send(double, "PUT", f"lfs/{oid}?size=8", b"weights") == 400
        commit, header = "api/models/user/model/commit/", b'{"key": "header", "value": %s}\n'
        titled = header % b'{"summary": "x", "description": ""}'
        value = b'{"path": "model.safetensors", "oid": "%s"}' % oid.encode()
        lines = titled + b'{"key": "lfsFile", "value": %s}' % value
        assert send(double, "POST", commit + "main", lines) == 400
        assert send(double, "PUT", f"lfs/{oid}?size=7", b"weights") == 200
        assert send(double, "POST", commit + "other", lines) == 404
        stale = header % b'{"summary": "x", "description": "", "parentCommit": "%s"}'
        stale = stale % (b"0" * 40) + lines.partition(b"\n")[2]
        assert send(double, "POST", commit + "main", stale) == 412
        assert len(list(double.repositories["user/model"].log())) == 1
        assert send(double, "POST", commit + "main", lines) == 200
        assert double.files("user/model")["model.safetensors"] == b"weights"
    assert [text.partition(" ")[0] for text in double.problems] == [
        "the",
        "the",
        "model.safetensors",
    ]


def test_every_round_is_one_commit_and_one_tag(hub, rounds):
    (rounds[1] / "checkpoint-1").mkdir()
    (rounds[1] / "checkpoint-1" / "rounds.png").write_bytes(b"no")
    (rounds[1] / "training_args.bin").write_bytes(b"no")
    pushed = [push_round(rounds[index], "user/model") for index in (1, 2)]
    repository = hub.repositories["user/model"]
    assert repository.private
    assert log_of(hub) == [
        "Round 2: accuracy 0.5200, dash start from dash_seed0",
        "Round 1: accuracy 0.5100, dash start",
        "initial commit",
    ]
    assert repository.tags == {f"round-00{i}": one.commit for i, one in enumerate(pushed, 1)}
    assert pushed[1].commit == repository.branches["main"]
    for index in (1, 2):
        own = {name: (rounds[index] / name).read_bytes() for name in FILES}
        assert hub.files("user/model", f"round-00{index}") == {**own, ".gitattributes": b""}
    assert str(pushed[1]).startswith("round 2: user/model at round-002 (")


def test_what_a_round_no_more_has_is_removed_and_other_files_stay(hub, rounds):
    push_round(rounds[1], "user/model")
    head = hub.repositories["user/model"]
    HfApi().upload_file(
        path_or_fileobj=b"{}", path_in_repo="dash_report.json", repo_id="user/model"
    )
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="LICENSE", repo_id="user/model")
    push_round(rounds[2], "user/model")
    assert sorted(hub.files("user/model")) == sorted([*FILES, ".gitattributes", "LICENSE"])
    assert len(list(head.log())) == 5


def test_pushing_again_changes_nothing(hub, rounds):
    first = push_round(rounds[1], "user/model")
    written = len([r for r in hub.requests if "/commit/" in r or r.startswith("PUT")])
    assert push_round(rounds[1], "user/model") == first
    push_round(rounds[2], "user/model")
    # An earlier round is found where it is, though main has moved on.
    assert push_round(rounds[1], "user/model") == first
    assert len(log_of(hub)) == 3
    assert written == 3  # weights, figure, commit


def test_a_repository_of_the_tokens_user_may_be_named_alone(hub, rounds):
    assert push_round(rounds[1], "model", private=False).repo_id == "user/model"
    assert not hub.repositories["user/model"].private


def test_a_round_does_not_take_anothers_place(hub, rounds, tmp_path):
    push_round(rounds[2], "user/model")
    with pytest.raises(HubError, match="holds round-002 already, round-001 would take its place"):
        push_round(rounds[1], "user/model")
    make_round(tmp_path / "other", 2, seed=5)
    with pytest.raises(HubError, match="holds round-002 already, with other files"):
        push_round(tmp_path / "other", "user/model")
    assert len(log_of(hub)) == 2


def test_nothing_is_made_of_a_folder_that_is_not_whole(hub, rounds, tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(ValueError, match=r"is not a finished round: it has no README\.md"):
        push_round(folder, "user/model")
    folder.mkdir()
    for name, content in content_of_files(rounds[1]).items():
        (folder / name).write_bytes(content)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="is not whole"):
        push_round(folder, "user/model")
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match="its checksum differs"):
        push_round(folder, "user/model")
    (folder / "model.safetensors").write_bytes(weights)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"0"', '"10"'))
    with pytest.raises(ValueError, match=r"config\.json is not what .* its checksum differs"):
        push_round(folder, "user/model")
    (folder / "config.json").write_text(config)
    (folder / "dash_report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"dash_report\.json is not what history\.json describes"):
        push_round(folder, "user/model")
    assert hub.requests == []


def copy_of(folder, target):
    target.mkdir()
    for name, content in content_of_files(folder).items():
        (target / name).write_bytes(content)
    return target


def test_only_the_files_of_a_round_are_pushed(hub, rounds, tmp_path):
    folder = copy_of(rounds[1], tmp_path / "folder")
    for name in (
        "secret.png",
        "my_config.json",
        ".env",
        "optimizer.safetensors",
        "history.json.bak",
    ):
        (folder / name).write_text("mine")
    push_round(folder, "user/model")
    assert sorted(hub.files("user/model")) == sorted([*FILES, ".gitattributes"])
    # Nor are others' files of the repository taken for ours.
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="mine.png", repo_id="user/model")
    push_round(rounds[2], "user/model")
    assert "mine.png" in hub.files("user/model")


@pytest.mark.parametrize("name", ["rounds.png", "README.md", "model.safetensors"])
def test_symbolic_links_are_not_followed(hub, rounds, tmp_path, name):
    folder = copy_of(rounds[1], tmp_path / "folder")
    secret = tmp_path / "secret.txt"
    secret.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{name} is a symbolic link"):
        push_round(folder, "user/model")
    assert hub.requests == []


def test_places_on_this_machine_are_not_pushed(hub, rounds, tmp_path):
    folder = copy_of(rounds[1], tmp_path / "folder")
    history = hf_dash.read_history(folder / "history.json")
    (first,) = history.records
    for settings, one in (
        ({"train_dir": "/home/me/images"}, first),
        ({"names": ["a", "~/images"]}, first),
        ({}, dataclasses.replace(first, parent="C:\\runs\\a")),
    ):
        write_history(folder / "history.json", settings, [one])
        with pytest.raises(ValueError, match=r"history\.json names 1 places on this machine"):
            push_round(folder, "user/model")
    assert hub.requests == []


def test_a_folder_that_is_being_written_is_not_pushed(hub, rounds, tmp_path):
    folder = copy_of(rounds[1], tmp_path / "folder")
    pending = folder / ".pending"
    pending.mkdir()
    (folder / "README.md").rename(pending / "README.md")  # killed before this one moved
    push_round(folder, "user/model")
    assert not pending.exists()
    assert hub.files("user/model")["README.md"] == (folder / "README.md").read_bytes()


FAULTS = {
    "dropped": ("PUT /lfs/", "drop", r"no connection \(\w+: "),
    "hanging": ("POST .*/commit/", "hang", "no connection"),
    "503": ("PUT /lfs/", 503, "the Hub failed"),
    "500": ("POST .*/preupload/", 500, "the Hub failed"),
    "401": ("POST /api/repos/create", 401, "the token was not accepted: log in by `hf auth login`"),
    "403": ("POST .*/commit/", 403, "the token does not allow this: it needs write access"),
    "409": ("POST .*/commit/", 409, "it conflicts with what is there"),
    "yaml": ("POST /api/validate-yaml", 400, "Invalid metadata in README.md"),
}


@pytest.mark.parametrize(("pattern", "action", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_told_once_and_healed_by_the_same_call(
    hub, rounds, quick, pattern, action, message
):
    before = content_of_files(rounds[1])
    hub.fail(pattern, action)
    with pytest.raises(HubError, match=message) as caught:
        push_round(rounds[1], "user/model", token=USER_TOKEN)
    assert caught.value.__cause__ is None
    assert USER_TOKEN not in repr(caught.value)
    assert content_of_files(rounds[1]) == before
    hub.faults.clear()
    push_round(rounds[1], "user/model")
    assert len(log_of(hub)) == 2
    assert hub.files("user/model", "round-001")["config.json"] == before["config.json"]


TWICE = ["PUT /lfs/", "POST .*/commit/", "POST .*/tag/", "POST /api/repos/create", "GET .*/refs"]


@pytest.mark.parametrize("pattern", TWICE)
def test_a_server_that_fails_twice_is_asked_again(hub, rounds, quick, pattern):
    hub.fail(pattern, 503, times=2)
    push_round(rounds[1], "user/model")
    assert len(log_of(hub)) == 2
    assert list(hub.repositories["user/model"].tags) == ["round-001"]


def test_a_connection_dropped_once_is_taken_up_again(hub, rounds, quick):
    hub.fail("PUT /lfs/", "drop", times=1)
    push_round(rounds[1], "user/model")
    assert hub.files("user/model", "round-001")["model.safetensors"]


def test_a_lost_answer_does_not_commit_twice(hub, rounds, quick):
    hub.fail("POST .*/commit/", "lose", times=1)
    push_round(rounds[1], "user/model")
    assert len(log_of(hub)) == 2
    assert list(hub.repositories["user/model"].tags) == ["round-001"]


def test_a_lost_answer_does_not_open_a_second_pull_request(hub, rounds, quick):
    push_round(rounds[1], "user/model")
    hub.fail("POST .*/commit/", "lose", times=1)
    opened = push_round(rounds[2], "user/model", create_pr=True)
    repository = hub.repositories["user/model"]
    assert list(repository.pull_requests) == [opened.revision] == ["refs/pr/1"]
    assert opened.commit == repository.pull_requests["refs/pr/1"]
    # The same call finds it; one that was closed is none.
    assert push_round(rounds[2], "user/model", create_pr=True) == opened
    repository.closed.add(1)
    assert push_round(rounds[2], "user/model", create_pr=True).revision == "refs/pr/2"


def test_a_push_that_ended_before_its_tag_is_finished(hub, rounds, quick):
    hub.fail("POST .*/tag/", 500)
    with pytest.raises(HubError, match="the Hub failed"):
        push_round(rounds[1], "user/model")
    commit = hub.repositories["user/model"].branches["main"]
    assert (len(log_of(hub)), hub.repositories["user/model"].tags) == (2, {})
    hub.faults.clear()
    assert push_round(rounds[1], "user/model").commit == commit
    assert hub.repositories["user/model"].tags == {"round-001": commit}
    assert len(log_of(hub)) == 2


def test_a_branch_that_moved_meanwhile_is_read_again(hub, rounds, quick, monkeypatch):
    push_round(rounds[1], "user/model")
    real, moved = HfApi.create_commit, []

    def slow(self, *args, **kwargs):
        if not moved:
            moved.append(1)
            HfApi().create_branch("user/model", branch="old")
            commit = real(self, "user/model", [operation], commit_message="Between")
            assert commit.oid != kwargs["parent_commit"]
        return real(self, *args, **kwargs)

    operation = CommitOperationAdd("LICENSE", b"mine")
    monkeypatch.setattr(HfApi, "create_commit", slow)
    push_round(rounds[2], "user/model")
    assert [title.partition(":")[0] for title in log_of(hub)][:2] == ["Round 2", "Between"]
    assert hub.files("user/model")["LICENSE"] == b"mine"


def test_another_users_token_may_not_write(hub, rounds, quick):
    with pytest.raises(HubError, match="the token does not allow this"):
        push_round(rounds[1], "user/model", token=OTHER_TOKEN)
    push_round(rounds[1], "user/model")
    with pytest.raises(HubError, match="there is no such repository or revision, or the token may"):
        hf_dash.hub.rebuild_chain("user/model", token=OTHER_TOKEN)


def test_a_challenger_waits_on_its_branch_until_it_is_promoted(hub, rounds):
    push_round(rounds[1], "user/model")
    first = hub.repositories["user/model"].branches["main"]
    waiting = push_round(rounds[2], "user/model", hub_revision="challenger")
    repository = hub.repositories["user/model"]
    assert repository.branches == {"main": first, "challenger": waiting.commit}
    assert repository.tags == {"round-001": first}
    assert waiting.revision == "challenger"

    with pytest.raises(HubError, match="holds other weights at challenger than were compared"):
        promote_on_hub("user/model", "challenger", weights_sha256="0" * 64)
    assert repository.branches["main"] == first

    uploads = len([r for r in hub.requests if r.startswith("PUT")])
    weights = hashlib.sha256((rounds[2] / "model.safetensors").read_bytes()).hexdigest()
    done = promote_on_hub(
        "user/model", "challenger", reason="not worse overall", weights_sha256=weights
    )
    assert len([r for r in hub.requests if r.startswith("PUT")]) == uploads
    assert repository.branches["main"] == done.commit != waiting.commit
    assert repository.tags == {"round-001": first, "round-002": done.commit}
    assert hub.files("user/model") == hub.files("user/model", "challenger")
    commit = repository.commit("main")
    assert (commit.parent, commit.description) == (first, "not worse overall")
    assert commit.title == "Promote round 2: accuracy 0.5200, dash start from dash_seed0"
    # Again: everything is there.
    assert promote_on_hub("user/model", "challenger") == done
    assert len(log_of(hub)) == 3


def test_a_promoted_rival_of_the_same_round_takes_its_tag(hub, rounds, tmp_path):
    push_round(rounds[1], "user/model")
    push_round(rounds[2], "user/model")
    make_round(tmp_path, 2, start="warm", seed=7)
    push_round(tmp_path, "user/model", hub_revision="warm")
    done = promote_on_hub("user/model", "warm")
    assert hub.repositories["user/model"].tags["round-002"] == done.commit
    assert log_of(hub)[0].startswith("Promote round 2: accuracy 0.5200, warm start")


def test_main_goes_back_by_a_tag_which_stays(hub, rounds):
    pushed = [push_round(rounds[index], "user/model") for index in (1, 2)]
    promote_on_hub("user/model", "round-001", reason="rolled back")
    repository = hub.repositories["user/model"]
    assert hub.files("user/model") == hub.files("user/model", "round-001")
    assert list(repository.tags.values()) == [one.commit for one in pushed]
    assert len(log_of(hub)) == 4


def test_a_pull_request_is_promoted_and_closed(hub, rounds):
    push_round(rounds[1], "user/model")
    opened = push_round(rounds[2], "user/model", create_pr=True)
    repository = hub.repositories["user/model"]
    assert opened.revision == "refs/pr/1"
    assert list(repository.tags) == ["round-001"]
    assert hub.files("user/model") == hub.files("user/model", "round-001")
    promote_on_hub("user/model", "refs/pr/1")
    assert hub.files("user/model") == hub.files("user/model", "refs/pr/1")
    assert (repository.closed, sorted(repository.tags)) == ({1}, ["round-001", "round-002"])
    with pytest.raises(ValueError, match="create_pr goes to 'main', but hub_revision is 'x'"):
        push_round(rounds[2], "user/model", create_pr=True, hub_revision="x")


def test_the_card_on_the_hub_reads_back(hub, rounds):
    push_round(rounds[2], "user/model")
    # The client had its metadata checked before it committed anything.
    assert "POST /api/validate-yaml" in hub.requests
    card = ModelCard.load("user/model")
    (result,) = card.data.eval_results
    assert (result.metric_value, result.verified) == (0.52, False)


def test_weights_come_back_bit_by_bit(hub, rounds):
    for index in (1, 2):
        push_round(rounds[index], "user/model")
        own = hf_dash.load_model(str(rounds[index])).state_dict()
        there = hf_dash.load_model("user/model", revision=f"round-00{index}").state_dict()
        assert same_state(own, there)
