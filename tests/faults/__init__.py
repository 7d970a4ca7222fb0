"""Everything that goes wrong with files, data, settings, machines and the Hub, and what happens."""

from faults import data, folders, histories, hubs, machine, models
from faults.table import FAULTS, Fault, World

__all__ = ["FAULTS", "Fault", "World", "data", "folders", "histories", "hubs", "machine", "models"]
