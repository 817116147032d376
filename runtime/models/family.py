"""What a model family is: a handful of facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from spiffy.runtime.models.fields import Entries
from spiffy.schemas import CacheName

Architecture = tuple[type[PreTrainedModel], PreTrainedConfig]


def _none(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a family without such parameters; a function by name, so that families can be pickled."""
    return {}


@dataclass(frozen=True)
class Family:
    """The facts that tell one family of diffusion LMs from another.

    Attributes
    ----------
    name
        Short name, used in artifacts.
    model_types
        `model_type` values of `config.json` that belong to the family.
    architectures
        Names in `architectures` of `config.json`, where the model type alone does not tell.
    named
        What a checkpoint's name has to contain where no field of `config.json` tells (A2D).
    computed_by
        Model types of the transformers modules that compute the family, which `wrap` takes.
    architecture
        From the checkpoint's `config.json` content to transformers' module class and its config;
        the module has `.model` (ids to hidden states) and `.lm_head`.
    key_mapping
        Regular expressions from the checkpoint's parameter names to the module's.
    logit_shift
        1 if raw row k speaks of token k + 1 (Dream), else 0.
    block_causal
        Attention is bidirectional inside a block and causal across blocks (SDAR), instead of
        bidirectional everywhere.
    block_size
        Positions of a block where the checkpoint does not say.
    blocks_end_with_prompt
        The prompt's last block ends where the prompt does and its first one is shorter (bd3lm),
        instead of blocks that count from position 0, where the prompt's tail opens the first
        decoded block (SDAR). Only block-causal families.
    cuts_last_block
        The last block ends with `gen_length` (Stable-DiffCoder, bd3lm), instead of being decoded
        whole (SDAR). Only block-causal families.
    splits_masks
        `steps_per_block` splits the masks that a block starts with (Stable-DiffCoder, bd3lm),
        instead of `block_length` (SDAR). Both are the same but in the first and the last block.
    begins_blocks_alone
        A block's first token is committed alone, by the forward that stores the blocks before it,
        whose last position speaks of it (Fast-dLLM v2). Only shifted block-causal families.
    sub_block_length
        Positions of a block that are finished before the next ones of it are begun, unless asked
        otherwise (Fast-dLLM v2); None: all of them together.
    threshold_strict
        Threshold unmasking commits confidences > tau (SDAR, LLaDA2) instead of >= tau (others).
    scores_drawn
        Above temperature 0 confidences, margins and entropies are of the distribution that tokens
        are drawn from, tempered and filtered (Dream, SDAR, LLaDA2, Fast-dLLM v2), instead of the
        model's own (LLaDA).
    caches
        Cache kinds that the family can decode with; the first is the default.
    merged
        From `config.json` content to the names and shapes of stored parameters of which several
        make one of the module's (experts); by default there are none.
    split
        From `config.json` content to the names of stored parameters that hold several of the
        module's, one below the other: for each, the module's names and their rows; by default there
        are none.
    mask_token_id
        Published id of the mask token, for checkpoints where neither config nor tokenizer has it.
    masked_types
        Model types whose checkpoints have that one; empty: all.
    entries
        What becomes of the entries of `config.json`; others are refused.
    block_size_varies
        Checkpoints come in several block sizes, so one that states none has none (SDAR).
    """

    name: str
    model_types: tuple[str, ...]
    computed_by: tuple[str, ...]
    architecture: Callable[[Mapping[str, Any]], Architecture]
    key_mapping: Mapping[str, str]
    logit_shift: Literal[0, 1]
    block_causal: bool
    threshold_strict: bool
    caches: tuple[CacheName, ...]
    entries: Entries
    merged: Callable[[Mapping[str, Any]], Mapping[str, list[int]]] = _none
    split: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, int]]] = _none
    architectures: tuple[str, ...] = ()
    named: str = ""
    block_size: int = 32
    blocks_end_with_prompt: bool = False
    cuts_last_block: bool = False
    splits_masks: bool = False
    begins_blocks_alone: bool = False
    sub_block_length: int | None = None
    scores_drawn: bool = False
    mask_token_id: int | None = None
    masked_types: tuple[str, ...] = ()
    block_size_varies: bool = False

    def published_mask(self, config: Mapping[str, Any]) -> int | None:
        """Id of the mask token that published checkpoints with such a config have, if one has."""
        known = not self.masked_types or config.get("model_type") in self.masked_types
        return self.mask_token_id if known else None
