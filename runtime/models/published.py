"""Published checkpoints by short names, by family; docs/checkpoints.md says which were seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_SHIPPED = Path(__file__).parent.parent / "checkpoints"


class Group(NamedTuple):
    """Checkpoints of one family.

    Attributes
    ----------
    title
        What the family is called.
    blocks
        Block lengths that it decodes, in words.
    policy
        The unmasking policy that its own code decodes with when it is to be quick.
    places
        Alias -> hub id, or a directory that ships with the package.
    """

    title: str
    blocks: str
    policy: str
    places: Mapping[str, str]


PUBLISHED: tuple[Group, ...] = (
    Group(
        "LLaDA",
        "any (32)",
        "threshold 0.9",
        {
            "tiny-llada": str(_SHIPPED / "tiny-llada"),
            "llada-8b": "GSAI-ML/LLaDA-8B-Instruct",
            "llada-8b-base": "GSAI-ML/LLaDA-8B-Base",
            "llada-1.5": "GSAI-ML/LLaDA-1.5",
        },
    ),
    Group(
        "Dream",
        "any (32)",
        "threshold 0.9",
        {
            "tiny-dream": str(_SHIPPED / "tiny-dream"),
            "dream-7b": "Dream-org/Dream-v0-Instruct-7B",
            "dream-7b-base": "Dream-org/Dream-v0-Base-7B",
            "dream-coder-7b": "Dream-org/Dream-Coder-v0-Instruct-7B",
            "dream-coder-7b-base": "Dream-org/Dream-Coder-v0-Base-7B",
            "diffucoder-7b": "apple/DiffuCoder-7B-cpGRPO",
            "diffucoder-7b-instruct": "apple/DiffuCoder-7B-Instruct",
            "diffucoder-7b-base": "apple/DiffuCoder-7B-Base",
        },
    ),
    Group(
        "SDAR, TraDo",
        "as named, else 4 (tiny-sdar: 8)",
        "threshold 0.9",
        {
            "tiny-sdar": str(_SHIPPED / "tiny-sdar"),
            "sdar-1.7b": "JetLM/SDAR-1.7B-Chat",
            "sdar-1.7b-b32": "JetLM/SDAR-1.7B-Chat-b32",
            "sdar-4b": "JetLM/SDAR-4B-Chat",
            "sdar-4b-b16": "JetLM/SDAR-4B-Chat-b16",
            "sdar-4b-b32": "JetLM/SDAR-4B-Chat-b32",
            "sdar-8b": "JetLM/SDAR-8B-Chat",
            "sdar-8b-b16": "JetLM/SDAR-8B-Chat-b16",
            "sdar-8b-b32": "JetLM/SDAR-8B-Chat-b32",
            "sdar-8b-b64": "JetLM/SDAR-8B-Chat-b64",
            "sdar-30b-a3b": "JetLM/SDAR-30B-A3B-Chat",
            "sdar-30b-a3b-b32": "JetLM/SDAR-30B-A3B-Chat-b32",
            "sdar-30b-a3b-sci": "JetLM/SDAR-30B-A3B-Sci",
            "trado-4b": "Gen-Verse/TraDo-4B-Instruct",
            "trado-8b": "Gen-Verse/TraDo-8B-Instruct",
            "trado-8b-thinking": "Gen-Verse/TraDo-8B-Thinking",
        },
    ),
    Group(
        "LLaDA2.0",
        "32",
        "threshold 0.95",
        {
            "tiny-llada2": str(_SHIPPED / "tiny-llada2"),
            "llada2-mini": "inclusionAI/LLaDA2.0-mini",
            "llada2-flash": "inclusionAI/LLaDA2.0-flash",
        },
    ),
    Group(
        "LLaDA2.1",
        "32",
        "joint 0.7, edits above 0.5",
        {
            "llada2.1-mini": "inclusionAI/LLaDA2.1-mini",
            "llada2.1-flash": "inclusionAI/LLaDA2.1-flash",
        },
    ),
    Group(
        "iLLaDA",
        "any (32)",
        "threshold 0.9",
        {
            "illada-8b": "GSAI-ML/iLLaDA-8B-Instruct",
            "illada-8b-base": "GSAI-ML/iLLaDA-8B-Base",
        },
    ),
    Group(
        "Stable-DiffCoder",
        "4",
        "threshold 0.9",
        {
            "stable-diffcoder-8b": "ByteDance-Seed/Stable-DiffCoder-8B-Instruct",
            "stable-diffcoder-8b-base": "ByteDance-Seed/Stable-DiffCoder-8B-Base",
        },
    ),
    Group(
        "A2D, mdlm",
        "any (32)",
        "static",
        {
            "qwen3-0.6b-mdlm": "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
            "qwen2.5-coder-0.5b-mdlm": "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1",
        },
    ),
    Group(
        "A2D, bd3lm",
        "32",
        "static",
        {
            "qwen3-0.6b-bd3lm": "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
            "qwen2.5-coder-0.5b-bd3lm": "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
        },
    ),
    Group(
        "Fast-dLLM v2",
        "32, in sub-blocks of 8",
        "threshold 0.9",
        {
            "fast-dllm-1.5b": "Efficient-Large-Model/Fast_dLLM_v2_1.5B",
            "fast-dllm-7b": "Efficient-Large-Model/Fast_dLLM_v2_7B",
        },
    ),
)

#: Short names -> directories that ship with the package, or hub ids.
ALIASES: Mapping[str, str] = {
    alias: place for group in PUBLISHED for alias, place in group.places.items()
}
