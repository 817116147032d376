"""The network of `tiny-llada`: a small LLaDA, under the official parameter names."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that define the network."""

    vocab_size: int = 1024
    d_model: int = 256
    n_layers: int = 5
    n_heads: int = 4
    mlp_hidden_size: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class Block(nn.Module):
    """A LLaDA (Llama) block with bidirectional attention, under the official parameter names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, hidden = shape.d_model, shape.mlp_hidden_size
        self.n_heads = shape.n_heads
        self.attn_norm = nn.RMSNorm(d, eps=shape.rms_norm_eps)
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_norm = nn.RMSNorm(d, eps=shape.rms_norm_eps)
        self.ff_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None) -> Tensor:
        """Return the residual stream after this block."""
        batch, length, d = x.shape
        heads = (batch, length, self.n_heads, d // self.n_heads)
        y = self.attn_norm(x)
        q = _rotate(self.q_proj(y).view(heads).transpose(1, 2), cos, sin)
        k = _rotate(self.k_proj(y).view(heads).transpose(1, 2), cos, sin)
        v = self.v_proj(y).view(heads).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(batch, length, d))
        y = self.ff_norm(x)
        return x + cast(Tensor, self.ff_out(functional.silu(self.ff_proj(y)) * self.up_proj(y)))


class TinyLlada(nn.Module):
    """The whole network, with input and output embeddings tied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.ln_f = nn.RMSNorm(shape.d_model, eps=shape.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attn_out.weight", "ff_out.weight"))
                std = 0.02 / math.sqrt(2 * shape.n_layers) if residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(
        self, ids: Tensor, wanted: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """Return logits, at all positions or at those each row of `wanted` names.

        Every position attends to every other one; `seen` (rows by positions) can hide padding.
        """
        cos, sin = _rotary_tables(self.shape, ids.shape[1])
        visible = None if seen is None else seen[:, None, None, :]
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, cos, sin, visible)
        if wanted is not None:
            x = x.gather(1, wanted.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return functional.linear(self.ln_f(x), self.wte.weight)


def _rotary_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    head_dim = shape.d_model // shape.n_heads
    inverse = shape.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
