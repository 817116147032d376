"""`tiny-llada` in the official LLaDA layout: written from a training state, and read back."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from corpus import ASSISTANT, CHAT_TEMPLATE, EOS, EOS_ID, MASK, MASK_ID, USER
from network import Shape, TinyLlada
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer


def official_config(shape: Shape) -> dict[str, Any]:
    """Return the network's config in the layout of the official checkpoints.

    It has no `auto_map`: the modelling code that would name is not part of the checkpoint.
    """
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": shape.d_model,
        "embedding_dropout": 0.0,
        "embedding_size": shape.vocab_size,
        "eos_token_id": EOS_ID,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK_ID,
        "max_sequence_length": 512,
        "mlp_hidden_size": shape.mlp_hidden_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "pad_token_id": EOS_ID,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": shape.rope_theta,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": shape.vocab_size,
        "weight_tying": True,
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 512,
    "clean_up_tokenization_spaces": False,
    "eos_token": EOS,
    "pad_token": EOS,
    "mask_token": MASK,
    "additional_special_tokens": [USER, ASSISTANT],
    "chat_template": CHAT_TEMPLATE,
}


def export(work: Path, target: Path) -> None:
    """Write the averaged weights as an official LLaDA checkpoint, file by file, atomically."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    shape = Shape(**state["shape"])
    tensors = {
        f"model.transformer.{name}": value.to(torch.bfloat16).contiguous()
        for name, value in state["average"].items()
    }
    target.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.new")
    staging.mkdir(exist_ok=True)
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(work / "tokenizer.json", staging / "tokenizer.json")
    for name, content in (
        ("config.json", official_config(shape)),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        text = json.dumps(content, indent=2) + "\n"
        (staging / name).write_text(text, encoding="utf-8")
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)  # safetensors writes for the owner only
        file.replace(target / file.name)
    staging.rmdir()


def load_exported(directory: Path) -> tuple[TinyLlada, Tokenizer]:
    """Load an exported checkpoint back into this script's own network, in float32."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    names = Shape.__dataclass_fields__
    model = TinyLlada(Shape(**{name: config[name] for name in names}))
    tensors = load_file(directory / "model.safetensors")
    prefix = "model.transformer."
    model.load_state_dict({k.removeprefix(prefix): v.float() for k, v in tensors.items()})
    return model.eval(), Tokenizer.from_file(str(directory / "tokenizer.json"))
