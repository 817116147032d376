"""What `config.json` says is computed: which entries select something, and which have no effect.

One entry passed over in silence is another model with the same weights. So every family declares
what becomes of the entries (`Entries`), and what nobody declared is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spiffy.schemas import SpiffyError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Entries:
    """What becomes of the entries of a family's `config.json`.

    Those of `PLAIN` and `IDLE` are declared for all families.

    Attributes
    ----------
    reads
        Those that the family's module is built from.
    only
        Those that select among computations, with the values that select the one computed here;
        none at all where any value selects another. An entry that is null or missing says nothing.
    same
        Other spellings: entries that have to equal another one.
    idle
        Those without effect on what is computed.
    """

    reads: frozenset[str] = frozenset()
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()


ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
BLOCK_SIZES = ("block_size", "block_length", "bd_size", "bd3lm_block_size", "diffusion_block_size")
# Spellings of whether queries and keys are normalised, head by head.
QK_NORM = ("attention_layer_norm", "qk_layernorm", "qk_norm", "use_qk_norm")

_SILU = ("silu", "swish")
_RMS = ("rms", "rmsnorm", "rms_norm", "RMSNorm")

# What a plain decoder layer of transformers computes (RMS norm, SwiGLU, RoPE on whole heads,
# attention to everything, no biases, no scales), by the names that transformers' and the official
# configs have for the alternatives.
PLAIN: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(
        ("hidden_act", "activation_type", "hidden_activation", "activation_function"), _SILU
    ),
    **dict.fromkeys(("layer_norm_type", "norm_type", "normalization", "normalization_type"), _RMS),
    **dict.fromkeys(("use_rms_norm", "use_rmsnorm", "rms_norm", "rmsnorm"), (True,)),
    # a number selects LayerNorm
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), ()),
    **dict.fromkeys(("rope", "use_rope", "use_rotary", "rotary"), (True,)),
    "position_embedding_type": ("rope", "rotary"),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rotary_percent"), (1,)),
    **dict.fromkeys(("clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"), ()),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar"), ()),
    **dict.fromkeys(
        (
            "embedding_multiplier",
            "embedding_scale",
            "logit_scale",
            "logits_scaling",
            "lm_head_multiplier",
            "residual_multiplier",
        ),
        (1,),
    ),
    "mlp_type": ("swiglu", "gated"),
    **dict.fromkeys(
        ("attention_bias", "add_qkv_bias", "include_bias", "include_qkv_bias", "qkv_bias"), (False,)
    ),
    **dict.fromkeys(("bias_for_layer_norm", "mlp_bias", "use_bias", "use_qkv_bias"), (False,)),
    **dict.fromkeys(QK_NORM, (False,)),
    **dict.fromkeys(("input_emb_norm", "norm_head", "norm_softmax"), (False,)),
    **dict.fromkeys(("scale_embedding", "scale_embeddings", "scale_logits"), (False,)),
    **dict.fromkeys(("alibi", "use_alibi", "use_mrope", "use_parallel_residual"), (False,)),
}

# Entries without effect on what is computed here, whatever the family.
IDLE = frozenset(
    {
        # what the file and the checkpoint are, and how they came about
        *("architectures", "auto_map", "dtype", "model_type", "torch_dtype"),
        *("transformers_version", "finetuning_task", "id2label"),
        *("label2id", "name_or_path", "num_labels", "problem_type"),
        *("task_specific_params", "tokenizer_class", "unsloth_fixed", "unsloth_version"),
        *("author", "base_model", "description", "language", "library_name", "license"),
        *("model_max_length", "model_name", "pipeline_tag", "tags"),
        # read elsewhere: token ids, and whether the head is the embedding
        *("mask_token", "tie_word_embeddings"),
        # training: initial values, losses, parallelism
        *("dropout", "init_std", "initializer_factor", "initializer_range"),
        *("gradient_checkpointing", "neftune_noise_alpha", "pretraining_tp", "use_liger_kernel"),
        # how transformers runs a model, and what it returns
        *("attn_implementation", "chunk_size_feed_forward", "is_decoder", "output_attentions"),
        *("output_hidden_states", "return_dict", "tf_legacy_loss", "torchscript", "use_bfloat16"),
        *("use_cache", "flash_attention", "use_flash_attention", "use_flash_attn"),
        # defaults of generation
        *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample"),
        *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
        *("length_penalty", "max_length", "max_new_tokens"),
        *("min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
        *("num_return_sequences", "output_scores", "prefix", "remove_invalid_values"),
        *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature"),
        *("top_k", "top_p", "typical_p", "gen_length", "remasking", "steps"),
        # only of windows, which are checked
        "max_window_layers",
    }
)

# Dropout, token ids and weights of losses go by many names.
_IDLE_ENDS = ("_dropout", "_pdrop", "_token_id", "_token_ids", "_loss_coef")
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "layer_types"})
_NEUTRAL: tuple[object, ...] = (False, 0, "", [], {})

_USUAL = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
USUAL = frozenset(_USUAL) | ROPE


def check_entries(name: str, family: str, config: Config, entries: Entries) -> None:
    """Refuse a config that selects something the family's module does not compute.

    Raises
    ------
    SpiffyError
        Names the first such entry, or one that nobody has declared and that is not false, 0, empty
        or null.
    """
    _refuse_quantized(name, config)
    refuse_windows(name, family, config)
    declared = entries.reads | entries.idle
    fixed = {entry: values for entry, values in PLAIN.items() if entry not in declared}
    fixed |= entries.only
    for entry, value in config.items():
        if value is None or entry.startswith("_") or entry in _WINDOWS:
            continue
        if entry in fixed:
            if value not in fixed[entry]:
                _refuse_value(name, family, entry, value, fixed[entry])
        elif entry in entries.same:
            other = config.get(entries.same[entry], value)
            if value != other:
                raise SpiffyError(
                    f"{name}: config.json: {entry} = {_short(value)} contradicts "
                    f"{entries.same[entry]} = {_short(other)}"
                )
        elif (
            entry not in declared | IDLE
            and not entry.endswith(_IDLE_ENDS)
            and value not in _NEUTRAL
        ):
            raise SpiffyError(
                f"{name}: config.json: unknown entry {entry!r} = {_short(value)} could change what "
                f"{family} computes; if it does not, remove it from config.json"
            )


def _refuse_value(
    name: str, family: str, entry: str, value: object, computed: tuple[object, ...] = ()
) -> None:
    wanted = " or ".join(map(repr, computed)) or "null"
    raise SpiffyError(
        f"{name}: config.json: {entry} = {_short(value)} is not supported: {family} is computed "
        f"with {wanted}"
    )


def _refuse_quantized(name: str, config: Config) -> None:
    for entry in _QUANTIZED:
        if stated := config.get(entry):
            method = stated.get("quant_method") if isinstance(stated, dict) else stated
            raise SpiffyError(
                f"{name}: config.json: {entry}: the weights are quantized "
                f"({method or 'by a method that is not named'}), which is not supported: load them "
                "with transformers and spiffy.runtime.wrap() the module, or give the checkpoint "
                "that they were made from"
            )


def without_quantization(config: Config) -> dict[str, Any]:
    """The config without what says how the weights are stored."""
    return {entry: value for entry, value in config.items() if entry not in _QUANTIZED}


def refuse_windows(name: str, family: str, config: Config) -> None:
    """Refuse attention that does not reach everywhere.

    A window's size stands in many configs that do not use it, but only `use_sliding_window` says
    so.

    Raises
    ------
    SpiffyError
        Names the entry that selects it.
    """
    used, size = config.get("use_sliding_window"), config.get("sliding_window")
    if used:
        _refuse_value(name, family, "use_sliding_window", used, (False,))
    if size and used is None:
        _refuse_value(name, family, "sliding_window", size)
    kinds = config.get("layer_types") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind != "full_attention":
            _refuse_value(name, family, "layer_types", kind, ("full_attention",))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def usual_fields(config: Config, *, partial: bool = False) -> dict[str, Any]:
    """Fields that Llama, Qwen and their relatives call the same, for transformers' config.

    `partial` says that the module turns a part of each head, which the config states (`rope`).

    Raises
    ------
    ValueError
        If the RoPE is none that is computed, or contradicts itself.
    """
    return {entry: config[entry] for entry in _USUAL} | {
        "rope_parameters": rope(config, partial=partial),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }


def head_dim(config: Any) -> int:
    """Dimensions of a head, by one of transformers' configs."""
    stated: int | None = getattr(config, "head_dim", None)
    return stated or config.hidden_size // config.num_attention_heads


def check_head_dim(config: Config) -> None:
    """Refuse heads of another width than the hidden size has for each, where that is computed."""
    width = config["hidden_size"] // config["num_attention_heads"]
    if (stated := config.get("head_dim")) not in (None, width):
        raise ValueError(f"head_dim {stated!r} is not hidden_size / num_attention_heads: {width}")


def check_qk_norm(config: Config, computed: bool) -> None:
    """Refuse a config that says otherwise than is computed, where the model type decides that."""
    for entry in QK_NORM:
        if (stated := config.get(entry)) not in (None, computed):
            raise ValueError(f"{entry} = {_short(stated)} is not supported: {computed} is computed")


# RoPE as transformers computes it (`dynamic` by the whole sequence's length: `rotary`), with what
# each type needs and may have.
_SCALED: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset(
            {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        ),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
            | {"original_max_position_embeddings"}
        ),
    ),
}


def rope(config: Config, *, partial: bool = False) -> dict[str, Any]:
    """RoPE in transformers' words (`rope_parameters`), from every spelling it has had.

    These are `rope_theta` beside `rope_scaling` (transformers 4), and `rope_parameters`, flat or by
    layer type (5). Numbers are normalised, so that equal RoPE gives equal dicts.

    Raises
    ------
    KeyError
        If nothing states the base, or with `partial` the part of a head that turns.
    ValueError
        If two entries contradict each other, or the type is none that is computed.
    """
    stated = {
        entry: _flat(entry, config[entry])
        for entry in ("rope_scaling", "rope_parameters")
        if config.get(entry)
    }
    theta = _moved("rope_theta", config, stated)
    if theta is None:
        raise KeyError("rope_theta")
    part = _moved("partial_rotary_factor", config, stated)
    if part is None and partial:
        raise KeyError("partial_rotary_factor")
    if part not in (None, 1) and not partial:
        raise ValueError(f"partial_rotary_factor {_short(part)} is not supported: whole heads turn")
    scaling = _agreed(stated) or {"rope_type": "default"}
    entry = next(iter(stated), "rope_scaling")
    _check_scaling(entry, scaling)
    found = {**scaling, "rope_theta": _number("rope_theta", theta)}
    if partial:
        found["partial_rotary_factor"] = _number("partial_rotary_factor", part)
    return found


def _moved(key: str, config: Config, stated: Mapping[str, dict[str, Any]]) -> Any:
    """What was beside `rope_scaling` in transformers 4 and is inside since; taken out there."""
    found = {key: config.get(key)}
    found |= {f"{entry}.{key}": value.pop(key, None) for entry, value in stated.items()}
    return _agreed({entry: value for entry, value in found.items() if value is not None})


def _flat(entry: str, stated: Any) -> dict[str, Any]:
    """One layer type's parameters, under transformers' present names, without nulls."""
    if not isinstance(stated, Mapping):
        raise ValueError(f"{entry} {_short(stated)} must be an object")
    if any(isinstance(value, Mapping) for value in stated.values()):
        if "full_attention" not in stated:
            raise ValueError(f"{entry} has nothing for full_attention")
        for kind, value in stated.items():
            if value != stated["full_attention"]:
                raise ValueError(f"{entry}.{kind} is not supported: it is not full_attention's")
        stated = stated["full_attention"]
    found = {key: value for key, value in stated.items() if value is not None}
    kinds = {key: found.pop(key) for key in ("rope_type", "type") if key in found}
    kind = _agreed({f"{entry}.{key}": value for key, value in kinds.items()})
    return {"rope_type": "default" if kind is None else kind, **found}


def _agreed(stated: Mapping[str, Any]) -> Any:
    """What all entries say, or None without any."""
    pairs = list(stated.items())
    for entry, value in pairs[1:]:
        if value != pairs[0][1]:
            raise ValueError(
                f"{entry} {_short(value)} contradicts {pairs[0][0]} {_short(pairs[0][1])}"
            )
    return pairs[0][1] if pairs else None


def _check_scaling(entry: str, scaling: dict[str, Any]) -> None:
    """Refuse what is not computed; numbers are normalised in place."""
    kind = scaling["rope_type"]
    if not isinstance(kind, str) or kind not in _SCALED:
        raise ValueError(
            f"{entry}: RoPE of type {_short(kind)} is not supported: {', '.join(_SCALED)} are"
        )
    needed, optional = _SCALED[kind]
    for key in sorted(needed - scaling.keys()):
        raise ValueError(f"{entry} lacks {key!r}, which type {kind!r} needs")
    for key, value in scaling.items():
        if key == "rope_type" or (key == "truncate" and type(value) is bool):
            continue
        if key not in needed | optional:
            raise ValueError(f"{entry}.{key} = {_short(value)} is not supported for type {kind!r}")
        number = _number(f"{entry}.{key}", value)
        if key == "original_max_position_embeddings" and not number.is_integer():
            raise ValueError(f"{entry}.{key} {value!r} must be a whole number")
        # transformers asks for the one as an integer
        scaling[key] = int(number) if key == "original_max_position_embeddings" else number


def _number(entry: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{entry} {_short(value)} must be a positive number")
    return float(value)


def expert_shapes(config: Config, layers: Iterable[int]) -> dict[str, list[int]]:
    """Names and shapes of the experts' matrices, which checkpoints store one by one."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    shapes = {
        "gate_proj": [width, hidden],
        "up_proj": [width, hidden],
        "down_proj": [hidden, width],
    }
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight": shape
        for layer in layers
        for expert in range(config["num_experts"])
        for matrix, shape in shapes.items()
    }
