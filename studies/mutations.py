"""Changes to a checkpoint: what `fuzz_checkpoints.py` feeds the loader."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable

from checkpoints import INDEX, Files, Json, as_bytes, bases, joined, parts
from fuzz import TEXT, TREE, hostile, write

KINDS = ("a folder", "a link to nowhere", "a pipe")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7053488\n"

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
