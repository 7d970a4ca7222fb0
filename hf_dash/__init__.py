"""hf_dash: direction-aware shrinking for vision models that are retrained on arriving data.

The names here are loaded on first use, so ``from hf_dash import dash_shrink_`` costs little more
than torch. ``__init__.pyi`` lists them; everything else lies in its package, such as
``hf_dash.data.stream_loader.StreamLoader``.
"""

import re
from pathlib import Path
from typing import Any

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except AttributeError:
        place = None if name.startswith("__") else _place_of(name)
        if place is None:
            raise
        # An AttributeError would lose this text in ``from hf_dash import …``.
        raise ImportError(f"hf_dash has no {name!r} at its top level; it is {place}") from None


def _place_of(name: str) -> str | None:
    """Return where a public name below the top level is found, without importing anything."""
    root = Path(__file__).parent
    for stub in sorted(root.glob("*/__init__.pyi")):
        if re.search(rf" as {re.escape(name)}$", stub.read_text(encoding="utf-8"), re.MULTILINE):
            return f"{__name__}.{stub.parent.name}.{name}"
    for module in ("history", "models", "starts"):
        source = (root / f"{module}.py").read_text(encoding="utf-8")
        if re.search(rf"^((def|class) )?{re.escape(name)}\b", source, re.MULTILINE):
            return f"{__name__}.{module}.{name}"
    return None
