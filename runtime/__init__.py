"""Lightweight decoding of masked diffusion LMs, plain and speculative.

    from spiffy.runtime import generate, load_model, wrap

Imports torch, transformers and pydantic, and nothing of calibration or graph search.
"""

from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.generate import Output, decoding_settings, generate
from spiffy.runtime.models import ALIASES, DiffusionLM, load_model, wrap

__all__ = [
    "ALIASES",
    "BlockEdges",
    "DiffusionLM",
    "Output",
    "decoding_settings",
    "generate",
    "load_model",
    "wrap",
]
