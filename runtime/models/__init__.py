"""Model families: facts, loading, and the forward."""

from spiffy.runtime.models.base import DiffusionLM, Family, KeyValues
from spiffy.runtime.models.families import FAMILIES
from spiffy.runtime.models.load import load_model
from spiffy.runtime.models.published import ALIASES
from spiffy.runtime.models.wrapping import wrap

__all__ = ["ALIASES", "FAMILIES", "DiffusionLM", "Family", "KeyValues", "load_model", "wrap"]
