"""From a module that is loaded already to a model: quantized, adapted, spread, as its user had it.

The family's facts are ours, the weights and the way they are computed the user's. What cannot be
seen from outside, whether the attention keeps to the mask that drafts need, is tried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spiffy.runtime.models.architecture import check_ids, checked_architecture
from spiffy.runtime.models.attention import Group, attention_of
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.families import FAMILIES
from spiffy.runtime.models.family import Family
from spiffy.runtime.models.fields import refuse_windows, without_quantization
from spiffy.runtime.models.identity import differences, fingerprint
from spiffy.runtime.models.mask import Mask
from spiffy.runtime.models.slots import KeyValues
from spiffy.runtime.models.tokens import check_tokenizer, end_tokens, with_mask_token
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import said

# How far apart the same hidden states may come out of two forwards of other shapes, relative to how
# far states of different tokens lie apart. In random models of 64 layers other kernels make 0.12 in
# bfloat16, 0.03 in float16; where the mask is not kept to it is 0.6 and more, trained or not.
_APART = {torch.bfloat16: 0.3}
_APART_ELSE = 0.1


def wrap(
    module: Any,
    tokenizer: Any,
    family: str,
    config: Mapping[str, Any] | None = None,
    name: str | None = None,
    mask_token_id: int | None = None,
) -> DiffusionLM:
    """Make a model of a module that is loaded already.

    Quantized by bitsandbytes, torchao, GPTQ or AWQ, with adapters, spread over devices: whatever
    transformers computes, as long as its attention keeps to a mask. That is tried out with a few
    tokens. The module is put into evaluation mode, and otherwise left as it is.

    Parameters
    ----------
    module
        The family's transformers module (such as `LlamaForCausalLM` for LLaDA), or one that has
        `.model` and `.lm_head` like it; also as a `PeftModel`, whose adapters stay active.
    tokenizer
        The checkpoint's tokenizer, or None to decode token ids only.
    family
        Name of the family: llada, dream, sdar, ...
    config
        Content of the checkpoint's `config.json`. Without it the module's own config says what the
        model is, and mask and end tokens are the tokenizer's, or the family's.
    name
        What to call the model. A block size in it counts (`-b32`). Default: what the module was
        loaded from.
    mask_token_id
        Default: what config or tokenizer say, else the family's published one.

    Raises
    ------
    SpiffyError
        If the module is not of the family, its config and the one given disagree, no mask token is
        known, or its attention does not keep to the mask.
    """
    facts = next((known for known in FAMILIES if known.name == family), None)
    if facts is None:
        known = ", ".join(each.name for each in FAMILIES)
        raise SpiffyError(f"unknown family {family!r}: choose one of {known}")
    module = _without_peft(module)
    if not all(isinstance(getattr(module, part, None), nn.Module) for part in ("model", "lm_head")):
        raise SpiffyError(
            f"a {type(module).__name__} cannot be wrapped: give a module with .model and .lm_head, "
            "as transformers' classes for causal language models have them"
        )
    settings: Any = module.config
    name = name or _origin(settings) or f"wrapped {family}"
    if settings.model_type not in (*facts.computed_by, *facts.model_types):
        raise SpiffyError(
            f"{name}: {family} is computed by {' or '.join(facts.computed_by)}, and this module is "
            f"a {settings.model_type}"
        )
    own = settings.to_dict()
    refuse_windows(name, family, own)
    stated = _stated(own, settings) if config is None else without_quantization(config)
    if mask_token_id is not None:
        stated = {**stated, "mask_token_id": mask_token_id}
    stated = with_mask_token(stated, tokenizer, facts.published_mask(stated))
    rows = module.get_input_embeddings().weight.shape[0]
    described = settings if config is None else _described(name, facts, stated, settings)
    check_tokenizer(name, tokenizer, rows)
    eos_token_ids = end_tokens(name, _end_holders(module, stated), tokenizer, rows)
    try:
        check_ids(stated, rows)
        mask = stated["mask_token_id"]
        mark = fingerprint(facts, stated, described, mask, eos_token_ids, tokenizer)
    except KeyError as error:
        raise SpiffyError(
            f"{name}: neither its config nor its tokenizer has {error.args[0]!r}: give "
            + ("mask_token_id=, or " if error.args[0] == "mask_token_id" else "")
            + "wrap() the content of the checkpoint's config.json as config="
        ) from None
    except ValueError as error:  # such as RoPE that is not supported
        raise SpiffyError(f"{name}: {error}") from None
    model = DiffusionLM(
        module,
        facts,
        stated,
        name=name,
        fingerprint=mark,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
    )
    try:
        check_attention(model)
    except SpiffyError:
        model.forget()  # else a second try would find a known module, and trust it
        raise
    model.trust_attention()
    return model


def _without_peft(module: Any) -> Any:
    """The module inside peft's wrapper, where its adapters stay active."""
    if not hasattr(module, "get_base_model"):
        return module
    if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
        raise SpiffyError(
            "prompts learned by peft are put in front of what a module is given: such an adapter "
            "cannot be wrapped"
        )
    return module.get_base_model()


def _origin(settings: Any) -> str:
    """What the module was loaded from, as transformers writes it down."""
    name = str(getattr(settings, "_name_or_path", "") or "")
    return "" if name == "None" else name


def _stated(own: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """The module's own config, without an end token that every config of its class has."""
    try:
        default = type(settings)().eos_token_id
    except Exception:  # classes of others may not be made without arguments
        default = None
    return {key: value for key, value in own.items() if key != "eos_token_id" or value != default}


def _end_holders(module: Any, stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Configs that may name end tokens: the one stated, and that of a generation_config.json."""
    generation = getattr(module, "generation_config", None)
    if generation is None or getattr(generation, "_from_model_config", False):
        return [stated]
    return [stated, generation.to_dict()]


def _described(name: str, facts: Family, config: Mapping[str, Any], settings: Any) -> Any:
    """What the family makes of a checkpoint's config, which has to be the module's."""
    if config.get("model_type") not in facts.model_types:
        raise SpiffyError(
            f"{name}: config= is of model_type {config.get('model_type')!r}, {facts.name} of "
            f"{' or '.join(facts.model_types)}"
        )
    _, described = checked_architecture(name, facts, config)
    try:
        found = next(differences(facts, described, settings), None)
    except ValueError as error:
        raise SpiffyError(f"{name}: {error}") from None
    if found is not None:
        entry, theirs, ours = found
        raise SpiffyError(
            f"{name}: config= says {entry} {theirs!r}, the module has {ours!r}: one of them "
            "belongs to another model"
        )
    return described


def check_attention(model: DiffusionLM) -> None:
    """Try whether drafts packed side by side see what they would see alone.

    Two drafts of four tokens behind three frozen ones, their tokens shuffled in one row, against
    each draft in a row of its own with nothing frozen. Attention that is causal, or that does not
    keep to the mask, or that leaves frozen positions out, gives other hidden states.

    Raises
    ------
    SpiffyError
        If the states differ or are not finite, or the forward fails.
    """
    attention = attention_of(model.module.config) or "its own"
    advice = "load the module with attn_implementation='sdpa' or 'eager'"
    if attention == "flex_attention":  # its kernel for CPUs ends the process at such a mask
        raise SpiffyError(
            f"{model.name}: flex attention does not take the mask that drafts need: {advice}"
        )
    try:
        alone, packed = _both_ways(model)
    except Exception as error:  # of any kernel
        reason = said(error, 300)
        raise SpiffyError(
            f"{model.name}: its forward fails with the mask that drafts need (attention: "
            f"{attention}): {advice} ({type(error).__name__}: {reason})"
        ) from None
    if not alone.isfinite().all():
        cause = model.broken_weights()
        raise SpiffyError(
            f"{model.name} computes NaN or infinity: "
            + (f"{cause} holds them" if cause else f"its forward overflows in {model.dtype}")
        )
    scale = (alone - alone.mean(0)).norm()
    if not (packed - alone).norm() <= _APART.get(model.dtype, _APART_ELSE) * scale:
        raise SpiffyError(
            f"{model.name}: its attention ({attention}) does not keep to the mask that drafts "
            f"need, as flash attention and causal attention do not: {advice}"
        )


def _both_ways(model: DiffusionLM) -> tuple[Tensor, Tensor]:
    """Hidden states [8, hidden] of two drafts' tokens, computed apart and packed (float32)."""
    device = model.device
    ids = (torch.arange(11, device=device) * 7919 + 13) % model.vocab_size
    positions = torch.arange(7, device=device)
    before, drafts = ids[:3], ids[3:].view(2, 4)
    rows = torch.cat([before.expand(2, 3), drafts], 1)
    seen = torch.ones(7, 7, dtype=torch.bool, device=device)
    seen[:3, 3:] = False  # what is frozen has not seen what follows
    apart = [Group(2, 7, Mask.of(seen), whole=7)]
    alone = model.hidden_states(rows.flatten(), positions.repeat(2), apart)
    kv = KeyValues(3)
    frozen = Group(1, 3, None, kv, (range(3),), 3, 7)
    model.hidden_states(before, positions[:3], [frozen])
    order = torch.tensor([7, 3, 6, 2, 5, 1, 4, 0], device=device)
    draft = order // 4
    among = draft[:, None] == draft
    mask = Mask.of(torch.cat([torch.ones_like(among[:, :3]), among], 1))
    packed = [Group(1, 8, mask, kv, (range(3, 11),), 11, 7)]
    found = model.hidden_states(drafts.flatten()[order], positions[3 + order % 4], packed)
    own = alone.view(2, 7, -1)[:, 3:].reshape(8, -1)
    return own.float(), found[order.argsort()].float()
