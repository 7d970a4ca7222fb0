"""Only safetensors are loaded: weights of any other kind are refused before they are read."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

NAMES = ("model.safetensors", "model.safetensors.index.json")


def require_safetensors(
    name_or_path: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Check that a model's weights are safetensors; those of a repository are downloaded by it.

    Asked before transformers, which would have another service convert a repository's weights.

    Args:
        name_or_path: a folder, or the id of a repository.
        revision: branch, tag or commit on the Hub.
        cache_dir: where files of the Hub are kept.
        token: for private repositories.

    Raises:
        ValueError: they are not.
    """
    if Path(name_or_path).is_dir():
        if any((Path(name_or_path) / name).is_file() for name in NAMES):
            return
    else:
        for name in NAMES:
            try:
                hf_hub_download(
                    name_or_path, name, revision=revision, cache_dir=cache_dir, token=token
                )
                return
            except RemoteEntryNotFoundError:
                continue
    raise ValueError(
        f"{name_or_path!r} holds no {NAMES[0]}: only safetensors are loaded, because weights of"
        " other kinds, such as pytorch_model.bin, can run code; save the model as safetensors first"
    )
