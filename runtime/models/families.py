"""All families, and which of them a checkpoint is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spiffy.runtime.models.a2d import A2D_BD3LM, A2D_MDLM
from spiffy.runtime.models.diffcoder import STABLE_DIFFCODER
from spiffy.runtime.models.dream import DREAM
from spiffy.runtime.models.family import Family
from spiffy.runtime.models.fast_dllm import FAST_DLLM
from spiffy.runtime.models.illada import ILLADA
from spiffy.runtime.models.llada import LLADA
from spiffy.runtime.models.llada2 import LLADA2
from spiffy.runtime.models.sdar import SDAR
from spiffy.runtime.models.source import Source
from spiffy.schemas import SpiffyError

FAMILIES: tuple[Family, ...] = (
    LLADA,
    DREAM,
    SDAR,
    LLADA2,
    ILLADA,
    STABLE_DIFFCODER,
    A2D_MDLM,
    A2D_BD3LM,
    FAST_DLLM,
)


def family_of(name: str, source: Source, config: Mapping[str, Any], wanted: str | None) -> Family:
    """The family of the config's model type, then its architecture, then the name asked for.

    Where these leave several, the checkpoint's own name has to tell; never a guess.
    """
    kind, listed = config.get("model_type"), config.get("architectures")
    classes = listed if isinstance(listed, list) else []
    if kind in ("lladamoe", "llada_moe") or (kind == "llada" and config.get("num_experts")):
        raise SpiffyError(
            f"{name}: LLaDA-MoE is not supported: transformers has no module that computes its "
            "mixture of experts; LLaDA-8B, LLaDA-1.5 and LLaDA2 are"
        )
    found = [
        family
        for family in FAMILIES
        if kind in family.model_types
        and (not family.architectures or any(a in classes for a in family.architectures))
    ]
    if not found:
        known = dict.fromkeys(
            f"{kind} of {' or '.join(family.architectures)}" if family.architectures else kind
            for family in FAMILIES
            for kind in family.model_types
        )
        raise SpiffyError(
            f"{name}: model_type {kind!r} is not supported as {listed} (known: {', '.join(known)})"
        )
    if wanted is not None:
        asked = [family for family in found if family.name == wanted]
        if not asked:
            ours = ", ".join(family.name for family in found)
            raise SpiffyError(f"{name}: family {wanted!r} does not fit its config.json: {ours}")
        return asked[0]
    told = [family for family in found if family.named in source.own_name.lower()]
    if len(told) != 1:
        words = " or ".join(family.named for family in found)
        ours = " or ".join(family.name for family in found)
        raise SpiffyError(
            f"{name}: config.json does not tell which kind of {kind} it is: give a folder whose "
            f"name says {words}, or family= in Python ({ours})"
        )
    return told[0]
