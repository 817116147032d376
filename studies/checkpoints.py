"""Whole checkpoints of every family as files in memory: what `fuzz_checkpoints.py` starts from."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fuzz import write
from safetensors.torch import load, save

from spiffy.runtime import ALIASES

Json = Any
# A file's content, or what is there instead of a file.
Content = bytes | str
Files = dict[str, Content]

PARITY = Path(__file__).parent.parent / "tests" / "parity"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@cache
def bases() -> dict[str, Files]:
    """Whole checkpoints by name: random weights with a small tokenizer, in one file or in two."""
    found: dict[str, Files] = {}
    for folder in sorted(PARITY.iterdir()):
        files: Files = {
            name: (folder / name).read_bytes()
            for name in ("config.json", "generation_config.json", WEIGHTS)
            if (folder / name).is_file()
        }
        files.setdefault("generation_config.json", b'{"eos_token_id": 3, "do_sample": false}')
        found[folder.name] = files | small_tokenizer()
    # A2D of Qwen2 has Dream's parameters.
    dream = json.loads(found["dream-a"]["config.json"]) | {"model_type": "a2d-qwen2"}
    found["a2d-mdlm-b"] = found["dream-a"] | {"config.json": json.dumps(dream).encode()}
    found["dream-b"] = in_two_files(found["dream-a"])
    found["sdar-moe-a"] = found["sdar-a"] | mixture(found["sdar-a"])
    found |= {f"{name}-shards": in_shards(files) for name, files in found.items()}
    for name in ("tiny-llada", "tiny-dream", "tiny-sdar", "tiny-llada2"):
        found[name] = {file.name: file.read_bytes() for file in Path(ALIASES[name]).iterdir()}
    return found


def mixture(dense: Files) -> Files:
    """SDAR's mixture: random experts in the place of its MLPs, in all layers but the first."""
    config = json.loads(dense["config.json"]) | {
        **{"model_type": "sdar_moe", "num_experts": 6, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 24, "norm_topk_prob": True, "decoder_sparse_step": 1},
        "mlp_only_layers": [0],
    }
    stored = load(as_bytes(dense[WEIGHTS]))
    moe = (".layers.1.mlp.", ".layers.2.mlp.")
    weights = {name: value for name, value in stored.items() if not any(p in name for p in moe)}
    noise = torch.Generator().manual_seed(0)
    for place in (f"model{part}" for part in moe):
        weights[f"{place}gate.weight"] = torch.randn(6, 64, generator=noise)
        for expert in range(6):
            for matrix, shape in (("gate", (24, 64)), ("up", (24, 64)), ("down", (64, 24))):
                value = 0.2 * torch.randn(shape, generator=noise)
                weights[f"{place}experts.{expert}.{matrix}_proj.weight"] = value
    return {"config.json": json.dumps(config).encode(), WEIGHTS: save(weights, {"format": "pt"})}


def small_tokenizer() -> Files:
    """The shipped tokenizer, cut down to the vocabulary of the random-weight checkpoints."""
    folder = Path(ALIASES["tiny-llada"])
    content = json.loads((folder / "tokenizer.json").read_text())
    model = content["model"]
    model["vocab"] = {token: k for token, k in model["vocab"].items() if k < 240}
    kept = model["vocab"]
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= kept.keys()]
    return {
        "tokenizer.json": json.dumps(content).encode(),
        "tokenizer_config.json": (folder / "tokenizer_config.json").read_bytes(),
        "special_tokens_map.json": b'{"eos_token": {"content": "<|endoftext|>", "lstrip": false}}',
    }


def in_two_files(files: Files) -> Files:
    """The same checkpoint with its tokenizer in the files that Dream's have."""
    content = json.loads(files["tokenizer.json"])
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    kept = {name: raw for name, raw in files.items() if name != "tokenizer.json"}
    return kept | {
        "vocab.json": json.dumps(content["model"]["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges]).encode(),
        "added_tokens.json": json.dumps(added).encode(),
    }


def in_shards(files: Files) -> Files:
    """The same checkpoint with its weights in two files and an index."""
    header, data = parts(files[WEIGHTS])
    names = [name for name in header if name != "__metadata__"]
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    where = {name: file for file, some in halves.items() for name in some}
    shards: Files = {INDEX: json.dumps({"metadata": {}, "weight_map": where}).encode()}
    for file, some in halves.items():
        at, inside, pieces = 0, {}, []
        for name in some:
            start, stop = header[name]["data_offsets"]
            inside[name] = header[name] | {"data_offsets": [at, at + stop - start]}
            pieces.append(data[start:stop])
            at += stop - start
        shards[file] = joined(inside, b"".join(pieces))
    return {name: content for name, content in files.items() if name != WEIGHTS} | shards


def parts(weights: Content) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    assert isinstance(weights, bytes)
    size = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def joined(header: Json, data: bytes) -> bytes:
    """A safetensors file of a header, which may be wrong, and data."""
    text = write(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def as_bytes(content: Content) -> bytes:
    """The content of what is a file."""
    assert isinstance(content, bytes)
    return content
