import pytest

import hf_dash
from hf_dash import hub


class RecordingApi:
    """Stands where ``HfApi`` would; what is sent over the wire is tested elsewhere."""

    calls: list = []  # noqa: RUF012

    def __init__(self, token):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        self.calls.append(("upload", repo_id, folder_path.name, commit_message, allow_patterns))
        return type("Commit", (), {"commit_url": "address/of/commit"})


def test_a_folder_is_uploaded_in_one_commit_without_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", RecordingApi)
    (tmp_path / "model.safetensors").write_bytes(b"")
    address = hf_dash.push_folder(
        tmp_path, "name", token="secret", private=True, commit_message="Round 2"
    )
    assert address == "address/of/commit"
    assert RecordingApi.calls == [
        ("token", "secret"),
        ("create", "name", True, True),
        ("upload", "me/name", tmp_path.name, "Round 2", hub.PUBLISHED),
    ]
    assert not any(pattern.startswith("checkpoint") for pattern in hub.PUBLISHED)


def test_a_folder_without_a_model_is_refused_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", None)
    with pytest.raises(ValueError, match=r"holds no model\.safetensors to upload"):
        hf_dash.push_folder(tmp_path, "name")
