"""Measure the host memory that loading a checkpoint and a first forward take.

Writes random checkpoints in SDAR's two layouts (dense and mixture of experts), in bfloat16 and in
shards, to a temporary folder; loads them in fresh processes, one per dtype; prints each one's peak
resident memory above that of a process that only imports the libraries, next to the size of the
weights in that dtype. Linux only.

    python studies/load_memory.py --gigabytes 2
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "sdar",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "mask_token_id": 32767,
    "eos_token_id": 0,
    "block_size": 4,
}
MIXTURE = {
    "model_type": "sdar_moe",
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
LAYOUTS: dict[str, dict[str, Any]] = {"dense": CONFIG, "mixture": {**CONFIG, **MIXTURE}}
BYTES = {"bfloat16": 2, "float32": 4}
Shapes = dict[str, tuple[int, ...]]


def mlp_shapes(prefix: str, hidden: int, width: int) -> Shapes:
    """Names and shapes of a gated MLP's matrices."""
    return {
        f"{prefix}.gate_proj": (width, hidden),
        f"{prefix}.up_proj": (width, hidden),
        f"{prefix}.down_proj": (hidden, width),
    }


def layer_shapes(config: dict[str, Any], layer: int) -> Shapes:
    """Names and shapes of one layer's parameters."""
    hidden, head = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: Shapes = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if "num_experts" in config:
        shapes["mlp.gate"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            width = config["moe_intermediate_size"]
            shapes |= mlp_shapes(f"mlp.experts.{expert}", hidden, width)
    else:
        shapes |= mlp_shapes("mlp", hidden, config["intermediate_size"])
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def count(shapes: Shapes) -> int:
    """Number of elements."""
    return sum(math.prod(shape) for shape in shapes.values())


def write(folder: Path, config: dict[str, Any], size: float, shards: int) -> int:
    """Write a checkpoint of about `size` bytes; returns its number of parameters."""
    import torch
    from safetensors.torch import save_file

    shapes: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.norm.weight": (config["hidden_size"],),
        "lm_head.weight": (config["vocab_size"], config["hidden_size"]),
    }
    room = size / BYTES["bfloat16"] - count(shapes)
    layers = max(1, round(room / count(layer_shapes(config, 0))))
    for layer in range(layers):
        shapes |= layer_shapes(config, layer)
    names, index = list(shapes), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        tensors = {name: torch.randn(shapes[name]).bfloat16() * 0.02 for name in part}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return count(shapes)


def peak_bytes() -> int:
    """Largest resident set of this process.

    Not getrusage: its maximum is inherited from the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def child(*arguments: str) -> int:
    """Peak memory of a fresh process that loads, or only imports."""
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout)


def measured(arguments: list[str]) -> None:
    """What runs in a process of its own: load, one forward, print the peak."""
    import torch

    from spiffy.runtime import load_model

    if arguments:
        folder, dtype = arguments
        load_model(folder, device="cpu", dtype=dtype).forward_logits(torch.zeros(1, 8).long())
    print(peak_bytes())


def main() -> None:
    """Measure and print, or be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="Size of each checkpoint.")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        measured(args.child)
        return
    baseline = child()
    print(f"importing the libraries: {baseline / 1e9:.2f} GB")
    for layout, config in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            parameters = write(Path(folder), config, args.gigabytes * 1e9, args.shards)
            for dtype, width in BYTES.items():
                weights = parameters * width
                extra = child(folder, dtype) - baseline
                print(
                    f"{layout}, bfloat16 loaded in {dtype}: weights {weights / 1e9:.2f} GB, "
                    f"peak above the import {extra / 1e9:.2f} GB ({extra / weights:.2f}x)"
                )


if __name__ == "__main__":
    main()
