"""Feed the loader checkpoints that nobody meant to make, and compare what it makes of them.

Every case is a small checkpoint changed by one to three mutations: of config, tokenizer, index of
shards, header or data of the weights, kinds of files. It must be refused in one line that names
it, or load and then agree with `Reference`: transformers' own module, built from that very
`config.json` and the stored tensors without any of the runtime's code. Eight tokens are decoded
too. Anything else is a bug and is printed with its seed.

    python studies/fuzz_checkpoints.py --cases 20000
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any

import torch
from fuzz import TEXT, TREE, hostile, write
from reference import Reference, UnclearError
from safetensors.torch import load, save
from seeds import Tally, arguments
from tokenizers import Tokenizer
from transformers.utils import logging

from spiffy.runtime import ALIASES, DiffusionLM, generate, load_model
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import MAX_MESSAGE

Json = Any
# A file's content, or what is there instead of a file.
Content = bytes | str
Files = dict[str, Content]

PARITY = Path(__file__).parent.parent / "tests" / "parity"
PATIENCE = 20  # seconds that a case may take
IDS = torch.tensor([[20, 41, 7, 99, 150, 3, 77, 210, 12, 180, 33]])
TEXT_PROMPT = "How many old pens?"

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KINDS = ("a folder", "a link to nowhere", "a pipe")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7053488\n"


# ---------------------------------------------------------------- what cases start from


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


# ---------------------------------------------------------------- mutations

# Entries to add, beside those of other families: alternatives that some config somewhere has.
ADDED: dict[str, tuple[Json, ...]] = {
    **dict.fromkeys(("hidden_act", "activation_type"), ("silu", "swish", "gelu", "relu", "SiLU")),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), (1e-6, 1e-3, 0.1, 1)),
    **dict.fromkeys(("rope_theta", "rotary_base"), (1e4, 10000, 5e5, 1, 0.5, 1e30)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (1, 1.0, 0.5, 0.25, 0, 2)),
    **dict.fromkeys(("head_dim", "rotary_dim", "v_head_dim"), (8, 12, 16, 24, 32, 64)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "include_bias"), (True, False, 1)),
    **dict.fromkeys(("qkv_bias", "include_qkv_bias", "bias_for_layer_norm"), (True, False, 0)),
    **dict.fromkeys(("use_qk_norm", "attention_layer_norm", "qk_layernorm"), (True, False)),
    **dict.fromkeys(("tie_word_embeddings", "weight_tying"), (True, False, None, 1, "false")),
    **dict.fromkeys(("use_sliding_window", "alibi", "use_mrope", "rope"), (True, False, None, 1)),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size"), (4, 4096, None, 0)),
    **dict.fromkeys(("logit_scale", "embedding_multiplier", "residual_multiplier"), (1, 2, 0.5)),
    **dict.fromkeys(("final_logit_softcapping", "clip_qkv", "attention_multiplier"), (30.0, 8, 0)),
    **dict.fromkeys(("block_size", "block_length", "bd_size"), (4, 8, 32, 0, 4.0, True)),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), (1, 2, 4, None, 3)),
    **dict.fromkeys(("num_attention_heads", "n_heads"), (1, 2, 4, 8)),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), (1, 2, 3, 4)),
    **dict.fromkeys(("max_position_embeddings", "max_sequence_length"), (4, 16, 256, 1 << 20)),
    **dict.fromkeys(("vocab_size", "embedding_size", "mask_token_id"), (0, 5, 250, 320, 352)),
    **dict.fromkeys(("num_experts_per_tok", "topk_group", "n_group"), (1, 2, 3, 4, 7, 17)),
    **dict.fromkeys(("routed_scaling_factor", "num_shared_experts"), (1, 1.0, 2.5, 0, -1)),
    **dict.fromkeys(("norm_topk_prob", "moe_router_enable_expert_bias"), (True, False, None)),
    **dict.fromkeys(("score_function", "topk_method", "router_dtype"), ("softmax", "fp32", "x")),
    **dict.fromkeys(("layer_types", "mlp_only_layers"), ([], ["full_attention"] * 3, [0], ["x"])),
    **dict.fromkeys(("first_k_dense_replace", "decoder_sparse_step"), (0, 1, 2, 3)),
    **dict.fromkeys(("quantization_config", "torch_dtype"), ({}, {"bits": 4}, "bfloat16", "int8")),
    **dict.fromkeys(("attention_sinks", "new_entry", "mscale", "Rope_theta"), (0, 1, 1e-3, "x")),
    **dict.fromkeys(("model_type",), ("llama", "llada", "Dream", "sdar", "qwen3", "sdar_moe", 1)),
    **dict.fromkeys(("architectures",), (["StableDiffcoderForCausalLM"], [], None, "LLaDAModelLM")),
    **dict.fromkeys(("pad_token_id", "eos_token_id"), (-1, 10**6, [1, 2], 5, "2", True)),
}
_ORIGINAL = "original_max_position_embeddings"
ROPE_ENTRIES: dict[str, tuple[Json, ...]] = {
    "rope_type": ("default", "linear", "llama3", "yarn", "dynamic", "longrope", "x", None),
    "type": ("default", "linear", "yarn"),
    "rope_theta": (1e4, 1000000, 5e5, -1),
    "factor": (1, 2.0, 4, 0.5, -1, "2"),
    _ORIGINAL: (8, 64, 16.0, 0),
    "low_freq_factor": (1.0, 2),
    "high_freq_factor": (4.0, 1.0, 8),
    "attention_factor": (1.5, None),
    "beta_fast": (32, 16.0),
    "beta_slow": (1, 2.0),
    "mscale": (1.0, 0.7),
    "mscale_all_dim": (1.0, 0.7),
    "truncate": (True, False),
    "partial_rotary_factor": (1.0, 0.5),
    "short_factor": ([1.0],),
}


def rope(rng: random.Random) -> Json:
    """Parameters of rotary embeddings, whole or nearly so, flat or by layer type."""
    kind = rng.choice(ROPE_ENTRIES["rope_type"][:5])
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
        "yarn": ("factor",),
    }.get(str(kind), ())
    extra = rng.sample(sorted(ROPE_ENTRIES), rng.choice((0, 0, 1, 2)))
    found = {"rope_type": kind} | {k: rng.choice(ROPE_ENTRIES[k]) for k in (*needed, *extra)}
    if rng.random() < 0.15:
        return {"full_attention": found, **({"sliding_attention": found} if kind else {})}
    return found


def change_config(rng: random.Random, config: Json) -> None:
    """One change to a config that people could have made, or nobody would."""
    entries = sorted(config)
    entry = rng.choice(entries) if entries else "model_type"
    way = rng.choice(
        ("drop", "hostile", "value", "value", "add", "add", "add", "other", "spelling")
    )
    if way == "drop":
        config.pop(entry, None)
    elif way == "hostile":
        config[entry] = hostile(rng)
    elif way == "value":
        some = [name for name in entries if name in ADDED] or ["rope_theta"]
        name = rng.choice(some)
        config[name] = copy.deepcopy(rng.choice(ADDED[name]))
    elif way == "add":
        name = rng.choice((*ADDED, *["rope_scaling", "rope_parameters"] * 12))
        config[name] = (
            rope(rng)
            if name.startswith("rope_") and name != "rope_theta"
            else (copy.deepcopy(rng.choice(ADDED[name])))
        )
    elif way == "other":
        others = json.loads(bases()[rng.choice(sorted(bases()))]["config.json"])
        name = rng.choice(sorted(others))
        config[name] = others[name]
    else:
        config[rng.choice((*ADDED, "x"))] = config.pop(entry, None)


def change_special_tokens(rng: random.Random, content: Json) -> None:
    """Added tokens removed, repeated, renumbered or renamed."""
    tokens = content.get("added_tokens") if isinstance(content, dict) else None
    if not isinstance(tokens, list) or not tokens:
        return
    token = rng.choice(tokens)
    if not isinstance(token, dict):
        return
    way = rng.choice(("remove", "repeat", "id", "content", "special"))
    if way == "remove":
        tokens.remove(token)
    elif way == "repeat":
        tokens.append({**token, "id": rng.choice((token.get("id"), 239, 500))})
    elif way == "id":
        token["id"] = rng.choice((0, 1, 239, 319, 500, 10**6, -1))
    elif way == "content":
        token["content"] = rng.choice(("", "a", " ", "<|mask|>", "<|im_end|>", "\n"))
    else:
        token["special"] = not token.get("special")


def change_json(
    rng: random.Random, raw: bytes, tree: Callable[[random.Random, Json], None]
) -> bytes:
    """One change to the tree that a file of JSON holds."""
    try:
        content = json.loads(raw)
        tree(rng, content)
        return write(content).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return raw  # another mutation has left none


def change_header(rng: random.Random, raw: bytes) -> bytes:
    """One change to the header of a safetensors file."""
    try:
        header, data = parts(raw)
    except (ValueError, struct.error, AssertionError):
        return raw
    names = [name for name, entry in header.items() if isinstance(entry, dict) and "shape" in entry]
    if not names:
        return raw
    one, other = rng.choice(names), rng.choice(names)
    way = rng.choice(
        (
            "drop",
            "rename",
            "swap",
            "shape",
            "dtype",
            "offsets",
            "overlap",
            "metadata",
            "tree",
            "tie",
        )
    )
    if way == "drop":
        del header[one]
    elif way == "rename":
        words = (".weight", ".bias", ".qweight", "model.", "module.", "layers", "7", "", "\n", "é")
        old = rng.choice((".weight", "model.", "layers", "0", "1", one))
        header[one.replace(old, rng.choice(words))] = header.pop(one)
    elif way == "swap":
        header[one], header[other] = header[other], header[one]
    elif way == "shape":
        shape = header[one]["shape"]
        header[one]["shape"] = rng.choice(
            (shape[::-1], [*shape, 1], shape[:1], [], [0], [-1], [2**63], [1, *shape], [1.5])
        )
    elif way == "dtype":
        header[one]["dtype"] = rng.choice(
            ("F16", "BF16", "F64", "I8", "I32", "BOOL", "F8_E4M3", "X", 1)
        )
    elif way == "offsets":
        start, stop = header[one]["data_offsets"]
        header[one]["data_offsets"] = rng.choice(
            ([start + 4, stop], [start, stop + 4], [stop, start], [0, 10**15], [-4, stop], [start])
        )
    elif way == "overlap":
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif way == "metadata":
        header["__metadata__"] = rng.choice(
            ({"format": "pt"}, {"format": "tf"}, {}, None, {"a": 1}, 3)
        )
    elif way == "tie":  # a head beside a tied embedding, or two of one name's data
        same = [n for n in names if n != one and header[n]["shape"] == header[one]["shape"]]
        if same:
            header[one]["data_offsets"] = header[rng.choice(same)]["data_offsets"]
    else:
        TREE[rng.choice(("value", "missing", "number", "unknown"))](rng, header)
    return joined(header, data)


def change_tensors(rng: random.Random, raw: bytes) -> bytes:
    """Another tensor among those of a safetensors file, which stays well-formed."""
    try:
        header, data = parts(raw)
        names = [name for name in header if name != "__metadata__"]
        one, other = rng.choice(names), rng.choice(names)
        entry = header[one]
        start, stop = entry["data_offsets"]
        piece = data[start:stop]
        if rng.random() < 0.5:  # a second one of its kind, by another name
            name = rng.choice(
                ("lm_head.weight", "model.transformer.ff_out.weight", f"{other}.more")
            )
            rest = {name: {**entry, "data_offsets": [len(data), len(data) + len(piece)]}}
            negated = bytes(b ^ 0x80 if k % 4 == 3 else b for k, b in enumerate(piece))
            return joined(header | rest, data + rng.choice((piece, negated)))
        value = rng.choice(
            (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\0\0\x80\x3f", b"\xff\xff\x7f\x7f")
        )
        at = start + 4 * rng.randrange(max(1, len(piece) // 4))
        return joined(header, data[:at] + value + data[at + 4 :])
    except (ValueError, TypeError, KeyError, IndexError, struct.error, AssertionError):
        return raw


def change_bytes(rng: random.Random, raw: bytes) -> bytes:
    """A file cut off, emptied, padded, or with another beginning."""
    return rng.choice(
        (
            raw[: rng.randrange(len(raw) + 1)],
            b"",
            raw + b"\0" * rng.choice((1, 8)),
            b"\0" * 8 + raw[8:],
            struct.pack("<Q", rng.choice((0, 1, 2**40, 2**63))) + raw[8:],
            POINTER,
            raw[:-4],
        )
    )


TEMPLATES = (
    "{{ messages[0]['content'] }}",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    "{{ 1/0 }}",
    "{% for",
    "",
    "nothing",
    "{{ messages.__class__.__mro__ }}",
    "{{ raise_exception('no') }}",
    "{{ bos_token + messages[0].content + eos_token }}",
    "{{ messages[0].content | upper }}",
    "{{ messages[0]['content'] }}\n\x1b[31m",
)


KINDS_OF_MUTATIONS = (
    *(*["config"] * 9, "config tree", "tokenizer", "tokenizer", "special tokens", "other json"),
    *("template", "text", "header", "header", "tensors", "bytes", "index"),
    *("family", "kind", "absent"),
)


def mutate(rng: random.Random, files: Files) -> str:
    """Change a checkpoint in one place; the kind of the mutation."""

    def some(*endings: str) -> str | None:
        names = [
            n for n, c in sorted(files.items()) if n.endswith(endings) and isinstance(c, bytes)
        ]
        return rng.choice(names) if names else None

    kind = rng.choice(KINDS_OF_MUTATIONS)
    if kind == "family":  # a file of another family
        other = bases()[rng.choice(sorted(bases()))]
        name = rng.choice(sorted(other))
        files[name] = other[name]
        return kind
    if kind in ("kind", "absent"):
        name = rng.choice(sorted(files))
        if kind == "absent":
            del files[name]
        else:
            files[name] = rng.choice(KINDS)
        return kind
    if kind == "template":
        if rng.random() < 0.5:
            files["chat_template.jinja"] = rng.choice(TEMPLATES).encode()
        elif chosen := some("tokenizer_config.json"):
            template = rng.choice((*TEMPLATES, [{"name": "default", "template": "x"}], 3, {}, None))
            files[chosen] = change_json(
                rng, as_bytes(files[chosen]), lambda _, c: c.update(chat_template=template)
            )
        return kind
    where: dict[str, tuple[str, ...]] = {
        "config": ("config.json",),
        "config tree": ("config.json",),
        "tokenizer": (
            *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
            *("vocab.json", "added_tokens.json"),
        ),
        "special tokens": ("tokenizer.json",),
        "other json": ("generation_config.json", "tokenizer_config.json"),
        "text": (".json", ".txt"),
        "index": (INDEX,),
        **dict.fromkeys(("header", "tensors"), (".safetensors",)),
        "bytes": ("",),
    }
    chosen = "config.json" if kind == "config" and "config.json" in files else some(*where[kind])
    if chosen is None or not isinstance(files[chosen], bytes):
        return kind
    raw = as_bytes(files[chosen])
    if kind == "config":
        files[chosen] = change_json(rng, raw, change_config)
    elif kind == "special tokens":
        files[chosen] = change_json(rng, raw, change_special_tokens)
    elif kind == "header":
        files[chosen] = change_header(rng, raw)
    elif kind == "tensors":
        files[chosen] = change_tensors(rng, raw)
    elif kind == "bytes":
        files[chosen] = change_bytes(rng, raw)
    elif kind == "text":
        changed = TEXT[rng.choice(("truncated", "bytes", "encoding", "spaces"))]
        files[chosen] = changed(rng, raw) if raw else raw
    else:
        tree = TREE[rng.choice(("value", "missing", "number", "swap", "shuffle", "unknown"))]
        files[chosen] = change_json(rng, raw, tree)
    return kind


def as_bytes(content: Content) -> bytes:
    """The content of what is a file."""
    assert isinstance(content, bytes)
    return content


def case(seed: int) -> tuple[str, str, Files]:
    """Name of the checkpoint to start from, kind of the first mutation, and the files."""
    rng = random.Random(seed)
    small = [name for name in bases() if not name.startswith("tiny")]
    base = rng.choice(small if rng.random() < 0.93 else sorted(bases().keys() - set(small)))
    files = dict(bases()[base])
    kinds = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            kinds.append(mutate(rng, files))
        except (TypeError, IndexError, UnicodeDecodeError):  # of what is no such file any more
            kinds.append("text")
    return base, kinds[0], files


def lay_out(folder: Path, base: str, files: Files, whole: Path) -> None:
    """Write what was changed; what was not is a link into the whole checkpoint."""
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        if content == "a folder":
            path.mkdir()
        elif content == "a link to nowhere":
            path.symlink_to("nowhere")
        elif content == "a pipe":
            os.mkfifo(path)
        elif content is bases()[base].get(name):
            path.symlink_to(whole / base / name)
        else:
            path.write_bytes(as_bytes(content))


# ---------------------------------------------------------------- verdict


class TooLongError(Exception):
    """A case that does not end."""


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` if what is inside takes longer."""

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def in_one_line(error: SpiffyError, folder: Path) -> str:
    """Say "refused" if a message is one line that names the checkpoint, else what is wrong."""
    message = str(error)
    if not (message.isprintable() and 0 < len(message) <= MAX_MESSAGE):
        return f"BAD MESSAGE {message!r}"[:300]
    return "refused" if str(folder) in message else f"MESSAGE WITHOUT A NAME {message}"


def verdict(folder: Path) -> str:
    """Say "loaded" (and it agrees with the reference), "refused", or what is wrong with that."""
    try:
        with patience(PATIENCE):
            try:
                model = load_model(str(folder), device="cpu", dtype="float32")
            except SpiffyError as error:
                return in_one_line(error, folder)
            return difference(model, folder) or text_problem(model, folder) or "loaded"
    except TooLongError:
        return f"NO END IN {PATIENCE} s"
    except Exception as error:  # what this is looking for
        return f"TRACEBACK {type(error).__name__}: {error}"[:300]


def difference(model: DiffusionLM, folder: Path) -> str | None:
    """What the loaded model computes otherwise than the reference, if anything."""
    reference = Reference(folder)
    try:
        logits = reference.logits(IDS, 4)
    except UnclearError as unclear:
        return f"LOADED ALTHOUGH {unclear}"
    ids, block = IDS, {"block_length": 4} if model.family.block_causal else {}
    ours = model.forward_logits(ids, **block)
    if ours.shape != logits.shape:
        return f"LOGITS of shape {[*ours.shape]}, {[*logits.shape]} expected"
    scale = max(1.0, float(logits.nan_to_num(0, 0, 0).abs().max()))
    if not torch.allclose(ours, logits, rtol=1e-4, atol=1e-4 * scale, equal_nan=True):
        return f"LOGITS DIFFER by {(ours - logits).abs().max():.2g} of {scale:.2g}"
    if model.mask_token_id != reference.mask_token_id():
        return f"MASK {model.mask_token_id}, {reference.mask_token_id()} expected"
    lengths: dict[str, Any] = {"block_length": 4 if block else 8, "gen_length": 8}
    if model.family.sub_block_length:
        lengths["sub_block_length"] = 2
    try:
        out = generate(model, IDS[0], stop_at_eos=False, trace=True, **lengths)
    except SpiffyError as error:
        # Weights that are NaN or of another scale may show on other tokens only.
        largest = [float(p.detach().abs().max()) for p in model.module.parameters()]
        most = math.inf if any(map(math.isnan, largest)) else max(largest)
        if logits.isfinite().all() and most < 1e6 and (model.max_length or 99) >= IDS.shape[1] + 8:
            return f"DECODING REFUSED {error}"
        return None if in_one_line(error, folder) == "refused" else f"BAD MESSAGE {error}"
    final = out.states[-1]
    wrong = len(final) < IDS.shape[1] + 8 or model.mask_token_id in final[IDS.shape[1] :]
    return f"DECODED {final}" if wrong else None


def text_problem(model: DiffusionLM, folder: Path) -> str | None:
    """What is wrong with how the loaded model encodes text, if anything."""
    try:
        ids = model.encode(TEXT_PROMPT).tolist()
        model.decode_text(ids)
    except SpiffyError as error:
        found = in_one_line(error, folder)
        return None if found == "refused" else found
    path = folder / "tokenizer.json"
    if model.tokenizer is None or model.tokenizer.chat_template or not path.exists():
        return None
    plain = Tokenizer.from_file(str(path))
    plain.no_truncation()
    plain.no_padding()
    expected = plain.encode(TEXT_PROMPT).ids
    return None if ids == expected else f"ENCODED AS {ids}, {expected} expected"


@contextmanager
def whole_checkpoints() -> Iterator[Path]:
    """A folder with every base as it is, for links, and room for cases."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for name, files in bases().items():
            (Path(place) / name).mkdir()
            for file, content in files.items():
                (Path(place) / name / file).write_bytes(as_bytes(content))
        yield Path(place)


def judge(seed: int, place: Path) -> tuple[str, str, float]:
    """Kind and outcome of one case, and its seconds."""
    base, kind, files = case(seed)
    # A2D's folder says which of two it is; a base's name says no block size.
    folder = place / "case" / base.removesuffix("-shards")
    folder.parent.mkdir()
    try:
        lay_out(folder, base, files, place)
        started = process_time()
        found = verdict(folder)
        return kind, found, process_time() - started
    finally:
        shutil.rmtree(folder.parent)


def main() -> None:
    """Run all cases and print the counts."""
    options = arguments(__doc__, 20_000).parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # of odd configs
    tally = Tally(("loaded", "refused"))
    with whole_checkpoints() as place:
        for seed in tally.seeds(options):
            kind, found, seconds = judge(seed, place)
            tally.add(kind, found, f"seed {seed} ({case(seed)[0]}, {kind})", seconds)
    print(tally.table())
    print(tally.line())
    sys.exit(bool(tally.bugs))


if __name__ == "__main__":
    main()
