import logging
import threading
import time

import pytest
from helpers import make_round
from hub_double import TOKENS
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError

import hf_dash
from hf_dash import push_round
from hf_dash.hub import HubError, promote_on_hub
from hf_dash.hub.client import (
    check_branch,
    check_repo_id,
    clean_token,
    client,
    fetch_model,
    files_at,
    reach,
)

USER_TOKEN, OTHER_TOKEN = TOKENS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished round, for reading only."""
    root = tmp_path_factory.mktemp("round")
    make_round(root, 1)
    return root


class LostError(Exception):
    """Stands for what the client raises where no answer came."""


LostError.__module__ = "httpx"


def failing(*errors, result="done"):
    """Return an action that raises these errors in turn, then returns; and what it was called."""
    left, calls = list(errors), []

    def action():
        calls.append(1)
        if left:
            raise left.pop(0)
        return result

    return action, calls


def answered(status):
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"status {status}")
    error.response = type("Response", (), {"status_code": status})()
    return error


@pytest.mark.parametrize("name", ["user/model", "model", "user/model.v2", "a-b/c_d"])
def test_ids_that_can_be(name):
    check_repo_id("hub_model_id", name)


@pytest.mark.parametrize("branch", [None, "main", "challenger", "refs/pr/12", "a/b-c.d"])
def test_branches_that_can_be(branch):
    check_branch("hub_revision", branch)


@pytest.mark.parametrize("name", ["a/b/c", "user/", "user/na me", "user--x/y", "x.git", "../x", ""])
def test_bad_ids_are_refused_before_the_hub_is_asked(hub, folder, name):
    for call in (
        lambda: push_round(folder, name),
        lambda: promote_on_hub(name, "challenger"),
        lambda: hf_dash.hub.rebuild_chain(name),
        lambda: hf_dash.hub.HubArguments(hub_model_id=name),
    ):
        with pytest.raises(ValueError, match="hub_model_id must be 'user/name' or 'name'"):
            call()
    assert hub.requests == []


@pytest.mark.parametrize("branch", ["round-003", "0" * 40, "refs/tags/x", "a..b", "-x", "a b", ""])
def test_bad_branches_are_refused_before_the_hub_is_asked(hub, folder, branch):
    with pytest.raises(ValueError, match="hub_revision must be the name of a branch"):
        push_round(folder, "user/model", hub_revision=branch)
    with pytest.raises(ValueError, match="hub_revision must be the name of a branch"):
        hf_dash.hub.HubArguments(hub_revision=branch)
    assert hub.requests == []


def test_a_token_is_one_word(monkeypatch):
    assert clean_token(None) is None
    assert clean_token("hf_abc\n") == "hf_abc"
    for token in ("", "hf_a b", "hf_ä", "hf_a\nb"):
        with pytest.raises(ValueError, match="token must be one word") as caught:
            clean_token(token)
        assert not token or token not in str(caught.value)
    assert client("hf_abc ").token == "hf_abc"


@pytest.mark.parametrize("error", [answered(503), answered(429), answered(412), LostError("gone")])
def test_what_may_pass_is_tried_three_times(quick, error):
    action, calls = failing(error, error)
    assert (reach(action), len(calls)) == ("done", 3)
    action, calls = failing(error, error, error)
    with pytest.raises(HubError, match=r"the Hub failed|the branch moved|no connection"):
        reach(action)
    assert len(calls) == 3


@pytest.mark.parametrize("error", [answered(401), answered(404), ValueError("odd")])
def test_what_does_not_pass_is_told_at_once(quick, error):
    action, calls = failing(error)
    with pytest.raises(HubError) as caught:
        reach(action)
    assert len(calls) == 1
    assert caught.value.__cause__ is None


def test_the_cause_behind_an_error_tells_its_kind(quick):
    wrapped = RuntimeError("a thread failed")
    wrapped.__cause__ = answered(403)
    with pytest.raises(HubError, match="the token does not allow this"):
        reach(failing(wrapped)[0])


def test_waits_are_bounded_for_the_call_alone(monkeypatch):
    monkeypatch.setattr("hf_dash.hub.client.TIMEOUT", 7.0)
    before = get_session().timeout
    inside = reach(lambda: get_session().timeout)
    assert str(7.0) in str(inside)
    assert get_session().timeout == before


def test_secrets_are_taken_out_of_a_message(quick, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", USER_TOKEN)
    with pytest.raises(HubError, match="<token> and <token>") as caught:
        reach(failing(OSError(f"{USER_TOKEN} and hf_given"))[0], "hf_given")
    assert USER_TOKEN not in str(caught.value)
    assert "hf_given" not in str(caught.value)


@pytest.mark.parametrize("fault", ["drip", "hang"])
def test_a_server_that_never_ends_is_given_up(hub, folder, quick, monkeypatch, fault):
    push_round(folder, "user/model")
    monkeypatch.setattr("hf_dash.hub.client.TIMEOUT", 30.0)
    hub.fail("GET .*/refs", fault, times=3)
    with monkeypatch.context() as patch:
        patch.setattr("hf_dash.hub.client.DEADLINE", 0.2)
        patch.setattr("hf_dash.hub.client.SLOWEST", 1e7)
        started = time.monotonic()
        with pytest.raises(HubError, match=r"the Hub did not finish within \d+ seconds"):
            push_round(folder, "user/model")
        # The file has 1.5 MB, which add 0.15 seconds.
        assert time.monotonic() - started < 25
    hub.faults.clear()
    assert push_round(folder, "user/model").revision == "round-001"


def test_time_is_given_by_size(monkeypatch):
    monkeypatch.setattr("hf_dash.hub.client.DEADLINE", 0.0)
    monkeypatch.setattr("hf_dash.hub.client.SLOWEST", 1e6)
    with pytest.raises(HubError, match="did not finish within 0 seconds"):
        reach(lambda: threading.Event().wait(60))
    assert reach(lambda: "done", size=60_000_000) == "done"


def test_an_interrupt_of_the_action_comes_through():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reach(interrupted)


def test_a_model_is_fetched_whole_and_nothing_else(hub, folder):
    pushed = push_round(folder, "user/model")
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="own.py", repo_id="user/model")
    for revision in ("round-001", pushed.commit):
        fetched = fetch_model("user/model", revision=revision)
        assert fetched.name == pushed.commit
    names = {"config.json", "history.json", "model.safetensors"}
    assert {path.name for path in fetch_model("user/model").iterdir()} == names
    for name in names:
        assert (fetched / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(ValueError, match="name_or_path must be 'user/name'"):
        fetch_model("no/such/folder")


def test_a_small_file_that_is_not_small_is_not_fetched(hub, folder, monkeypatch):
    push_round(folder, "user/model")
    monkeypatch.setattr("hf_dash.hub.client.LARGEST", 100)
    requests = len(hub.requests)
    with pytest.raises(HubError, match=r"user/model has a (config|history)\.json of [\d,]+ bytes"):
        fetch_model("user/model")
    assert not any("/resolve/" in request for request in hub.requests[requests:])


def test_files_are_those_of_an_exact_commit(hub, folder):
    pushed = push_round(folder, "user/model")
    commit, files = files_at(client(None), "user/model", "main")
    assert commit == pushed.commit
    assert {"README.md", "config.json", "model.safetensors"} <= set(files)
    assert files["model.safetensors"].size == (folder / "model.safetensors").stat().st_size


def test_without_a_server_the_message_says_so(folder, quick, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", USER_TOKEN)
    with pytest.raises(HubError, match=r"no connection \(ConnectError"):
        push_round(folder, "user/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="OfflineModeIsEnabled"):
        push_round(folder, "user/model")


def test_no_message_quotes_a_token(hub, folder, quick, caplog):
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(HubError, match="the token was not accepted") as wrong:
            push_round(folder, "user/model", token="hf_wrong")
        # The client's own error, and its log, would quote this one.
        with pytest.raises(ValueError, match="token must be one word") as broken:
            push_round(folder, "user/model", token="hf_wrong\nX")
        push_round(folder, "user/model", token=f"{USER_TOKEN}\n")
    for text in (repr(wrong.value), repr(broken.value), caplog.text):
        assert "hf_wrong" not in text
        assert USER_TOKEN not in text
