from .batches import derive_max_steps as derive_max_steps
from .config import DashConfig as DashConfig
from .dash import dash_shrink_ as dash_shrink_
from .origin import Origin as Origin
from .origin import find_origin as find_origin
from .shrink import NoEffectWarning as NoEffectWarning
from .shrink import ShrinkReport as ShrinkReport
