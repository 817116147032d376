"""The paper's run-time pruning: which nodes it keeps, against arithmetic spelled out."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch
from helpers import decode, parity_model, random_prompt, states
from torch import Tensor

from spiffy.calib.pipeline import nodes_of
from spiffy.calib.record import Recorder, Trace
from spiffy.graphs import ChainCounts, count_chains, grow
from spiffy.runtime.draft import Candidates, GeometricMeanDrafter, GraphDrafter
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import DecodingSettings, Node

POSITIONS, RANKS = 5, 3


def random_nodes(rng: random.Random, count: int) -> list[Node]:
    """A connected graph over more ranks than a root has, as any graph may be."""
    fills: list[tuple[tuple[int, int], ...]] = [()]
    nodes: list[Node] = []
    while len(nodes) < count:
        parent = rng.choice(fills)
        free = [i for i in range(POSITIONS + 1) if i not in dict(parent)]
        if not free:
            continue
        fill = tuple(sorted((*parent, (rng.choice(free), rng.randrange(RANKS + 1)))))
        if fill not in fills:
            parents = tuple(k for k, other in enumerate(fills) if set(other) < set(fill))
            nodes.append(Node(fill=fill, parents=parents, count=1))
            fills.append(fill)
    return nodes


def a_root(seed: int, equal: bool) -> tuple[Cursor, Candidates]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((9,), 63)
    positions = torch.randperm(9, generator=generator)[:POSITIONS]
    tokens = torch.stack(
        [torch.randperm(60, generator=generator)[:RANKS] for _ in range(POSITIONS)]
    )
    p = torch.rand(POSITIONS, RANKS, generator=generator, dtype=torch.float64)
    p = torch.full_like(p, 0.25) if equal else p.sort(-1, descending=True).values
    p[-1, -1] = 0.0  # the mask token's
    return Cursor(ids), Candidates(positions, tokens, p.log(), positions[:0])


def best_states(
    nodes: list[Node], root: Cursor, known: Candidates, room: int, budget: int, children: str
) -> list[list[int]]:
    """What should be drafted, one node at a time."""
    p = known.log_p.exp().tolist()

    def exists(node: Node) -> bool:
        return len(node.fill) <= room and all(i < POSITIONS and j < RANKS for i, j in node.fill)

    def mean(node: Node) -> float:
        return prod(p[i][j] for i, j in node.fill) ** (1 / len(node.fill))

    def score(number: int) -> float:
        own = mean(nodes[number])
        below = [mean(n) for n in nodes if number + 1 in n.parents and exists(n)]
        if children == "ignored":
            return own
        total = own + sum(below)
        return total / (1 + len(below)) if children == "mean" else total

    numbers = [k for k, node in enumerate(nodes) if exists(node)]
    # Rounding only: sums in another order differ in the last digits, and ties go to the earlier.
    numbers.sort(key=lambda k: (-round(score(k), 12), k))
    drafts = []
    for k in numbers[:budget]:
        ids = root.ids.tolist()
        for i, j in nodes[k].fill:
            ids[known.positions[i]] = int(known.tokens[i, j])
        drafts.append(ids)
    return drafts


@pytest.mark.parametrize("children", ["ignored", "mean", "sum"])
@pytest.mark.parametrize("seed", range(6))
def test_it_drafts_the_best_scored_nodes_that_exist(children: str, seed: int) -> None:
    nodes = random_nodes(random.Random(seed), 40)
    model = parity_model("llada-a")
    root, known = a_root(seed, equal=False)
    for budget in (1, 4, 9, 100):
        for room in (0, 1, 2, POSITIONS):
            drafter = GeometricMeanDrafter(nodes, model, budget, children)  # type: ignore[arg-type]
            found = drafter(root, known, room).tolist()
            assert found == best_states(nodes, root, known, room, budget, children)
            assert len(found) <= budget


def test_ties_go_to_the_earlier_node() -> None:
    nodes = [Node(fill=((k, 0),), parents=(0,), count=1) for k in (3, 1, 0, 2)]
    model = parity_model("llada-a")
    root, known = a_root(0, equal=True)
    all_ = GraphDrafter([node.fill for node in nodes], model)(root, known, 5)
    assert torch.equal(GeometricMeanDrafter(nodes, model, 3)(root, known, 5), all_[:3])


def test_a_child_may_be_kept_without_its_parent() -> None:
    sure, unsure = (0, 0), (1, 1)
    nodes = [
        Node(fill=(unsure,), parents=(0,), count=1),
        Node(fill=(sure, unsure), parents=(1,), count=1),
    ]
    root, known = a_root(0, equal=True)
    known.log_p[0, 0] = -0.01
    (only,) = GeometricMeanDrafter(nodes, parity_model("llada-a"), 1)(root, known, 5)
    assert int((only != root.ids).sum()) == 2


def test_nothing_to_draft_gives_no_states() -> None:
    model = parity_model("llada-a")
    root, known = a_root(0, equal=False)
    nothing = Candidates(known.positions[:0], known.tokens[:0], known.log_p[:0], known.fresh)
    nodes = random_nodes(random.Random(0), 8)
    for drafter in (GeometricMeanDrafter(nodes, model, 4, "mean"), GraphDrafter([], model)):
        assert drafter(root, nothing, 0).shape == (0, 9)
    for children in ("ignored", "sum"):
        empty = GeometricMeanDrafter([], model, 4, children)  # type: ignore[arg-type]
        assert empty(root, known, 5).shape == (0, 9)


class Counting(GeometricMeanDrafter):
    """Remembers the most drafts of a forward."""

    most = 0

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        drafts = super().__call__(root, candidates, room)
        self.most = max(self.most, len(drafts))
        return drafts


@pytest.mark.parametrize(
    ("name", "cache"), [("llada-a", "none"), ("dream-a", "dual"), ("sdar-a", "block")]
)
@pytest.mark.parametrize("policy", ["static", "threshold"])
@pytest.mark.parametrize("children", ["ignored", "mean", "sum"])
def test_decoding_with_it_changes_no_token(
    name: str, cache: str, policy: str, children: str
) -> None:
    model = parity_model(name, "float64")
    options = {"policy": policy, "threshold": 0.9, "cache": cache, "stop_at_eos": False}
    settings = DecodingSettings.parse(gen_length=24, block_length=8, **options)
    prompt = random_prompt(model, 7)
    plain = decode(model, prompt, settings, Recorder())
    counts = count_chains([Trace.of(plain).chains])
    nodes = nodes_of(grow(counts, 32), ChainCounts.of(counts))
    assert any(node.parents != (0,) for node in nodes)
    drafter = Counting(nodes, model, 8, children)  # type: ignore[arg-type]
    ours = decode(model, prompt, settings, drafter)
    assert states(ours) == states(plain)
    assert drafter.most == 8
    assert ours.stats.nfe < plain.stats.nfe
