"""Real sizes without real weights: a trained tiny model in the shape of a large one.

What drafts gain depends on how often they come true, which takes a trained model, and on what a
forward costs, which takes a large one. `grow` gives a small model the sizes of a large one *without
changing its function*: every forward then costs what the large model's costs, and decodes the small
model's tokens by the small model's states. What differs from a real large model: its acceptance is
the small model's, and most of its weights are zero (a GPU that draws less power for zeros may clock
a little higher).

Why the function stays, for a hidden size d grown to D:

- The residual stream is padded with zeros. Its mean square shrinks by d/D, which RMSNorm's weight
  takes back (times sqrt(d/D)), and RMSNorm's eps with it; new layers add zero to it.
- Attention heads are padded likewise. Their smaller scale 1/sqrt(head_dim) is taken back in the
  query weights; where queries and keys are normalised per head (Qwen3) it cancels against the
  smaller mean square. Rotary pair j of a small head goes to the pair of the wide head that turns
  with the same frequency.
- The stream is also scaled by a power of two, and one spare dimension of it holds a constant, which
  no layer reads or writes. Together they make up for there being one eps in a config, while the
  stream and the heads need different ones.
- Added tokens have logits far below all others, for every input: their output rows read only the
  spare dimension, with a weight that makes up for the longest residual that the small model's
  weights allow.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spiffy.runtime import DiffusionLM
from spiffy.runtime.models.fields import head_dim
from spiffy.schemas import DraftGraph, SpiffyError

#: What the largest logit of an added token is below the smallest of a real one, at least: its
#: probability is then zero even in float64.
_GAP = 800.0
#: Weight of added tokens on the spare dimension. So large that, where the head is tied to the
#: embedding, the constant in the rows of real tokens is nothing beside it.
_DOWN = 2.0**60


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes
    ----------
    tied
        Whether the output head is the embedding matrix. It costs a forward the same; what differs
        is memory.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, model: DiffusionLM) -> Shape:
        """Sizes of a loaded model."""
        config: Any = model.module.config
        return cls(
            model.name,
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim(config),
            config.intermediate_size,
            config.vocab_size,
            config.tie_word_embeddings,
        )


_SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "feed_forward", "vocabulary")


def _shape(name: str, sizes: str, *, tied: bool) -> Shape:
    values = dict(zip(_SIZES, map(int, sizes.split()), strict=True))
    return Shape(name, **values, tied=tied)


#: Layers, hidden size, heads, key-value heads, head size, feed-forward size and vocabulary by the
#: published configs. "0.3b" is nobody's: made up below Qwen3-0.6B, for machines with little memory.
SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        _shape("0.3b", "20 768 12 6 128 2304 151936", tied=True),
        _shape("qwen3-0.6b", "28 1024 16 8 128 3072 151936", tied=True),
        _shape("qwen3-1.7b", "28 2048 16 8 128 6144 151936", tied=True),
        _shape("qwen3-4b", "36 2560 32 8 128 9728 151936", tied=True),
        _shape("sdar-4b", "36 2560 32 8 128 9728 151936", tied=False),
        _shape("qwen3-8b", "36 4096 32 8 128 12288 151936", tied=False),
        _shape("sdar-8b", "36 4096 32 8 128 12288 151936", tied=False),
        _shape("llada-8b", "32 4096 32 32 128 12288 126464", tied=False),
        _shape("dream-7b", "28 3584 28 4 128 18944 152064", tied=False),
    )
}

# What a module's parameters are indexed by, for Llama, Qwen2 and Qwen3 alike.
_AXES: Mapping[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("vocabulary", "hidden"),
    "lm_head.weight": ("vocabulary", "hidden"),
    "norm.weight": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "q_proj.weight": ("queries", "hidden"),
    "q_proj.bias": ("queries",),
    "k_proj.weight": ("keys", "hidden"),
    "k_proj.bias": ("keys",),
    "v_proj.weight": ("keys", "hidden"),
    "v_proj.bias": ("keys",),
    "q_norm.weight": ("head",),
    "k_norm.weight": ("head",),
    "o_proj.weight": ("hidden", "queries"),
    "o_proj.bias": ("hidden",),
    "gate_proj.weight": ("features", "hidden"),
    "up_proj.weight": ("features", "hidden"),
    "down_proj.weight": ("hidden", "features"),
}
# Of added layers: these make what goes nowhere, as the two projections behind them are zero.
_RANDOM = frozenset(f"{m}_proj.weight" for m in ("q", "k", "v", "gate", "up"))
_ONES = frozenset(kind for kind in _AXES if "norm" in kind)


@torch.no_grad()
def grow(model: DiffusionLM, shape: Shape | str) -> DiffusionLM:
    """The same function in a larger shape, with the device and dtype of `model`.

    Tokenizer, mask and end tokens, family and length limit stay; so does `config`, but for sizes
    (`module.config` has them). The fingerprint is another one, because costs are remembered by it:
    `grow_graph` makes a draft graph of `model` one of the grown model. Both decode the same tokens
    by the same states.

    Memory: the grown model's, and little more; nothing is held twice.

    Parameters
    ----------
    shape
        A `Shape`, or the name of one in `SHAPES`.

    Raises
    ------
    SpiffyError
        If the shape is unknown, smaller than the model, or does not hold it: its head size must be
        a multiple, its key-value heads must serve as many heads each, and a larger vocabulary takes
        a larger hidden size.
    """
    shape = shape_named(shape) if isinstance(shape, str) else shape
    module = blank(model, shape)
    growth = _Growth.of(model, shape)
    small = model.module.state_dict()
    generator = torch.Generator(model.device).manual_seed(0)
    grown = {
        name: growth.parameter(name, small.get(name), like.shape, generator)
        for name, like in module.named_parameters()
    }
    module.load_state_dict(grown, assign=True, strict=False)  # tied: the head has no entry
    module.tie_weights()
    rotary = type(module.model.rotary_emb)  # its buffers are computed when it is made
    module.model.rotary_emb = rotary(config=module.config).to(model.device)
    config = dict(model.config)
    if model.family.block_causal:  # the name of a variant may be all that states its block size
        config["block_size"] = model.default_block_length
    return DiffusionLM(
        module,
        model.family,
        config,
        name=f"{model.name} grown to {shape.name}",
        revision=model.revision,
        fingerprint=hashlib.sha256(f"{model.fingerprint} {shape}".encode()).hexdigest()[:32],
        tokenizer=model.tokenizer,
        eos_token_ids=model.eos_token_ids,
    )


def grow_graph(
    graph: DraftGraph, model: DiffusionLM, grown: DiffusionLM, any_model: bool = False
) -> DraftGraph:
    """A draft graph of `model` as one of the model grown from it.

    Nodes, acceptance model and expected steps hold as they are: tokens keep their ids, and what is
    decoded stays the same. Costs do not hold.

    Raises
    ------
    SpiffyError
        If the graph does not belong to `model`, or with `any_model` not to its family.
    """
    graph.check_fits(model.family.name, model.fingerprint, model.vocab_size, any_model)
    record = graph.model.model_copy(
        update={
            "id": grown.name,
            "fingerprint": grown.fingerprint,
            "vocab_size": grown.vocab_size,
        }
    )
    return graph.model_copy(update={"model": record, "cost_profiles": ()})


def shape_named(name: str) -> Shape:
    """Look up one of `SHAPES`.

    Raises
    ------
    SpiffyError
        If there is none of that name.
    """
    if name not in SHAPES:
        raise SpiffyError(f"unknown shape {name!r}: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def blank(model: DiffusionLM, shape: Shape) -> Any:
    """The grown model's module on the meta device: sizes, no memory.

    Raises
    ------
    SpiffyError
        As `grow`.
    """
    small = Shape.of(model)
    _check(model, small, shape)
    config: Any = copy.deepcopy(model.module.config)
    tied = shape.tied and small.tied  # a head of its own cannot become the embedding
    sizes: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.feed_forward,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": config.rms_norm_eps * small.head_dim / shape.head_dim,
    }
    if hasattr(config, "layer_types"):
        sizes["layer_types"] = ["full_attention"] * shape.layers
    for name, size in sizes.items():
        setattr(config, name, size)
    with torch.device("meta"):
        return type(model.module)(config)


def _check(model: DiffusionLM, small: Shape, shape: Shape) -> None:
    """Refuse what cannot be grown, or not without changing its function."""
    for name in model.module.state_dict():
        if _kind(name) not in _AXES:
            raise SpiffyError(f"{model.name} cannot be grown: no rule for its parameter {name}")
    if any(is_traceable_wrapper_subclass(weight) for weight in model.module.parameters()):
        raise SpiffyError(f"{model.name} cannot be grown: its weights are quantized")
    if any(weight.is_meta for weight in model.module.parameters()):
        raise SpiffyError(f"{model.name} cannot be grown: its weights are offloaded")
    if model.is_prepacked:
        raise SpiffyError(f"{model.name} is prepacked: grow it before")

    def refuse(reason: str) -> SpiffyError:
        return SpiffyError(f"{model.name} does not fit into shape {shape.name}: {reason}")

    for size in _SIZES:
        ours, theirs = getattr(small, size), getattr(shape, size)
        if theirs < ours:
            raise refuse(f"{size} {theirs} is less than its {ours}")
    if shape.head_dim % small.head_dim:
        raise refuse(
            f"head_dim {shape.head_dim} is no multiple of its {small.head_dim}, so its rotary "
            "frequencies are not there"
        )
    if shape.heads % shape.kv_heads:
        raise refuse(f"{shape.heads} heads cannot share {shape.kv_heads} kv_heads evenly")
    if shape.heads // shape.kv_heads < small.heads // small.kv_heads:
        raise refuse(
            f"{shape.heads // shape.kv_heads} heads share a key-value head, in the model "
            f"{small.heads // small.kv_heads} do"
        )
    if shape.vocabulary > small.vocabulary and shape.hidden == small.hidden:
        raise refuse("a larger vocabulary takes a larger hidden size, to hold added tokens down")
    if shape.vocabulary > small.vocabulary and model.dtype == torch.float16:
        raise refuse("float16 cannot hold added tokens down; take bfloat16 or float32")


def _kind(name: str) -> str:
    """A parameter's name without where it stands."""
    return ".".join(name.split(".")[-2:])


@dataclass(frozen=True)
class _Growth:
    """How the parameters of one model become those of a shape.

    Attributes
    ----------
    places
        By axis (`_AXES`): int64, where each of the small model's indices goes.
    factors
        By kind of parameter: what it is multiplied by, 1 if it is not named.
    constant
        What the spare dimension of the residual stream holds; 0 if there is none.
    final
        Weight of the spare dimension in the last norm.
    embedding
        Used as the head too, where the small model's is tied.
    """

    small: Shape
    shape: Shape
    places: Mapping[str, Tensor]
    factors: Mapping[str, float]
    constant: float
    final: float
    embedding: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, model: DiffusionLM, shape: Shape) -> _Growth:
        """Work out scales and places."""
        small = Shape.of(model)
        eps = float(model.module.config.rms_norm_eps)  # type: ignore[union-attr, arg-type]
        wider = shape.head_dim / small.head_dim
        scale, constant = _stream(small, shape, eps)
        per_head_norms = any(name.endswith("q_norm.weight") for name in model.module.state_dict())
        query = 1.0 if per_head_norms else math.sqrt(wider)
        norm = math.sqrt(small.hidden / shape.hidden)
        final = 0.0
        if shape.vocabulary > small.vocabulary:
            # Stream over RMS, at the spare dimension: constant / (scale * norm * RMS).
            least = constant / (scale * norm * _largest_rms(model, small, eps))
            final = (_largest_logit(model, small) + _GAP) / (least * _DOWN)
        return cls(
            small,
            shape,
            _places(small, shape, model.device),
            {
                "embed_tokens.weight": scale,
                "lm_head.weight": scale,
                "o_proj.weight": scale,
                "o_proj.bias": scale,
                "down_proj.weight": scale,
                "norm.weight": norm / scale,
                "input_layernorm.weight": norm,
                "post_attention_layernorm.weight": norm,
                "q_proj.weight": query,
                "q_proj.bias": query,
                # q_norm needs this and, for the smaller attention scale, its inverse: nothing.
                "k_norm.weight": math.sqrt(1 / wider),
            },
            constant,
            final,
            model.module.model.embed_tokens.weight,  # type: ignore[union-attr, arg-type]
            model.dtype,
        )

    def parameter(
        self, name: str, small: Tensor | None, size: torch.Size, generator: torch.Generator
    ) -> Tensor:
        """One grown parameter; `small` is the model's, None in an added layer."""
        kind = _kind(name)
        if kind == "lm_head.weight" and small is None:
            small = self.embedding
        # Written to even where it is zero: pages that were never written share one page of zeros,
        # and a forward would read them from the processor's cache.
        grown = torch.empty(size, dtype=self.dtype, device=generator.device).zero_()
        if small is None:
            if kind in _RANDOM:
                grown.normal_(std=self.shape.hidden**-0.5, generator=generator)
            return grown.fill_(1.0) if kind in _ONES else grown
        index = torch.meshgrid(*(self.places[axis] for axis in _AXES[kind]), indexing="ij")
        grown[index] = (small.double() * self.factors.get(kind, 1.0)).to(self.dtype)
        spare, tokens = self.small.hidden, self.small.vocabulary
        if kind == "norm.weight" and self.final:
            grown[spare] = self.final
        if _AXES[kind] == ("vocabulary", "hidden") and self.constant:
            grown[tokens:, spare] = -_DOWN
            if kind == "embed_tokens.weight":
                grown[:tokens, spare] = self.constant
        return grown


def _stream(small: Shape, shape: Shape, eps: float) -> tuple[float, float]:
    """Scale of the residual stream, and the constant in its spare dimension.

    With the scale s, the constant c and mean squares m over d dimensions, norms over the stream see
    (s^2 d m + c^2) / D + eps'. To be (s^2 d / D) (m + eps), as in the small model, c^2 has to be
    s^2 d eps - D eps'; and eps' is what norms over heads need, eps over how much wider they are.
    """
    needed = shape.hidden * small.head_dim / shape.head_dim
    if shape.hidden == small.hidden:
        return math.sqrt(needed / small.hidden), 0.0
    # The least power of two (which rounds nothing) that leaves as much for the constant.
    scale = 2.0 ** math.ceil(math.log2(2 * needed / small.hidden) / 2)
    return scale, math.sqrt(eps * (scale**2 * small.hidden - needed))


def _places(small: Shape, shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Where the small model's indices go, by axis."""
    half = small.head_dim // 2
    pair = torch.arange(half) * (shape.head_dim // small.head_dim)
    head = torch.cat((pair, pair + shape.head_dim // 2))  # rotary pairs are (j, j + half)

    def within_heads(heads: Tensor) -> Tensor:
        return (heads[:, None] * shape.head_dim + head).flatten()

    # Head h reads key-value head h // group; the wider groups are filled from their first head.
    group, wide = small.heads // small.kv_heads, shape.heads // shape.kv_heads
    h = torch.arange(small.heads)
    places = {
        "vocabulary": torch.arange(small.vocabulary),
        "hidden": torch.arange(small.hidden),
        "features": torch.arange(small.feed_forward),
        "head": head,
        "keys": within_heads(torch.arange(small.kv_heads)),
        "queries": within_heads(h // group * wide + h % group),
    }
    return {axis: index.to(device) for axis, index in places.items()}


def _norm(tensor: Tensor | None) -> float:
    """Frobenius norm: a matrix stretches no vector by more."""
    return 0.0 if tensor is None else float(tensor.double().norm())


def _largest_rms(model: DiffusionLM, small: Shape, eps: float) -> float:
    """A bound on the root mean square (with eps) of the last residual, whatever the input.

    Every layer reads vectors whose RMS is at most 1 before the norm's weights, so what it adds is
    bounded by its matrices. Far from tight, and need not be.
    """
    module: Any = model.module.model
    unit = math.sqrt(small.hidden)  # length of a vector of RMS 1
    length = float(module.embed_tokens.weight.double().norm(dim=1).max())
    for layer in module.layers:
        attention, mlp = layer.self_attn, layer.mlp
        read = unit * float(layer.input_layernorm.weight.abs().max())
        value = _norm(attention.v_proj.weight) * read + _norm(attention.v_proj.bias)
        # A head averages values; each may come out at the longest.
        mixed = math.sqrt(small.heads) * value
        length += _norm(attention.o_proj.weight) * mixed + _norm(attention.o_proj.bias)
        read = unit * float(layer.post_attention_layernorm.weight.abs().max())
        gate, up = (_norm(part.weight) * read for part in (mlp.gate_proj, mlp.up_proj))
        length += _norm(mlp.down_proj.weight) * gate * up  # |silu(x)| <= |x|
    return math.sqrt(length**2 / small.hidden + eps)


def _largest_logit(model: DiffusionLM, small: Shape) -> float:
    """A bound on the absolute value of the small model's logits, whatever the input."""
    module: Any = model.module
    rows = module.lm_head.weight.double() * module.model.norm.weight.double()
    return math.sqrt(small.hidden) * float(rows.norm(dim=1).max())
