"""Model families: facts, loading, and the forward."""

from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.families import FAMILIES
from spiffy.runtime.models.family import Family
from spiffy.runtime.models.load import load_model
from spiffy.runtime.models.published import ALIASES
from spiffy.runtime.models.slots import KeyValues
from spiffy.runtime.models.wrapping import wrap

__all__ = ["ALIASES", "FAMILIES", "DiffusionLM", "Family", "KeyValues", "load_model", "wrap"]
