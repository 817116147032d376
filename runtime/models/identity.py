"""Which model it is: a digest of what is computed and of how text becomes ids, not of bytes.

Saved again, by another version of transformers, under another name, in other shards or another
dtype, it stays the same model. Weights are not covered: drafts cannot change a token whatever they
are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from spiffy.runtime.models.family import Family
from spiffy.runtime.models.fields import ROPE, USUAL, head_dim, rope
from spiffy.schemas.graph import FINGERPRINT

# Of transformers' configs, as the families fill them. What is false or missing says nothing.
_COMPUTED = (
    *sorted(USUAL - ROPE),
    "attention_bias",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "first_k_dense_replace",
    "n_routed_experts",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
)

# Text whose ids tell tokenizers of the same vocabulary apart: merges, normalisation, spaces, what
# is put around it.
_PROBES = (
    "Lily has 9 old pens and buys 12,345.67 new ones.\nHow many?\n\n  Two  spaces\tand a tab ",
    "def f(x_1: int) -> str:\r\n    return f'{x_1!r}' * 2  # naïve café, CAFÉ, e\u0301",
    "Привет, мир! 你好世界。 こんにちは ﬁ ½ \U0001f600\u200b\u00a0",
    " leading, don't, I'LL, 1000000, http://a.b/c?d=e&f=g",
)


def fingerprint(
    family: Family,
    config: Mapping[str, Any],
    module_config: Any,
    mask_token_id: int,
    eos_token_ids: Iterable[int],
    tokenizer: Any,
) -> str:
    """Digest of a model's meaning.

    Parameters
    ----------
    config
        Content of the checkpoint's `config.json`.
    module_config
        What the family makes of it.
    """
    facts = {name: getattr(module_config, name, None) for name in _COMPUTED}
    facts |= {
        "family": family.name,
        "head_dim": head_dim(module_config),
        "rope": _rope(family, config),
        "mask": mask_token_id,
        "eos": sorted(eos_token_ids),
        "tokenizer": _tokenizer_digest(tokenizer),
    }
    stated = {name: value for name, value in facts.items() if value not in (None, False, [])}
    text = json.dumps(_plain_numbers(stated), sort_keys=True, separators=(",", ":"))
    return FINGERPRINT + hashlib.sha256(text.encode()).hexdigest()[:32]


def differences(family: Family, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Entries of two of transformers' configs that do not compute the same, with both values.

    Raises
    ------
    ValueError
        If one has RoPE of a kind that is not computed.
    """
    for entry in _COMPUTED:
        values = [getattr(settings, entry, None) or None for settings in (one, other)]
        if values[0] != values[1]:
            yield entry, values[0], values[1]
    for entry in ("use_qk_norm", "hidden_act"):  # classes of others may do without the entry
        values = [getattr(settings, entry, None) for settings in (one, other)]
        if None not in values and values[0] != values[1]:
            yield entry, values[0], values[1]
    heads = [head_dim(settings) for settings in (one, other)]
    if heads[0] != heads[1]:
        yield "head_dim", heads[0], heads[1]
    try:
        turns = [_rope(family, settings.to_dict()) for settings in (one, other)]
    except KeyError:  # a class of others, which says it in other words
        return
    if turns[0] != turns[1]:
        yield "RoPE", turns[0], turns[1]


def _rope(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    return rope(config, partial="partial_rotary_factor" in family.entries.reads)


def _plain_numbers(value: Any) -> Any:
    """The value with whole numbers as such: 10000.0 in one file is 10000 in another."""
    if isinstance(value, dict):
        return {key: _plain_numbers(entry) for key, entry in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary, special tokens included, and of what becomes of a few texts."""
    if tokenizer is None:
        return ""
    vocabulary = sorted(tokenizer.get_vocab().items())
    ids = [list(tokenizer(text)["input_ids"]) for text in _PROBES]
    return hashlib.sha256(json.dumps([vocabulary, ids]).encode()).hexdigest()
