"""Which model a module is, and the settings that a call of `generate` gives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from spiffy.runtime.generate import decoding_settings
from spiffy.runtime.models import FAMILIES, DiffusionLM, wrap
from spiffy.runtime.models.wrapping import check_attention
from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.decoding import FILTERS, MAX_POSITIONS, NO_FILTER


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Decoding is in evaluation mode; what was in training, such as dropout, is so again after."""
    training = [part for part in module.modules() if part.training]
    try:
        yield
    finally:
        for part in training:
            part.training = True


def known_model(
    module: Any, graph: DraftGraph | None, family: str | None, mask_token_id: int | None
) -> DiffusionLM:
    """The model that a module is: known, or found out now and known from here on."""
    known = DiffusionLM.of(module)
    if known is None:
        lm = wrap(module, None, family_of(module, graph, family), mask_token_id=mask_token_id)
    else:
        if not known.is_attention_trusted:  # set_attn_implementation was called since
            check_attention(known)
            known.trust_attention()
        own = known.family.name, known.mask_token_id
        wanted = family or own[0], own[1] if mask_token_id is None else mask_token_id
        lm = known if wanted == own else _otherwise(known, *wanted)
    if lm.tokenizer is None and graph is not None and graph.model.fingerprint != lm.fingerprint:
        return lm.replaced(fingerprint="")  # of the config alone: not to compare
    return lm


def _otherwise(known: DiffusionLM, family: str, mask_token_id: int) -> DiffusionLM:
    """A known model as one call wants it: of another family, or with another mask token."""
    if mask_token_id not in range(known.vocab_size):
        raise SpiffyError(f"mask_token_id {mask_token_id!r} is not a token of {known.vocab_size}")
    config = known.config if family == known.family.name else None
    lm = wrap(known.module, known.tokenizer, family, config, mask_token_id=mask_token_id)
    known.remember()  # for the calls that want nothing of the kind
    return lm.replaced(eos_token_ids=known.eos_token_ids)


def family_of(module: Any, graph: DraftGraph | None, family: str | None) -> str:
    """The family asked for, else the graph's, else the only one that such a module can be."""
    if family is not None:
        return family
    if graph is not None:
        return graph.model.family
    kind = module.config.model_type
    found = [each.name for each in FAMILIES if kind in (*each.computed_by, *each.model_types)]
    if len(found) != 1:
        raise SpiffyError(
            f"a module of model_type {kind!r} may be of several families, or of none: give family= "
            f"({', '.join(found or [each.name for each in FAMILIES])})"
        )
    return found[0]


def with_ends(lm: DiffusionLM, module: Any, generation_config: Any) -> DiffusionLM:
    """The model with the end tokens of this call, where it gives others than the module has."""
    asked = _end_tokens(generation_config)
    if asked == _end_tokens(getattr(module, "generation_config", None)):
        return lm
    return lm.replaced(eos_token_ids=asked)


def _end_tokens(generation_config: Any) -> frozenset[int]:
    """End tokens of a config: transformers takes a number, a list, a tuple or a tensor."""
    ends = getattr(generation_config, "eos_token_id", None)
    return frozenset(() if ends is None else torch.as_tensor(ends).flatten().tolist())


def drawing_of(config: Any, module: Any) -> dict[str, Any]:
    """Settings of what a call draws, by its generation config.

    The `top_k` that transformers fills in where nobody gives one stands for none, unless the
    module's own generation config has it.
    """
    if not config.do_sample:
        return {"temperature": 0.0}
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    usual: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
    own = getattr(getattr(module, "generation_config", None), "top_k", None)
    filled_in = config.top_k == usual.get("top_k") != own
    # None would leave what a graph says: all of the vocabulary, and all of the probability.
    return {
        "temperature": temperature,
        "top_k": MAX_POSITIONS if filled_in or config.top_k in (None, 0) else config.top_k,
        "top_p": 1.0 if config.top_p is None else float(config.top_p),
    }


def settings_of(
    lm: DiffusionLM,
    graph: DraftGraph | None,
    any_model: bool,
    decoding: Mapping[str, Any] | None,
    generation_config: Any,
    longest: int,
) -> DecodingSettings:
    """Settings of a call; answers that are no number of whole blocks are decoded so, and cut."""
    if not isinstance(decoding, Mapping | None) or not all(
        isinstance(k, str) for k in decoding or ()
    ):
        raise SpiffyError(
            f"decoding={decoding!r}: give settings by their names, such as "
            "{'policy': 'threshold'}"
        )
    options = dict(decoding or {})
    for name, instead in (
        ("gen_length", "max_new_tokens="),
        ("temperature", "do_sample=True and temperature="),
    ):
        if name in options:
            raise SpiffyError(f"decoding: {name} is generate's own: give {instead}")
    for name in FILTERS:
        if options.get(name) not in NO_FILTER[name] and not generation_config.do_sample:
            raise SpiffyError(f"decoding: {name} filters what is drawn: give do_sample=True too")
    if longest < 1:
        raise SpiffyError(
            f"max_length {generation_config.max_length} leaves no token for the answer: give "
            "max_new_tokens="
        )
    options = drawing_of(generation_config, lm.module) | options
    block = options.get("block_length")
    if block is None:
        block = lm.default_block_length if graph is None else graph.decoding.block_length
    if not lm.family.block_causal and isinstance(block, int) and block > 0:
        longest = -(-longest // block) * block
    return decoding_settings(lm, graph, any_model=any_model, gen_length=longest, **options)
