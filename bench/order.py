"""The order network: which masked position is committed next, as our reading of SPOT.

SPOT (arXiv 2610.22543) drafts with a network of 0.62 million parameters: three layers of width 128
and eight heads, which read the 32 likeliest probabilities at every position of the block, from the
forward before, and predict which position is committed next; the predictions are grown into a tree
of states. That much is known of it. What else a network has to have is ours: what describes a
draft, and how it is trained (`order_training`) and searched with (`order_drafter`).

A rival for benchmarks. Whatever it drafts, the tokens decoded stay the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spiffy.runtime.draft import Candidates
from spiffy.runtime.draft.acceptance import TOKEN_RANKS
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import DecodingSettings, SpiffyError

FORMAT = "spiffy.order-network"
RANKS = 32
_FLOOR = -20.0  # log-probability of what was not recorded, or is less likely
_SCALE = 10.0  # so that log-probabilities and numbers of steps are of the size of 1
_SEEN = 10  # facts of a position beside its log-probabilities
_DRAFTED = 5


@dataclass(frozen=True)
class OrderShape:
    """What a network is for, and its size.

    Attributes
    ----------
    block_length
        Positions that it reads.
    ranks
        Log-probabilities that it reads at each, no fewer than drafts choose from.
    fingerprint
        Of the model whose decodes it was trained on.
    """

    block_length: int
    fingerprint: str
    ranks: int = RANKS
    width: int = 128
    layers: int = 3
    heads: int = 8


class Scene(NamedTuple):
    """A root's block of B positions, as the distribution before the root saw it.

    Attributes
    ----------
    seen
        float32 [B, F], what the network reads of it.
    masked
        bool [B], positions that drafts may fill.
    tokens, log_p
        int64 and float32 [B, J], their likeliest tokens, -1 where there is none.
    start
        Position of the sequence at which the block begins.
    """

    seen: Tensor
    masked: Tensor
    tokens: Tensor
    log_p: Tensor
    start: int


def check_steps(settings: DecodingSettings) -> None:
    """Refuse settings whose steps no network predicts.

    Raises
    ------
    SpiffyError
        If a denoising step can commit several tokens.
    """
    one = settings.tokens_per_step == 1 and settings.steps_per_block is None
    if settings.policy != "static" or not one:
        raise SpiffyError(
            "the order network predicts single positions: use policy static with one token per step"
        )


def check_fits(
    shape: OrderShape, settings: DecodingSettings, fingerprint: str | None = None
) -> None:
    """Refuse a network that was trained for something else.

    `fingerprint` is that of the model, if it matters.

    Raises
    ------
    SpiffyError
        If that is another model, another length of blocks, or other steps.
    """
    check_steps(settings)
    if fingerprint not in (None, shape.fingerprint):
        raise SpiffyError("the order network was trained on another model: train one on this")
    if shape.block_length != settings.block_length:
        raise SpiffyError(
            f"the order network was trained on blocks of {shape.block_length}, not of "
            f"{settings.block_length}: train one on these"
        )


def scene_of(root: Cursor, candidates: Candidates, shape: OrderShape, mask_token_id: int) -> Scene:
    """Lay out a root.

    A drafter is not told where a block begins: it is taken to be a whole number of them before the
    end of the sequence. Masks outside of it, of a block of another length, are never drafted.
    """
    length, size = len(root.ids), shape.block_length
    first = int(candidates.positions.min())
    start = length - size * -(-(length - first) // size)
    inside = (candidates.positions >= start) & (candidates.positions < start + size)
    at = candidates.positions[inside] - start
    known = candidates.log_p[inside].float().clamp(min=_FLOOR)
    block = root.ids.new_full((size,), mask_token_id)
    block[max(0, -start) :] = root.ids[max(0, start) : start + size]
    fresh = candidates.fresh[(candidates.fresh >= start) & (candidates.fresh < start + size)]

    log_p = torch.full((size, shape.ranks), _FLOOR)
    log_p[at, : known.shape[1]] = known[:, : shape.ranks]
    kept = min(TOKEN_RANKS, known.shape[1])
    tokens = root.ids.new_full((size, TOKEN_RANKS), -1)
    tokens[at, :kept] = candidates.tokens[inside][:, :kept]
    masked = torch.zeros(size, dtype=torch.bool)
    masked[at] = True
    is_fresh = torch.zeros(size)
    is_fresh[fresh - start] = 1.0
    states = torch.stack((is_fresh, (block != mask_token_id).float()), -1)
    everywhere = torch.tensor([len(at) / size, len(candidates.fresh) / _SCALE]).expand(size, 2)
    # Of other positions nothing is known but whether they are filled.
    seen = torch.cat((log_p / _SCALE, _facts(log_p, at)), -1) * masked[:, None]
    return Scene(
        torch.cat((seen, states, everywhere), -1), masked, tokens, log_p[:, :TOKEN_RANKS], start
    )


def _facts(log_p: Tensor, at: Tensor) -> Tensor:
    """What follows from log-probabilities [B, K] of positions of which `at` are masked, best first.

    Log-odds, how far they are below the best ones, entropy, gap to the second token, logarithm of
    the rank, 1: float32 [B, 6].
    """
    p = log_p.exp()
    rest = (1 - p.sum(-1)).clamp(min=1e-9)
    entropy = -(p * log_p).sum(-1) - rest * rest.log()
    top = log_p[:, 0]
    logit = (top - torch.log(-torch.expm1(top.clamp(max=-1e-6)))).clamp(-12, 14)
    best = logit[at].max() if len(at) else 0.0
    log_rank = torch.zeros_like(top)
    log_rank[at] = torch.arange(1.0, len(at) + 1).log()
    gap = p[:, 0] - p[:, 1]
    odds = (logit / _SCALE, (logit - best) / _SCALE)
    return torch.stack((*odds, entropy, gap, log_rank, torch.ones_like(top)), -1)


def drafted(choice: Tensor, when: Tensor, log_p: Tensor) -> Tensor:
    """What the network reads of draft states: float32 [n, B, G].

    Parameters
    ----------
    choice
        int64 [n, B], rank of the token that was filled in, else -1.
    when
        int64 [n, B], at which step ahead of the root, from 1 on.
    log_p
        float32 [n, B, J], of the tokens.
    """
    filled = (choice >= 0).float()
    depth = (when * (choice >= 0)).amax(1, keepdim=True)
    ago = (depth - when) * filled
    own = log_p.gather(2, choice.clamp(min=0)[:, :, None])[:, :, 0]
    return torch.stack(
        (
            filled,
            filled * (when == depth),
            ago / _SCALE,
            own * filled / _SCALE,
            (depth / _SCALE).expand_as(filled),
        ),
        -1,
    )


class OrderNetwork(nn.Module):
    """Scores of a block's positions, and of the likeliest tokens at each."""

    def __init__(self, shape: OrderShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.of_scene = nn.Linear(shape.ranks + _SEEN, width)
        self.of_draft = nn.Linear(_DRAFTED, width, bias=False)
        self.place = nn.Parameter(torch.randn(shape.block_length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, shape.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, shape.layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.position = nn.Linear(width, 1)
        self.token = nn.Linear(width, TOKEN_RANKS + 1)
        nn.init.zeros_(self.token.weight)  # so that tokens begin as likely as they were
        nn.init.zeros_(self.token.bias)

    @property
    def parameter_count(self) -> int:
        """How many numbers it has learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, seen: Tensor, draft: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Score n states of scenes.

        Parameters
        ----------
        seen, draft, log_p
            float32 [n, B, F], [n, B, G] and [n, B, J]: see `Scene` and `drafted`.

        Returns
        -------
        Scores float32 [n, B], a softmax over masked positions; log-probabilities float32
        [n, B, J + 1] of the tokens if the position is the next one, the last of any other token.
        """
        hidden = self.layers(self.of_scene(seen) + self.of_draft(draft) + self.place)
        others = torch.log((1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-6))
        tokens = torch.cat((log_p, others), -1) + self.token(hidden)
        return self.position(hidden)[:, :, 0], tokens.log_softmax(-1)


def save_order(network: OrderNetwork, path: Path) -> None:
    """Write a network as safetensors; its shape as JSON in the file's header."""
    shape = json.dumps(asdict(network.shape), sort_keys=True)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, path, {"format": FORMAT, "shape": shape})


def load_order(path: Path) -> OrderNetwork:
    """Read what `save_order` wrote.

    Raises
    ------
    SpiffyError
        If it is no such file, or holds other tensors than its shape says, or NaN.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise SpiffyError(f"{path}: no order network; studies/rival.py --save writes them")
            network = OrderNetwork(_shape_of(path, about.get("shape", "")))
            own = network.state_dict()
            held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if held != {name: tuple(tensor.shape) for name, tensor in own.items()}:
                raise SpiffyError(f"{path}: holds other tensors than its shape says: train again")
            network.load_state_dict({name: file.get_tensor(name) for name in own})
    except (OSError, SafetensorError) as error:
        raise SpiffyError(f"{path}: cannot be read ({error})") from None
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise SpiffyError(f"{path}: holds NaN or infinity: train again")
    return network.eval()


def _shape_of(path: Path, text: str) -> OrderShape:
    try:
        shape = OrderShape(**json.loads(text))
    except (TypeError, ValueError):
        raise SpiffyError(f"{path}: its header does not say of which shape it is") from None
    numbers = [getattr(shape, field.name) for field in fields(shape) if field.type == "int"]
    sound = all(type(number) is int and 1 <= number <= 1024 for number in numbers)
    sound = sound and not shape.width % shape.heads and shape.ranks >= TOKEN_RANKS
    if not sound or not isinstance(shape.fingerprint, str):
        raise SpiffyError(f"{path}: a network of shape {text} cannot be built")
    return shape
