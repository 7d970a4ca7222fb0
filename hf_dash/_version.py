"""The one place where the version is written, and where those of other libraries are read."""

import importlib.metadata

__version__ = "0.1.0"


def library_versions() -> dict[str, str]:
    """Return the versions of hf_dash and of the libraries it works with."""
    names = ("torch", "transformers", "datasets", "accelerate", "timm")
    return {"hf_dash": __version__, **{name: importlib.metadata.version(name) for name in names}}
