"""From tiny-sdar to a small mixture of experts in LLaDA2's official layout.

The feed-forward network of every layer but the first is dealt out: the neurons that work most go
to the shared experts, the others to routed ones, by which of them work together. Half of each
head's rotary pairs, every second frequency, go on turning; the others stop, as LLaDA2's do.
"""

from collections.abc import Mapping
from typing import Any

import torch
from corpus import EOS_ID, MASK_ID
from masking import BLOCK_LENGTHS
from torch import Tensor, nn

from spiffy.runtime.models.llada2 import LLADA2

EXPERTS, GROUPS, KEPT_GROUPS, TOP, WIDTH, SHARED = 12, 4, 2, 4, 32, 4
SCALING = 2.5
_RIDGE = 1.0
_BALANCE = 1e-3  # step of an expert's bias towards equal loads


def mixture_config(sdar: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture's config, in the official layout."""
    rotary = sdar["head_dim"] // 2
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "block_size": BLOCK_LENGTHS[0],
        "embedding_dropout": 0.0,
        "eos_token_id": EOS_ID,
        "first_k_dense_replace": 1,
        "head_dim": sdar["head_dim"],
        "hidden_act": "silu",
        "hidden_size": sdar["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": sdar["intermediate_size"],
        "mask_token_id": MASK_ID,
        "max_position_embeddings": sdar["max_position_embeddings"],
        "max_window_layers": sdar["num_hidden_layers"],
        "model_type": "llada2_moe",
        "moe_intermediate_size": WIDTH,
        "n_group": GROUPS,
        "norm_topk_prob": True,
        "num_attention_heads": sdar["num_attention_heads"],
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP,
        "num_hidden_layers": sdar["num_hidden_layers"],
        "num_key_value_heads": sdar["num_key_value_heads"],
        "num_shared_experts": SHARED,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "pad_token_id": EOS_ID,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": sdar["rms_norm_eps"],
        "rope_scaling": None,
        "rope_theta": sdar["rope_theta"],
        "rotary_dim": rotary,
        "routed_scaling_factor": SCALING,
        "score_function": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": True,
        "topk_group": KEPT_GROUPS,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_sliding_window": False,
        "vocab_size": sdar["vocab_size"],
    }


@torch.no_grad()
def start_from_sdar(dense: Any, sdar: Mapping[str, Any], ids: Tensor, seen: Tensor) -> nn.Module:
    """Build the mixture from a trained SDAR module.

    Parameters
    ----------
    ids, seen
        int64 [batch, length] and the attention mask: tokens on which the neurons are watched.
    """
    architecture, module_config = LLADA2.architecture(mixture_config(sdar))
    module: Any = architecture(module_config)
    inputs: dict[int, Tensor] = {}

    def watch(number: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[number] = arguments[0].flatten(0, 1)

        return hook

    handles = [
        layer.mlp.register_forward_pre_hook(watch(k)) for k, layer in enumerate(dense.model.layers)
    ]
    dense.model(input_ids=ids, attention_mask=seen, use_cache=False)
    for handle in handles:
        handle.remove()

    weights = dense.state_dict()
    order = _rotary_order(sdar["head_dim"])
    for name in list(weights):
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = weights[name][order]
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = weights[name].unflatten(0, (-1, sdar["head_dim"]))
            weights[name] = heads[:, order].flatten(0, 1)
    for number in range(1, len(dense.model.layers)):
        mlp = f"model.layers.{number}.mlp."
        parts = [weights.pop(f"{mlp}{part}_proj.weight") for part in ("gate", "up", "down")]
        weights |= {mlp + name: value for name, value in _dealt(*parts, inputs[number]).items()}
    report = module.load_state_dict(weights, strict=False)
    fresh = [key for key in report.missing_keys if "e_score_correction_bias" not in key]
    if fresh or report.unexpected_keys:
        raise ValueError(f"weights do not fit: {fresh} {report.unexpected_keys}")
    for layer in module.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(_balance)
    return module


def _balance(router: nn.Module, _: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    """Move experts' biases towards equal loads, without a loss of its own (DeepSeek-V3)."""
    if torch.is_grad_enabled():
        bias: Any = router.e_score_correction_bias
        load = outputs[2].flatten().bincount(minlength=EXPERTS).float()
        bias += _BALANCE * (load.mean() - load).sign()


def _rotary_order(head_dim: int) -> Tensor:
    """Dimensions of a head: those of every second rotary pair, then the others.

    Pair k turns at theta^(-2k/dim); half as many pairs of half the dimensions turn at every second
    of these speeds.
    """
    pairs = torch.arange(head_dim // 2)
    turning, still = pairs[::2], pairs[1::2]
    return torch.cat([turning, turning + len(pairs), still, still + len(pairs)])


def _dealt(gate: Tensor, up: Tensor, down: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """A feed-forward network [width, hidden] as shared and routed experts."""
    active = nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
    effect = active.abs() * down.norm(dim=0)
    ranked = effect.mean(0).argsort(descending=True)
    shared, rest = ranked[: SHARED * WIDTH], ranked[SHARED * WIDTH :].tolist()
    alike = torch.corrcoef(effect.T).nan_to_num()
    experts = []
    for _ in range(EXPERTS):  # the strongest neuron left, and those that work when it does
        near = sorted(rest, key=lambda k: -float(alike[rest[0], k]))[:WIDTH]
        experts.append(torch.tensor(near))
        rest = [k for k in rest if k not in near]
    loads = torch.stack([effect[:, chosen].sum(1) for chosen in experts], 1)
    loads = (loads - loads.mean(0)) / loads.std(0)
    square = inputs.T @ inputs + _RIDGE * torch.eye(inputs.shape[1])
    return {
        "gate.weight": torch.linalg.solve(square, inputs.T @ loads).T.contiguous(),
        "experts.gate_up_proj": torch.stack([torch.cat((gate[k], up[k])) for k in experts]),
        "experts.down_proj": torch.stack([down[:, k] for k in experts]) * TOP / SCALING,
        "shared_experts.gate_proj.weight": gate[shared],
        "shared_experts.up_proj.weight": up[shared],
        "shared_experts.down_proj.weight": down[:, shared].contiguous(),
    }


def official_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's parameters under the names, and in the pieces, of official checkpoints."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith("experts.gate_up_proj"):
            for number, both in enumerate(value):
                place = name.replace("gate_up_proj", f"{number}.")
                found[f"{place}gate_proj.weight"], found[f"{place}up_proj.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            for number, down in enumerate(value):
                found[name.replace("down_proj", f"{number}.down_proj.weight")] = down
        elif name.endswith("q_proj.weight"):
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused = name.replace("self_attn.q_proj", "attention.query_key_value")
            found[fused] = torch.cat(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            for ours, theirs in _OFFICIAL.items():
                name = name.replace(ours, theirs)
            found[name] = value
    return found


_OFFICIAL = {
    "model.embed_tokens.": "model.word_embeddings.",
    ".self_attn.o_proj.": ".attention.dense.",
    ".self_attn.q_norm.": ".attention.query_layernorm.",
    ".self_attn.k_norm.": ".attention.key_layernorm.",
    ".gate.e_score_correction_bias": ".gate.expert_bias",
}
