"""Model families: facts, loading, and the forward."""

from spiffy.runtime.models.base import DiffusionLM, Family, KeyValues
from spiffy.runtime.models.load import ALIASES, FAMILIES, load_model

__all__ = ["ALIASES", "FAMILIES", "DiffusionLM", "Family", "KeyValues", "load_model"]
