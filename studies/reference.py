"""What a checkpoint computes, by hand: transformers' module from the very entries of its config.

An independent judge for `fuzz_checkpoints.py`: it uses none of the runtime's code. The config's
entries go to an ordinary config of transformers, which computes with those that it knows. Of the
others the reason why they have no effect is stated here; where there is none, a checkpoint must not
have been loaded, which `UnclearError` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Entries = dict[str, Any]
NOTHING: tuple[object, ...] = (None, False, 0, "", [], {})

# Entries without effect on logits, by the reason; none of them reaches transformers' config.
WITHOUT_EFFECT: Mapping[str, str] = {
    "says what the file is, or who made it and with what": "architectures auto_map model_type "
    "dtype torch_dtype transformers_version finetuning_task id2label label2id name_or_path "
    "num_labels problem_type task_specific_params tokenizer_class unsloth_fixed unsloth_version "
    "author base_model description language library_name license model_max_length model_name "
    "pipeline_tag tags",
    "is of training: first values, losses, dropout, which is off": "init_std initializer_factor "
    "initializer_range gradient_checkpointing neftune_noise_alpha pretraining_tp use_liger_kernel "
    "dropout fuse_cross_entropy complementary_mask conplemenrary_mask output_router_logits "
    "mtp_loss_scaling_factor debug ep_size micro_forward skip_checkpoint use_deepep init_fn "
    "init_cutoff_factor init_device",
    "says how a module is run and what it returns, not what it computes": "attn_implementation "
    "chunk_size_feed_forward is_decoder output_attentions output_hidden_states return_dict "
    "tf_legacy_loss torchscript use_bfloat16 use_cache flash_attention use_flash_attention "
    "use_flash_attn precision rope_full_precision router_dtype",
    "is a default of generation": "bad_words_ids begin_suppress_tokens diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty "
    "max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_scores prefix remove_invalid_values repetition_penalty "
    "return_dict_in_generate suppress_tokens temperature top_k top_p typical_p gen_length "
    "remasking steps",
    "names a token": "mask_token",
    "only says from which layer on windows are used, and there are none": "max_window_layers",
    "follows from other entries, and the parameters' shapes say so": "rotary_dim "
    "moe_shared_expert_intermediate_size",
    "is of norms and biases that other entries have switched off": "alibi_bias_max "
    "attention_layer_norm_with_affine",
}
_IDLE = {name for names in WITHOUT_EFFECT.values() for name in names.split()}
# Token ids (an embedding's padding index only stops gradients), dropout, weights of losses.
_IDLE_ENDS = ("_token_id", "_token_ids", "_dropout", "_pdrop", "_loss_coef")

# Values that select what the modules compute anyway; any other selects something else.
ONLY: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("use_sliding_window", "alibi", "use_alibi", "use_mrope", "scale_logits"), ()),
    **dict.fromkeys(("layer_norm_type", "norm_type", "normalization_type"), ("rms", "rmsnorm")),
    **dict.fromkeys(("rms_norm", "use_rmsnorm", "rope", "use_rope"), (True,)),
    **dict.fromkeys(("input_emb_norm", "bias_for_layer_norm"), ()),
    **dict.fromkeys(("include_bias", "include_qkv_bias", "use_bias", "use_qkv_bias"), ()),
    **dict.fromkeys(("logit_scale", "embedding_multiplier", "residual_multiplier"), (1,)),
    **dict.fromkeys(("rotary_pct", "rotary_percent"), (1,)),
    "position_embedding_type": ("rope", "rotary"),
    "mlp_type": ("swiglu", "gated"),
}
_ACTIVATIONS = ("activation_type", "hidden_activation", "activation_function")

_NORMED = ("sdar", "sdar_moe", "a2d-qwen3", "llada2_moe")
_QK_NORM = ("use_qk_norm", "qk_norm", "qk_layernorm", "attention_layer_norm")
_OF_MIXTURES = (
    *("moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok"),
    *("decoder_sparse_step", "mlp_only_layers"),
)
_BLOCKS = ("block_size", "block_length", "bd_size", "bd3lm_block_size", "diffusion_block_size")
_LLADA: Mapping[str, str] = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "activation_type": "hidden_act",
}
_LLADA_NAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.transformer\.wte\.", "model.embed_tokens."),
    (r"^model\.transformer\.ln_f\.", "model.norm."),
    (r"^model\.transformer\.ff_out\.", "lm_head."),
    (r"^model\.transformer\.blocks\.(\d+)\.", r"model.layers.\1."),
    (r"\.attn_out\.", ".self_attn.o_proj."),
    (r"(layers\.\d+)\.([qkv]_proj)\.", r"\1.self_attn.\2."),
    (r"\.ff_proj\.", ".mlp.gate_proj."),
    (r"(layers\.\d+)\.up_proj\.", r"\1.mlp.up_proj."),
    (r"\.ff_out\.", ".mlp.down_proj."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ff_norm\.", ".post_attention_layernorm."),
)
_LLADA2_NAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.word_embeddings\.", "model.embed_tokens."),
    (r"\.attention\.dense\.", ".self_attn.o_proj."),
    (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
    (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    (r"\.gate\.expert_bias$", ".gate.e_score_correction_bias"),
)


class UnclearError(Exception):
    """Says why a checkpoint does not say what it computes."""


class Reference:
    """A checkpoint folder, read anew.

    Attributes
    ----------
    config
        Content of its `config.json`.
    kind
        Its model type, from which everything else follows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Entries = json.loads((folder / "config.json").read_text())
        self.kind = str(self.config.get("model_type"))

    def logits(self, ids: Tensor, block_length: int) -> Tensor:
        """Logits [1, length, vocab] of `ids`; row k is of the token at position k.

        Raises
        ------
        UnclearError
            If an entry or a tensor is none that this could compute with.
        """
        module = self._module()
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool)
        if self._in_blocks():
            block = torch.arange(length) // block_length
            mask = block[:, None] >= block[None]
        with torch.inference_mode():
            found: Tensor = module(
                input_ids=ids, attention_mask=mask[None, None], use_cache=False
            ).logits
        shifted = self.kind in ("Dream", "Fast_dLLM_Qwen")
        rows = [max(0, k - 1) for k in range(length)] if shifted else list(range(length))
        return found[:, rows].float()

    def mask_token_id(self) -> int | None:
        """The config's mask token, else the tokenizer's, else the published one."""
        stated = self.config.get("mask_token_id")
        if stated is not None:
            return int(stated)
        known, named = self._vocabulary(), None
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            named = self._json(name).get("mask_token") or named
        text = named["content"] if isinstance(named, dict) else named
        if text in known:
            return int(known[text])
        published = {
            **{"llada2_moe": 156895, "illada": 5, "llama": 5, "Fast_dLLM_Qwen": 151665},
            **{"a2d-qwen3": 151669, "a2d-qwen2": 151669},
        }
        return published.get(self.kind)

    def _vocabulary(self) -> Entries:
        """Token ids by token: of one file, or of the three that Qwen2's tokenizer has."""
        whole = self._json("tokenizer.json")
        if not whole:
            return self._json("vocab.json") | self._json("added_tokens.json")
        added = {token["content"]: token["id"] for token in whole.get("added_tokens") or []}
        return {**whole["model"]["vocab"], **added}

    def _json(self, name: str) -> Entries:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}

    def _in_blocks(self) -> bool:
        if self.kind.startswith("a2d"):
            return "bd3lm" in self.folder.name
        return self.kind in ("sdar", "sdar_moe", "llada2_moe", "llama", "Fast_dLLM_Qwen")

    def _module(self) -> Any:
        build: Mapping[str, tuple[Any, Any, Callable[[], Entries]]] = {
            "llada": (LlamaForCausalLM, LlamaConfig, self._llada),
            "illada": (LlamaForCausalLM, LlamaConfig, self._same),
            "llama": (LlamaForCausalLM, LlamaConfig, self._same),
            "Dream": (Qwen2ForCausalLM, Qwen2Config, self._same),
            "Fast_dLLM_Qwen": (Qwen2ForCausalLM, Qwen2Config, self._same),
            "a2d-qwen2": (Qwen2ForCausalLM, Qwen2Config, self._same),
            "a2d-qwen3": (Qwen3ForCausalLM, Qwen3Config, self._same),
            "sdar": (Qwen3ForCausalLM, Qwen3Config, self._same),
            "sdar_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, self._same),
            "llada2_moe": (Glm4MoeForCausalLM, Glm4MoeConfig, self._llada2),
        }
        if self.kind not in build:
            raise UnclearError(f"model_type {self.kind!r} has no reference")
        architecture, configuration, entries = build[self.kind]
        known = configuration().to_dict() | dict.fromkeys(configuration.attribute_map)
        known |= dict.fromkeys(("rope_theta", "rope_scaling", "head_dim", "partial_rotary_factor"))
        stated = self._effective(entries(), known)
        try:
            config = configuration(**stated, attn_implementation="sdpa")
            module = architecture(config).eval()
        except Exception as error:  # whatever transformers finds wrong with it
            raise UnclearError(f"transformers: {error}") from error
        tied = bool(stated.get("tie_word_embeddings", False))
        state = self._tensors(module, tied)
        try:
            module.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise UnclearError(f"torch: {' '.join(str(error).split())}") from error
        return module

    def _effective(self, stated: Entries, known: Mapping[str, Any]) -> Entries:
        """Entries for transformers' config, those without effect left out."""
        found = {}
        for name, value in stated.items():
            idle = name in _IDLE or name.endswith(_IDLE_ENDS) or name.startswith("_")
            shared = name == "num_key_value_heads"  # null is as many as there are queries'
            if (value is None and not shared) or idle:
                continue
            if name in ("sliding_window", "layer_types"):  # an explicit mask hides what they do
                windows = "use_sliding_window" in stated and not stated["use_sliding_window"]
                plain = (
                    all(kind == "full_attention" for kind in value)
                    if (name == "layer_types" and isinstance(value, list))
                    else value in NOTHING or windows
                )
                if not plain:
                    raise UnclearError(
                        f"{name} = {value!r} says that attention does not reach everywhere"
                    )
                continue
            if name in ONLY and not (name in _OF_MIXTURES and self.kind == "sdar"):
                if value not in (ONLY[name] or NOTHING):
                    raise UnclearError(f"{name} = {value!r} selects something else")
                continue
            if name in _QK_NORM:
                if bool(value) is not (
                    self.kind in ("sdar", "sdar_moe", "a2d-qwen3", "llada2_moe")
                ):
                    raise UnclearError(f"{name} = {value!r} is not what the module does")
                if name in known:
                    found[name] = value
                continue
            if name in _ACTIVATIONS:
                found["hidden_act"] = value
            elif name in ("attention_bias", "qkv_bias") and is_qwen2(self.kind) and value in (0, 1):
                continue  # it always has them, on queries, keys and values: parameters say so
            elif name in _BLOCKS:
                if not self._in_blocks() and self.kind != "llada":
                    raise UnclearError(f"{name} = {value!r}: the family has no blocks")
                continue  # logits are asked for with blocks of a given size
            elif name in ("rope_scaling", "rope_parameters"):
                if value not in NOTHING:
                    found[name] = of_all_layers(name, value)
            elif name in _OF_MIXTURES and self.kind == "sdar":
                continue  # dense, as its parameters' names say; sdar_moe is the mixture
            elif name in known:  # 0 is false to JSON's readers, and not to transformers' checks
                found[name] = (
                    bool(value) if type(known[name]) is bool and value in (0, 1) else value
                )
            elif value not in NOTHING:
                raise UnclearError(f"nobody knows what {name} = {value!r} does")
        return found

    def _same(self) -> Entries:
        """Llama's and Qwen's own names. Untied unless stated, as checkpoints of both are."""
        return {"tie_word_embeddings": False, **self.config}

    def _llada(self) -> Entries:
        """LLaDA's names in Llama's words."""
        config = dict(self.config)
        tied = config.pop("weight_tying", None)
        config.pop("tie_word_embeddings", None)  # the official code reads the other
        rows = config.pop("embedding_size", None) or config.pop("vocab_size", None)
        config.pop("vocab_size", None)
        for name, only in (
            ("block_type", ("llama",)),
            ("block_group_size", (1,)),
            ("layer_norm_with_affine", (True,)),
        ):
            if config.pop(name, None) not in (None, *only):
                raise UnclearError(f"{name} selects something else")
        shared = config.pop("multi_query_attention", None)
        if config.get("n_kv_heads") is None:
            config["n_kv_heads"] = 1 if shared else config.get("n_heads")
        ratio = config.pop("mlp_ratio", None)
        if config.get("mlp_hidden_size") is None and ratio is not None:
            config["mlp_hidden_size"] = int(ratio * config["d_model"])
        found = {_LLADA.get(name, name): v for name, v in config.items() if v is not None}
        for name, theirs in _LLADA.items():
            if name in config and config.get(theirs) not in (None, config[name]):
                raise UnclearError(f"{theirs} contradicts {name}")
        return {**found, "vocab_size": rows, "tie_word_embeddings": bool(tied)}

    def _llada2(self) -> Entries:
        """LLaDA2's names in GLM's words."""
        config = dict(self.config)
        for name, only in (
            ("score_function", ("sigmoid",)),
            ("topk_method", ("noaux_tc",)),
            ("moe_router_enable_expert_bias", (True,)),
        ):
            if config.pop(name, None) not in (None, *only):
                raise UnclearError(f"{name} selects something else")
        return {
            "tie_word_embeddings": False,
            **{k: v for k, v in config.items() if k not in ("num_experts", "num_shared_experts")},
            "n_routed_experts": config["num_experts"],
            "n_shared_experts": config["num_shared_experts"],
            "norm_topk_prob": config.get("norm_topk_prob", True),
            "use_qk_norm": config.get("use_qk_norm", True),
        }

    def _tensors(self, module: Any, tied: bool) -> dict[str, Tensor]:
        """Stored tensors under the module's names, in float32."""
        whole = self.folder / "model.safetensors"
        files = [whole] if whole.exists() else sorted(self._shards())
        stored: dict[str, Tensor] = {}
        for file in files:
            stored |= load_file(file)
        if any(not tensor.is_floating_point() for tensor in stored.values()):
            raise UnclearError("a tensor holds no floating-point numbers")
        found = {name: tensor.float() for name, tensor in stored.items()}
        if self.kind == "llada2_moe":
            found = self._unfused(renamed(found, _LLADA2_NAMES))
        elif self.kind == "sdar_moe":
            found = self._unfused(found)
        elif self.kind == "llada":
            found = renamed(found, _LLADA_NAMES)
        # As transformers does: a module without its head is saved without the word before.
        found = renamed(found, ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),))
        if tied:
            embedding = found["model.embed_tokens.weight"]
            head = found.setdefault("lm_head.weight", embedding)
            if head is not embedding and not torch.equal(head, embedding):
                # transformers 5 does not tie what is stored apart, and says so
                module.lm_head.weight = torch.nn.Parameter(torch.empty_like(head))
        return found

    def _shards(self) -> set[Path]:
        index = json.loads((self.folder / "model.safetensors.index.json").read_text())
        return {self.folder / name for name in index["weight_map"].values()}

    def _unfused(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every layer's experts together, and LLaDA2's queries, keys and values apart."""
        config, found = self.config, {}
        experts: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, tensor in stored.items():
            if match := re.fullmatch(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)_proj\.weight", name):
                experts.setdefault((match[1], int(match[2])), {})[match[3]] = tensor
            elif name.endswith(".attention.query_key_value.weight"):
                rows = [
                    config[key] * config["head_dim"]
                    for key in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
                ]
                if sum(rows) != len(tensor):
                    raise UnclearError(f"{name} has {len(tensor)} rows, {rows} expected")
                for letter, part in zip("qkv", tensor.split(rows), strict=True):
                    place = name.removesuffix(".attention.query_key_value.weight")
                    found[f"{place}.self_attn.{letter}_proj.weight"] = part
            else:
                found[name] = tensor
        for layer in {layer for layer, _ in experts}:
            some = [experts.get((layer, k)) for k in range(config["num_experts"])]
            if None in some or len(some) != sum(place == layer for place, _ in experts):
                raise UnclearError(f"{layer} has other experts than those of the config")
            gates = [torch.cat((one["gate"], one["up"])) for one in some if one]
            found[f"{layer}.experts.gate_up_proj"] = torch.stack(gates)
            found[f"{layer}.experts.down_proj"] = torch.stack([one["down"] for one in some if one])
        return found


def renamed(stored: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Tensors under other names, two of which must not become one."""
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        new = name
        for pattern, words in rules:
            new = re.sub(pattern, words, new)
        if new in found:
            raise UnclearError(f"{name} and another tensor are both {new}")
        found[new] = tensor
    return found


def of_all_layers(name: str, value: Any) -> Any:
    """RoPE parameters without nulls, which say nothing, and without layer types, all alike."""
    if not isinstance(value, dict):
        raise UnclearError(f"{name} = {value!r} is no object")
    if any(isinstance(part, dict) for part in value.values()):
        first = value.get("full_attention")
        if first is None or any(part != first for part in value.values()):
            raise UnclearError(f"{name} differs between layers")
        value = first
    return {key: part for key, part in value.items() if part is not None}


def is_qwen2(kind: str) -> bool:
    """Whether a model type is computed by Qwen2's module."""
    return kind in ("Dream", "Fast_dLLM_Qwen", "a2d-qwen2")
