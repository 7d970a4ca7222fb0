"""hf_dash: direction-aware shrinking for vision models that are retrained on arriving data."""

from hf_dash._version import __version__
from hf_dash.config import DashConfig
from hf_dash.dash import dash_shrink_
from hf_dash.shrink import NoEffectWarning, ShrinkReport

__all__ = ["DashConfig", "NoEffectWarning", "ShrinkReport", "__version__", "dash_shrink_"]
