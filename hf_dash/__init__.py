"""hf_dash: direction-aware shrinking for vision models that are retrained on arriving data.

The names here are loaded on first use, so ``from hf_dash import dash_shrink_`` costs little more
than torch. ``__init__.pyi`` lists them; everything else lies in its package, such as
``hf_dash.data.StreamLoader``.
"""

import re
import sys
from pathlib import Path
from typing import Any

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except AttributeError:
        place = None if name.startswith("_") else _place_of(name)
        if place is None:
            raise
        # ``from hf_dash import …`` replaces the text of an AttributeError by one of its own.
        in_import = sys._getframe(1).f_code.co_name == "_handle_fromlist"
        error = ImportError if in_import else AttributeError
        raise error(f"hf_dash has no name {name!r} at its top level; use {place}") from None


def _place_of(name: str) -> str | None:
    """Return where a public name below the top level is found, without importing anything."""
    root = Path(__file__).parent
    for stub in sorted(root.glob("*/__init__.pyi")):
        if re.search(rf" as {re.escape(name)}$", stub.read_text(encoding="utf-8"), re.M):
            return f"{__name__}.{stub.parent.name}.{name}"
    definition = re.compile(rf"^((def|class) {re.escape(name)}\b|{re.escape(name)}(:| =))", re.M)
    for module in sorted(root.rglob("*.py")):
        if definition.search(module.read_text(encoding="utf-8")):
            return ".".join([__name__, *module.relative_to(root).with_suffix("").parts, name])
    return None
