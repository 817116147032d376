"""What a forward would cost on a named accelerator: a prediction from four public numbers.

A forward takes the longer of moving its bytes and doing its arithmetic. That ignores the time to
launch kernels, everything short of peak, and everything a host does: good enough to tell whether a
model of billions of parameters is memory-bound, worthless for one of millions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.fields import head_dim
from spiffy.runtime.step.canvas import Canvas
from spiffy.schemas import CacheName, CostPoint, CostProfile

_BYTES = 2  # per number: everything in bfloat16


@dataclass(frozen=True)
class Accelerator:
    """Data-sheet numbers: bytes/s of memory, dense bfloat16 FLOP/s."""

    name: str
    bandwidth: float
    peak: float


#: From the vendors' data sheets, without sparsity.
ACCELERATORS = (
    Accelerator("A100 80GB SXM", 2.039e12, 312e12),
    Accelerator("H100 SXM", 3.35e12, 989e12),
    Accelerator("L4", 300e9, 121e12),
    Accelerator("RTX 4090", 1.008e12, 165e12),
)


class Experts(NamedTuple):
    """Of a mixture: how many experts a layer has, and a position picks; their feed-forward size.

    `shared` are those that every position goes through besides; the first `dense_layers` have none.
    """

    number: int
    chosen: int
    width: int
    shared: int = 0
    dense_layers: int = 0


@dataclass(frozen=True)
class Shape:
    """What a model's forward moves and computes.

    Attributes
    ----------
    shared
        Parameters that every position goes through, without embedding and output head.
    experts
        Parameters of all experts together; 0 if there are none.
    experts_share
        Share of them that one position goes through.
    layers, width, kv_width
        Layers; numbers in a position's queries and in its keys, per layer.
    head
        Parameters of the output head.
    """

    shared: int
    experts: int
    experts_share: float
    layers: int
    width: int
    kv_width: int
    head: int

    @property
    def parameters(self) -> int:
        """All that a forward reads, output head included."""
        return self.shared + self.experts + self.head

    @classmethod
    def of_sizes(
        cls,
        layers: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        feed_forward: int,
        vocabulary: int,
        experts: Experts | None = None,
    ) -> Shape:
        """From the sizes of a model of Llama's kind, or a mixture; norms and biases left out."""
        width, kv_width = heads * head_dim, kv_heads * head_dim
        mixed = 0 if experts is None else layers - experts.dense_layers
        shared = layers * hidden * (2 * width + 2 * kv_width)
        shared += (layers - mixed) * 3 * hidden * feed_forward
        sizes = (layers, width, kv_width, vocabulary * hidden)
        if experts is None:
            return cls(shared, 0, 1.0, *sizes)
        expert = 3 * hidden * experts.width
        shared += mixed * (experts.number * hidden + experts.shared * expert)  # with the router
        return cls(shared, mixed * experts.number * expert, experts.chosen / experts.number, *sizes)

    @classmethod
    def of(cls, model: DiffusionLM) -> Shape:
        """From the parameters and the config that transformers runs."""
        module: Any = model.module
        sizes = {name: p.numel() for name, p in module.named_parameters()}
        embedding = module.model.embed_tokens.weight.numel()
        head = model.vocab_size * module.config.hidden_size
        tied = "lm_head.weight" not in sizes
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        config = module.config
        # Configs call their number by several names; their matrices are stacked under one.
        stacked = [p for name, p in module.named_parameters() if name.endswith("experts.down_proj")]
        chosen = config.num_experts_per_tok / len(stacked[0]) if stacked else 1.0
        heads = config.num_attention_heads
        return cls(
            shared=sum(sizes.values()) - experts - embedding - (0 if tied else head),
            experts=experts,
            experts_share=chosen,
            layers=config.num_hidden_layers,
            width=heads * head_dim(config),
            kv_width=config.num_key_value_heads * head_dim(config),
            head=head,
        )


#: Mixtures by their published configs, under the names that they are loaded by.
MIXTURES: Mapping[str, Shape] = {
    "llada2-mini": Shape.of_sizes(
        20, 2048, 16, 4, 128, 5120, 157_184, Experts(256, 8, 512, shared=1, dense_layers=1)
    ),
    "llada2-flash": Shape.of_sizes(
        32, 4096, 32, 4, 128, 9216, 157_184, Experts(256, 8, 1024, shared=1, dense_layers=1)
    ),
    "sdar-30b-a3b": Shape.of_sizes(48, 2048, 32, 4, 128, 6144, 151_936, Experts(128, 8, 768)),
}


def layout(canvas: Canvas, cache: CacheName, drafts: int) -> tuple[int, int, int]:
    """How a forward with drafts lies: (rows, query positions per row, frozen positions).

    For a block in the middle of the answer.
    """
    block, states = canvas.block_length, 1 + drafts
    before = canvas.span(canvas.blocks // 2).start
    after = canvas.length - before - block
    if cache == "none":
        return states, canvas.length, 0
    if cache == "dual":
        return 1, states * block, before + after
    if cache == "prefix":
        return 1, states * (block + after), before
    if cache == "prefix-shared":
        return 1, states * block + after, before
    return 1, states * block, before


def seconds(accelerator: Accelerator, moved: float, flops: float) -> float:
    """The longer of moving bytes and computing."""
    return max(moved / accelerator.bandwidth, flops / accelerator.peak)


def forward_seconds(
    shape: Shape, accelerator: Accelerator, canvas: Canvas, cache: CacheName, drafts: int
) -> float:
    """Seconds of one forward, without the output head."""
    rows, queries, frozen = layout(canvas, cache, drafts)
    positions = rows * queries
    # Every position picks its own experts; few positions leave some of the weights unread.
    read = 1 - (1 - shape.experts_share) ** positions
    weights = shape.shared + read * shape.experts
    kept = 2 * shape.layers * shape.kv_width * (frozen + positions)
    through = shape.shared + shape.experts_share * shape.experts
    attention = 4 * shape.layers * shape.width * positions * (frozen + queries)
    return seconds(accelerator, _BYTES * (weights + kept), 2 * through * positions + attention)


def predicted_profile(
    shape: Shape,
    accelerator: Accelerator,
    canvas: Canvas,
    cache: CacheName,
    budgets: Sequence[int],
    drafting: dict[str, tuple[CostPoint, ...]] | None = None,
) -> CostProfile:
    """The cost profile of a model of this shape on an accelerator, as far as a data sheet tells.

    Parameters
    ----------
    budgets
        Numbers of drafts, ascending from 0.
    drafting
        Seconds of choosing drafts, which is a matter of the host and taken as it is.
    """
    masked = -(-canvas.block_length // 2)  # on average

    def whole(drafts: int) -> float:
        rows = masked * (1 + drafts)  # which pass through the output head together
        head = seconds(accelerator, _BYTES * shape.head, 2 * shape.head * rows)
        return forward_seconds(shape, accelerator, canvas, cache, drafts) + head

    return CostProfile(
        device=accelerator.name,
        dtype="bfloat16",
        points=tuple(CostPoint(drafts=n, seconds=whole(n)) for n in budgets),
        drafting=drafting or {},
    )
