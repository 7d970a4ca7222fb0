"""The only module that talks to the Hub.

Flow: a whole model folder on disk → repository (made if it must be) → one commit.
"""

from pathlib import Path

from huggingface_hub import HfApi

# Checkpoints and logs of a Trainer may lie in the same folder; they are nobody else's business.
PUBLISHED = ["README.md", "*config.json", "model.safetensors", "history.json", "*.png"]


def push_folder(
    folder: str | Path,
    hub_model_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Upload a model folder in one commit.

    Args:
        folder: as :func:`~hf_dash.models.save_model` and the card left it.
        hub_model_id: ``user/name``; made where it does not exist.
        token: access token; the one stored by ``hf auth login`` by default.
        private: whether a new repository is private; the account's default where None.
        commit_message: first line of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: ``folder`` holds no model.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"folder {str(folder)!r} holds no model.safetensors to upload")
    api = HfApi(token=token)
    repository = api.create_repo(hub_model_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message=commit_message,
        allow_patterns=PUBLISHED,
    )
    return str(commit.commit_url)
