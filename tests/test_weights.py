"""top_k and top_p: transformers' filters, what is drawn by them, and scores of drawn tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import (
    a_graph_of,
    decode,
    own_examples,
    parity_model,
    random_prompt,
    refusal,
    states,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from spiffy.runtime import decoding_settings
from spiffy.runtime.draft import GraphDrafter
from spiffy.runtime.step import weights as module
from spiffy.runtime.step.noise import Noise
from spiffy.runtime.step.policy import Distribution, choose
from spiffy.runtime.step.reading import Reading, Rules, likeliest, reading_of
from spiffy.runtime.step.weights import weights_of
from spiffy.schemas import DecodingSettings

FILTERS: list[tuple[int | None, float | None]] = [
    (5, None),
    (None, 0.3),
    (None, 0.95),
    (20, 0.8),
    (1, None),
    (None, 1e-9),
    (10_000, 0.999),
]
# Checkpoint, geometry: a family that scores by the model's own distribution, and three that do not.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llada": ("llada-a", {"cache": "dual", "block_length": 8, "gen_length": 16}),
    "dream": ("dream-a", {"cache": "none", "block_length": 8, "gen_length": 16}),
    "sdar": ("sdar-a", {"cache": "block", "block_length": 8, "gen_length": 16}),
    "fast-dllm": (
        "fastdllm2-a",
        {"cache": "block", "block_length": 8, "sub_block_length": 4, "gen_length": 16},
    ),
}
POLICIES: list[dict[str, Any]] = [
    {"tokens_per_step": 2},
    {"policy": "threshold", "threshold": 0.5},
    {"policy": "entropy-bounded", "entropy_bound": 1.0},
    {"score": "margin"},
    {"score": "entropy"},
]


def log_softmax(rows: int, vocab: int, scale: float = 3) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return (scale * logits).log_softmax(-1)


def keys(rows: int) -> Tensor:
    return Noise(7, 2).keys(torch.tensor(3), 0, torch.arange(rows))


@pytest.mark.parametrize("vocab", [300, 3000])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_what_is_left_is_what_transformers_leaves(
    vocab: int, top_k: int | None, top_p: float | None
) -> None:
    """Whether a look at the largest is enough or all are sorted; flat rows need that."""
    for scale, temperature in ((3.0, 0.7), (0.1, 1.0)):
        log_p = log_softmax(6, vocab, scale)
        expected = log_p / temperature
        ids = torch.zeros(6, 1, dtype=torch.int64)
        if top_k is not None:
            expected = TopKLogitsWarper(top_k)(ids, expected)
        if top_p is not None:
            expected = TopPLogitsWarper(top_p)(ids, expected)
        weights = weights_of(log_p, temperature, top_k, top_p)
        assert not weights[:, vocab:].any()
        torch.testing.assert_close(
            (weights / module.total(weights))[:, :vocab], expected.softmax(-1)
        )


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_rows_are_filtered_alone_and_alike_on_a_device(
    top_k: int | None, top_p: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device sorts them all, because a look would be a question to it."""
    log_p = torch.cat((log_softmax(4, 3000), log_softmax(4, 3000, 0.1)))
    whole = weights_of(log_p, 0.7, top_k, top_p)
    for rows in ([2], [5, 0, 7], []):
        assert torch.equal(weights_of(log_p[rows], 0.7, top_k, top_p), whole[rows])
    monkeypatch.setattr(module, "_FEW", 1 << 20)
    assert torch.equal(weights_of(log_p, 0.7, top_k, top_p), whole)


def test_equals_are_left_in_the_order_of_their_ids() -> None:
    log_p = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.3], [0.2] * 5], dtype=torch.float64).log()

    def left(top_k: int | None = None, top_p: float | None = None) -> list[list[int]]:
        return [row.nonzero()[:, 0].tolist() for row in weights_of(log_p, 1.0, top_k, top_p)]

    assert left(top_k=2) == [[1, 4], [0, 1]]
    assert left(top_k=3) == [[1, 2, 4], [0, 1, 2]]
    assert left(top_p=0.45) == [[1, 4], [0, 1, 2]]
    assert left(top_k=4, top_p=0.51) == [[1, 4], [0, 1, 2]]  # of the sum of those four
    assert left(top_k=9) == left() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(("top_k", "top_p"), [(4, None), (None, 0.8), (50, 0.6)])
def test_tokens_follow_the_filtered_law_and_never_are_the_mask(
    top_k: int | None, top_p: float | None
) -> None:
    """The mask is the likeliest token of all, and takes nobody's place."""
    mask, temperature, count = 290, 0.8, 20_000
    logits = torch.linspace(-2, 2, 300, dtype=torch.float64).mul(3)
    logits[mask] = 20.0
    options = DecodingSettings.parse(temperature=temperature, top_k=top_k, top_p=top_p)
    distribution = Distribution.of(logits.expand(count, -1))
    tokens, score = choose(distribution, options, mask, keys(count), scores_drawn=True)
    law = [0.0 if k == mask else math.exp(x / temperature) for k, x in enumerate(logits.tolist())]
    order = sorted(range(300), key=lambda k: (-law[k], k))[:top_k]
    most, kept = sum(law[k] for k in order), 0.0
    support = []
    for token in order:
        if top_p is not None and kept >= top_p * most:
            break
        support.append(token)
        kept += law[token]
    expected = [law[k] / kept for k in support]
    seen = tokens.bincount(minlength=300)
    assert seen[support].sum() == count
    assert len(support) > 2
    assert chisquare(seen[support], [count * p for p in expected]).pvalue > 1e-4
    chance = dict(zip(support, expected, strict=True))
    assert score.tolist() == pytest.approx([chance[token] for token in tokens.tolist()])
    own = choose(distribution, options, mask, keys(count))
    assert torch.equal(own[0], tokens)
    assert own[1].tolist() == pytest.approx(distribution.log_p[0].exp()[tokens].tolist())


def test_margins_and_entropies_are_of_what_is_drawn_where_the_family_says_so() -> None:
    distribution = Distribution.of(torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log())
    left = [4 / 7, 3 / 7]
    entropy = -sum(p * math.log(p) for p in left)
    for option, expected in (
        ({"score": "margin"}, 1 / 7),
        ({"score": "entropy"}, -entropy),
        ({"policy": "entropy-bounded"}, -entropy),
    ):
        options = DecodingSettings.parse(temperature=1.0, top_k=2, **option)
        _, score = choose(distribution, options, 3, keys(1), scores_drawn=True)
        assert score.tolist() == pytest.approx([expected], abs=1e-8)
        plain = DecodingSettings.parse(**option)
        of_all = choose(distribution, plain, 3)[1]
        assert torch.equal(choose(distribution, options, 3, keys(1))[1], of_all)
        assert torch.equal(choose(distribution, plain, 3, scores_drawn=True)[1], of_all)
    one = DecodingSettings.parse(temperature=1.0, top_k=1)
    assert choose(distribution, one, 3, keys(1), scores_drawn=True)[1].tolist() == [1.0]


def test_a_table_says_the_same_as_a_look_on_the_host() -> None:
    logits, own = 4 * torch.randn(7, 640, generator=torch.Generator().manual_seed(3)), keys(7)
    options = DecodingSettings.parse(temperature=0.9, top_k=30, top_p=0.8)
    rules = Rules(options, 3, ranks=4, scores_drawn=True)
    table = rules.table(logits, own)
    device = reading_of(table, torch.arange(7), lambda count: likeliest(table, count))
    host = Reading.of(logits, torch.arange(7), rules, own)
    assert torch.equal(device.tokens, host.tokens)
    torch.testing.assert_close(device.score, host.score)
    logits[5, 9] = torch.nan
    assert not Reading.of(logits, torch.arange(7), rules, own).is_number


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_change_no_filtered_sample(layout: str) -> None:
    checkpoint, geometry = LAYOUTS[layout]
    model = parity_model(checkpoint, "float64")
    rank = st.integers(0, 4)
    fills = st.lists(st.tuples(rank, rank), min_size=1, max_size=3)

    @own_examples(layout)
    @settings(max_examples=12, deadline=None)
    @given(
        graph=st.lists(fills, max_size=8),
        policy=st.sampled_from(POLICIES),
        filters=st.sampled_from(FILTERS),
        seed=st.integers(0, 2),
    )
    def check(
        graph: list[list[tuple[int, int]]],
        policy: dict[str, Any],
        filters: tuple[int | None, float | None],
        seed: int,
    ) -> None:
        top_k, top_p = filters
        options = {**geometry, **policy, "temperature": 0.8, "top_k": top_k, "top_p": top_p}
        setting = DecodingSettings.parse(**options, stop_at_eos=False)
        prompt = random_prompt(model, 9)
        plainly = decode(model, prompt, setting, None, seed)
        ours = decode(model, prompt, setting, GraphDrafter(graph, model), seed)
        assert states(ours) == states(plainly)
        likely = [[(i, 0)] for i in range(4)] + [[(0, 0), (1, 0)], [(0, 0), (1, 0), (2, 0)]]
        ours = decode(model, prompt, setting, GraphDrafter(likely, model), seed)
        assert states(ours) == states(plainly)
        if top_k == 1 and policy == POLICIES[3]:  # greedy tokens, one after the other
            assert ours.stats.accepted > 0

    check()


def test_settings_that_filter_nothing_are_the_settings_without() -> None:
    usual = DecodingSettings.parse(temperature=0.6)
    for off in ({"top_p": 1.0}, {"top_p": 1}, {"top_p": None, "top_k": None}):
        same = DecodingSettings.parse(temperature=0.6, **off)
        assert same == usual
        assert same.model_dump() == usual.model_dump()
    assert "top_k" not in usual.model_dump()
    assert "top_p" not in usual.model_dump_json()
    filtered = DecodingSettings.parse(temperature=0.6, top_k=20, top_p=0.95)
    assert DecodingSettings.model_validate_json(filtered.model_dump_json()) == filtered
    assert filtered.sampling == "temperature 0.6, top_k 20, top_p 0.95"
    assert filtered.changed(temperature=0.0) == DecodingSettings.parse()
    assert filtered.changed(top_k=None).sampling == "temperature 0.6, top_p 0.95"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_p": 0.0, "temperature": 1.0}, "top_p: Input should be greater than 0"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p: Input should be less than or equal to 1"),
        ({"top_p": math.nan, "temperature": 1.0}, "top_p: "),
        ({"top_k": 0, "temperature": 1.0}, "top_k: Input should be greater than or equal to 1"),
        ({"top_k": 2.0, "temperature": 1.0}, "top_k: "),
        ({"top_p": 0.9}, "top_p 0.9 filters what is drawn, and at temperature 0 nothing is"),
        ({"top_k": 5}, "top_k 5 filters what is drawn, and at temperature 0 nothing is"),
    ],
)
def test_wrong_filters_are_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda: DecodingSettings.parse(**options))


def test_a_graph_brings_its_filters_along_until_others_are_given() -> None:
    model = parity_model("sdar-a")
    graph = a_graph_of(model, block_length=4, temperature=0.6, top_k=20, top_p=0.9)

    def of(**options: Any) -> tuple[float, int | None, float | None]:
        found = decoding_settings(model, graph, **options)
        return found.temperature, found.top_k, found.top_p

    assert of() == (0.6, 20, 0.9)
    assert of(top_p=0.5, top_k=3) == (0.6, 3, 0.5)
    assert of(top_p=1.0, top_k=model.vocab_size) == (0.6, None, None)
    assert of(temperature=0.0) == (0.0, None, None)
    assert "top_p 0.5 filters" in refusal(lambda: of(temperature=0.0, top_p=0.5))
    other = decoding_settings(model, graph, top_p=0.5)
    assert graph.differences(other) == ("top_p 0.5 (0.9)",)
    old = a_graph_of(model, block_length=4, temperature=0.6)
    assert "top_k" not in old.to_json()
