"""What a checkpoint's `config.json` says, checked as a whole: module class and config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spiffy.runtime.models.block_size import check_block_sizes
from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fields import check_entries, head_dim
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import said

# Entries of the families' configs that decide how much is built, and the most they may be.
_SIZES = {
    **dict.fromkeys(("n_layers", "num_hidden_layers"), 1 << 10),
    **dict.fromkeys(
        ("n_heads", "n_kv_heads", "num_attention_heads", "num_key_value_heads"), 1 << 12
    ),
    **dict.fromkeys(("num_experts", "num_experts_per_tok", "num_shared_experts"), 1 << 12),
    **dict.fromkeys(("n_group", "topk_group"), 1 << 12),
    **dict.fromkeys(("d_model", "hidden_size", "head_dim", "moe_intermediate_size"), 1 << 20),
    **dict.fromkeys(("mlp_hidden_size", "intermediate_size"), 1 << 20),
    **dict.fromkeys(("vocab_size", "embedding_size"), 1 << 24),
    **dict.fromkeys(("max_sequence_length", "max_position_embeddings"), 1 << 30),
}
# Others that transformers 5.0 takes as they are.
_POSITIVE = ("rms_norm_eps", "routed_scaling_factor")
_FLAGS = (
    *("attention_bias", "multi_query_attention", "norm_topk_prob", "tie_word_embeddings"),
    "weight_tying",
)


def checked_architecture(name: str, family: Family, config: Mapping[str, Any]) -> Architecture:
    """Module class and config of a checkpoint, whose `config.json` is checked as a whole.

    Raises
    ------
    SpiffyError
        If an entry selects what is not computed, is missing, or is absurd.
    """
    check_entries(name, family.name, config, family.entries)
    try:
        _check_sizes(config)
        architecture, module_config = family.architecture(config)
        check_ids(config, module_config.vocab_size)
        _check_turning(module_config)
        for names in (family.merged, family.split):
            names(config)  # what stored parameters are called follows from it too
    except KeyError as error:
        raise SpiffyError(f"{name}: config.json lacks {error.args[0]!r}") from None
    except SpiffyError:
        raise
    except Exception as error:  # transformers' checks of absurd values raise many kinds
        reason = said(error)
        raise SpiffyError(f"{name}: config.json: {reason}") from None
    return architecture, module_config


def _check_sizes(config: Mapping[str, Any]) -> None:
    for field, most in _SIZES.items():
        value = config.get(field)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{field} {value!r} must be a whole number from 1 to {most}")
    for field in _POSITIVE:
        value = config.get(field, 1)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{field} {value!r} must be a positive number")
    for field in _FLAGS:
        value = config.get(field)
        if value is not None and type(value) is not bool:
            raise ValueError(f"{field} {value!r} must be true or false")


def _check_turning(config: Any) -> None:
    """Refuse heads of which RoPE cannot turn the part that is stated: pairs, at most all."""
    head = head_dim(config)
    part = config.rope_parameters.get("partial_rotary_factor") or 1
    turning = int(head * part)
    if part > 1 or turning < 2 or turning % 2:
        raise ValueError(
            f"RoPE would turn {turning} of the {head} dimensions of a head (partial_rotary_factor "
            f"{part}): it turns pairs, and at most all"
        )


def check_ids(config: Mapping[str, Any], vocab_size: int) -> None:
    """Check the token ids and block sizes that a config states.

    Raises
    ------
    KeyError
        If there is no mask token.
    ValueError
        If a value is none.
    """
    check_block_sizes(config)
    mask = config["mask_token_id"]
    if type(mask) is not int or not 0 <= mask < vocab_size:
        raise ValueError(f"mask_token_id {mask!r} is not a token of {vocab_size}")
    eos = config.get("eos_token_id")
    if not all(isinstance(k, int) for k in (eos if isinstance(eos, list) else [eos or 0])):
        raise ValueError(f"eos_token_id {eos!r} is neither a token id nor a list of them")
