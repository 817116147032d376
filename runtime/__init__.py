"""Lightweight decoding of masked diffusion LMs, plain and speculative.

    from spiffy.runtime import generate, generate_many, load_model, stream, wrap

Imports torch, transformers and pydantic, and nothing of calibration or graph search.
"""

from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.generate import Output, decoding_settings, generate, generate_many
from spiffy.runtime.models import ALIASES, DiffusionLM, load_model, wrap
from spiffy.runtime.step.own_policy import Policy, Step, register_policy
from spiffy.runtime.streaming import Stream, stream

__all__ = [
    "ALIASES",
    "BlockEdges",
    "DiffusionLM",
    "Output",
    "Policy",
    "Step",
    "Stream",
    "decoding_settings",
    "generate",
    "generate_many",
    "load_model",
    "register_policy",
    "stream",
    "wrap",
]
