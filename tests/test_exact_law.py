"""At temperature 1 samples follow the law of the sampler, with and without drafts.

A toy model small enough to enumerate: two tokens and the mask, one block of four positions. Its
logits are those of a random LLaDA network at all 81 states, kept in a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from math import exp
from typing import Any

import pytest
import torch
from helpers import decode
from scipy.stats import chisquare
from torch import Tensor

from spiffy.runtime.decode import Task, denoising_step, keys_of
from spiffy.runtime.draft import Candidates, Drafter, GraphDrafter
from spiffy.runtime.forward.evaluation import Evaluation
from spiffy.runtime.models.attention import Group
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.llada import LLADA
from spiffy.runtime.step.canvas import Cursor
from spiffy.runtime.step.reading import Reading
from spiffy.schemas import DecodingSettings

MASK, BLOCK, VOCAB = 2, 4, 3
PROMPT = torch.tensor([1])
SAMPLES = 1200
CONFIG = {
    "model_type": "llada",
    "d_model": 8,
    "n_heads": 2,
    "n_layers": 1,
    "mlp_hidden_size": 16,
    "vocab_size": VOCAB,
    "max_sequence_length": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "mask_token_id": MASK,
}
FILLS = [[(0, 0)], [(1, 0)], [(0, 1)], [(0, 0), (1, 0)], [(0, 0), (1, 1)]]
State = tuple[int, ...]
Path = tuple[State, ...]


class TableModel(DiffusionLM):
    """A model whose "hidden states" are its logits, looked up by the state of the block."""

    def fill_table(self) -> None:
        block = torch.tensor(list(product(range(VOCAB), repeat=BLOCK)))
        sequences = torch.cat((PROMPT.expand(len(block), 1), block), 1)
        self.table = self.forward_logits(sequences)

    def hidden_states(self, ids: Tensor, positions: Tensor, groups: Sequence[Group]) -> Tensor:
        if not hasattr(self, "table"):
            return super().hidden_states(ids, positions, groups)
        assert all(group.mask is None and group.kv is None for group in groups)
        sequences = ids.view(-1, 1 + BLOCK)
        weights = torch.tensor([VOCAB**k for k in reversed(range(BLOCK))])
        return self.table[(sequences[:, 1:] * weights).sum(-1)].flatten(0, 1)

    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden) if not hasattr(self, "table") else hidden


@cache
def toy(scores_drawn: bool = False) -> TableModel:
    torch.manual_seed(2)
    architecture, config = LLADA.architecture(CONFIG)
    module = architecture(config).double()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() == 2:
                weight.normal_()
        module.lm_head.weight.mul_(0.3)  # no near-certain choices
    family = replace(LLADA, scores_drawn=scores_drawn)
    model = TableModel(module, family, CONFIG, name="toy")
    model.fill_table()
    return model


def setting(temperature: float, top_p: float | None = None) -> DecodingSettings:
    return DecodingSettings.parse(
        block_length=BLOCK,
        gen_length=BLOCK,
        temperature=temperature,
        top_p=top_p,
        stop_at_eos=False,
    )


def exact_law(
    temperature: float, top_p: float | None = None, scores_drawn: bool = False
) -> dict[Path, float]:
    """Probability of every path, from the sampler's definition and nothing of the runtime.

    At every masked position the token is argmax(logits + T * Gumbel), that is, a draw from
    softmax(logits / T) over the real tokens, independently of the others. Of these draws the one
    whose token has the highest untempered probability is committed, ties to the lower position.
    With `top_p` the unlikelier of two tokens is drawn only where the other has less than that; with
    `scores_drawn` the probability compared is the one of the draw.
    """
    table = toy().table.double()
    law: dict[Path, float] = {}

    def extend(path: Path, state: State, weight: float) -> None:
        masked = [k for k, token in enumerate(state) if token == MASK]
        if not masked:
            law[path] = law.get(path, 0.0) + weight
            return
        number = sum(token * VOCAB ** (BLOCK - 1 - k) for k, token in enumerate(state))
        logits = table[number, 1:].tolist()
        confidence = {}
        drawn = {}
        for k in masked:
            total = sum(exp(x) for x in logits[k])
            confidence[k] = [exp(x) / total for x in logits[k]]
            tempered = [exp(x / temperature) for x in logits[k][:MASK]]
            drawn[k] = [x / sum(tempered) for x in tempered]
            if top_p is not None and max(drawn[k]) >= top_p:
                drawn[k] = [float(x == max(drawn[k])) for x in drawn[k]]
            if scores_drawn:
                confidence[k] = drawn[k]
        for tokens in product(range(MASK), repeat=len(masked)):
            chance, best, best_at = weight, -1.0, -1
            for k, token in zip(masked, tokens, strict=True):
                chance *= drawn[k][token]
                if confidence[k][token] > best:
                    best, best_at = confidence[k][token], k
            if not chance:
                continue
            committed = dict(zip(masked, tokens, strict=True))[best_at]
            after = (*state[:best_at], committed, *state[best_at + 1 :])
            extend((*path, after), after, chance)

    extend((), (MASK,) * BLOCK, 1.0)
    return law


def sample(
    temperature: float, seeds: range, drafter: Callable[[], Drafter] | None = None
) -> tuple[Counter[Path], int]:
    """Paths of one decode per seed, and how many steps were hops."""
    paths: Counter[Path] = Counter()
    accepted = 0
    for seed in seeds:
        task = decode(toy(), PROMPT, setting(temperature), drafter() if drafter else None, seed)
        paths[tuple(tuple(cursor.ids[1:].tolist()) for cursor in task.path)] += 1
        accepted += task.stats.accepted
    return paths, accepted


def p_value(observed: Counter[Path], law: dict[Path, float]) -> float:
    """Chi-square test; outcomes expected fewer than 5 times are merged into one that is not."""
    assert set(observed) <= set(law)
    total = sum(observed.values())
    expected, counts = [0.0], [0]
    for path in sorted(law, key=law.__getitem__):  # the rarest first, so that few are merged
        if expected[-1] >= 5:
            expected.append(0.0)
            counts.append(0)
        expected[-1] += law[path] * total
        counts[-1] += observed[path]
    assert len(expected) > 8
    return float(chisquare(counts, expected).pvalue)


def answers(paths: dict[Path, float]) -> dict[Path, float]:
    """The same weights by final tokens alone."""
    merged: dict[Path, float] = {}
    for path, weight in paths.items():
        merged[path[-1:]] = merged.get(path[-1:], 0) + weight
    return merged


def p_values(observed: Counter[Path], temperature: float) -> tuple[float, float]:
    """Of the final tokens, and of the whole paths."""
    law = exact_law(temperature)
    finals = Counter({path: int(n) for path, n in answers(dict(observed)).items()})
    return p_value(finals, answers(law)), p_value(observed, law)


def graph_drafter(temperature: float) -> GraphDrafter:
    return GraphDrafter(FILLS, toy())


class Recording:
    """A drafter that remembers what it drafted last."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.token_ranks, self.asks_rejected = drafter.token_ranks, drafter.asks_rejected
        self.drafted: list[list[int]] = []

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        drafts = self.drafter(root, candidates, room)
        self.drafted = drafts.tolist()
        return drafts


def test_the_enumerated_law_is_a_law_worth_testing() -> None:
    """Probabilities sum to 1, and no answer has it all: 16 answers, 384 paths."""
    law = exact_law(1.0)
    assert sum(law.values()) == pytest.approx(1.0)
    assert len(answers(law)) == 16
    assert len(law) <= 384
    assert max(answers(law).values()) < 0.5
    assert sum(weight * SAMPLES >= 5 for weight in law.values()) > 30


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_plain_samples_follow_the_exact_law(temperature: float) -> None:
    paths, accepted = sample(temperature, range(SAMPLES))
    assert accepted == 0
    assert min(p_values(paths, temperature)) > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_speculative_samples_follow_the_exact_law(temperature: float) -> None:
    """Other seeds than above, so that this is evidence of its own."""
    seeds = range(10 * SAMPLES, 11 * SAMPLES)
    paths, accepted = sample(temperature, seeds, lambda: graph_drafter(temperature))
    assert accepted > SAMPLES / 2  # drafts did decide where many of these were computed
    assert min(p_values(paths, temperature)) > 1e-4


def test_filtered_samples_follow_the_exact_law_of_the_official_scores() -> None:
    top_p, samples = 0.6, 400
    model, options = toy(scores_drawn=True), setting(1.0, top_p)
    law = exact_law(1.0, top_p, scores_drawn=True)
    assert sum(law.values()) == pytest.approx(1.0)
    paths: Counter[Path] = Counter()
    accepted = 0
    for seed in range(samples):
        task = decode(model, PROMPT, options, GraphDrafter(FILLS, model), seed)
        paths[tuple(tuple(cursor.ids[1:].tolist()) for cursor in task.path)] += 1
        accepted += task.stats.accepted
    assert accepted > samples / 2
    assert p_value(paths, law) > 1e-4
    for wrong in (exact_law(1.0), exact_law(1.0, top_p)):  # this many samples tell them apart
        p = p_value(Counter({path: n for path, n in paths.items() if path in wrong}), wrong)
        assert p < 1e-6 or not {*paths} <= {*wrong}


def test_drawing_again_after_a_miss_breaks_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would notice: a second draw gives drafted states a second chance."""
    current: list[Recording] = []
    asked: list[tuple[Evaluation, int, Tensor]] = []
    read = Evaluation.reading

    def reading(evaluation: Evaluation, state: int, at: Tensor, *keys: Any) -> Reading:
        asked.append((evaluation, state, at))
        return read(evaluation, state, at, *keys)

    def redrawing_step(task: Task, cursor: Cursor, said: Reading, *rest: Any) -> Cursor:
        following = denoising_step(task, cursor, said, *rest)
        drafted = current[-1].drafted
        if drafted and following.ids.tolist() not in drafted:
            evaluation, state, at = asked[-1]
            other = read(evaluation, state, at, keys_of(replace(task, sequence=1), cursor, at))
            following = denoising_step(task, cursor, other, *rest)
        return following

    def drafter() -> Recording:
        current.append(Recording(graph_drafter(1.0)))
        return current[-1]

    monkeypatch.setattr(Evaluation, "reading", reading)
    monkeypatch.setattr("spiffy.runtime.decode.loop.denoising_step", redrawing_step)
    paths, _ = sample(1.0, range(SAMPLES), drafter)
    assert max(p_values(paths, 1.0)) < 1e-6


def test_speculative_samples_are_the_plain_ones_seed_by_seed() -> None:
    for seed in range(200):
        plainly = decode(toy(), PROMPT, setting(1.0), None, seed)
        ours = decode(toy(), PROMPT, setting(1.0), graph_drafter(1.0), seed)
        assert [c.ids.tolist() for c in ours.path] == [c.ids.tolist() for c in plainly.path]
