"""Noise: published numbers, the exact law, and the same draws whatever else is drawn."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import sampling
import torch
from scipy.stats import chi2_contingency, chisquare, kstest
from torch import Tensor

from spiffy.runtime.step import noise
from spiffy.runtime.step.noise import Noise, exponential, numbers
from spiffy.runtime.step.weights import weights_of

NOISE = Noise(seed=7, sequence=2)


def keys(rows: int, committed: int = 3) -> Tensor:
    return NOISE.keys(torch.tensor(committed), 0, torch.arange(rows))


def draw(log_p: Tensor, temperature: float, own: Tensor) -> Tensor:
    return noise.draw(weights_of(log_p, temperature), own)


def log_softmax(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(shape[-1])
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (3 * logits).log_softmax(-1)


@pytest.mark.parametrize(
    ("seed", "published"),
    [  # of the authors' C and Java sources, as reference values of it are passed around
        (0, (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)),
        (1234567, (6457827717110365317, 3203168211198807973, 9817491932198370423)),
    ],
)
def test_numbers_are_those_of_splitmix64(seed: int, published: tuple[int, ...]) -> None:
    found = numbers(torch.tensor(seed), torch.arange(len(published)))
    assert found.numpy().view(np.uint64).tolist() == list(published)


def test_keys_and_tokens_are_those_of_the_definition() -> None:
    log_p = log_softmax(8, 300)  # two groups and a part of one
    for committed, redraw, temperature in ((0, 0, 1.0), (5, 2, 0.3)):
        made = NOISE.keys(torch.tensor(committed), redraw, torch.arange(90, 98))
        places = [sampling.key_of(7, 2, committed, redraw, at) for at in range(90, 98)]
        assert made.numpy().view(np.uint64).tolist() == places
        tokens = draw(log_p, temperature, made)
        rows = zip(log_p.tolist(), places, strict=True)
        assert tokens.tolist() == [sampling.drawn(row, temperature, key) for row, key in rows]


def test_keys_differ_by_all_that_they_depend_on() -> None:
    places = product((0, 1, 11, -1, 1 << 70), (0, 1, 11), (0, 1, 11), (0, 1), (0, 1, 11))
    made = [
        int(Noise(seed, sequence).keys(torch.tensor(committed), redraw, torch.tensor([at])))
        for seed, sequence, committed, redraw, at in places
    ]
    assert len(set(made)) == len(made) == 5 * 3 * 3 * 2 * 3


def test_what_else_is_drawn_changes_nothing() -> None:
    """Rows one by one, in any order, in parts or all at once; nor do global generators."""
    log_p, own = log_softmax(12, 700), keys(12)
    whole, tokens = exponential(own, 200), draw(log_p, 0.8, own)
    state = torch.random.get_rng_state()
    order = [5, 0, 11, 3]
    assert torch.equal(exponential(own[order], 200), whole[order])
    assert torch.equal(exponential(own, 7), whole[:, :7])
    for rows in ([5, 0, 11, 3], [4], []):
        assert draw(log_p[rows], 0.8, own[rows]).tolist() == tokens[rows].tolist()
    parts = zip(log_p.split(5), own.split(5), strict=True)
    assert torch.equal(torch.cat([draw(part, 0.8, mine) for part, mine in parts]), tokens)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_numbers_are_standard_exponential_and_independent() -> None:
    """Along a row, from position to position and from step to step."""
    steps = torch.stack([exponential(keys(40, committed), 250) for committed in range(10)])
    assert steps.dtype == torch.float64
    assert kstest(steps.flatten().numpy(), "expon").pvalue > 1e-4
    uniform = steps.neg().exp().unflatten(2, (-1, 2))  # [10, 40, 125, 2]
    ends = (uniform[:, :, :, 0], uniform[:, :, :, 1])
    neighbours = [ends, (uniform[:, :-1], uniform[:, 1:]), (uniform[:-1], uniform[1:])]
    for one, other in neighbours:
        counts, _, _ = np.histogram2d(one.flatten(), other.flatten(), bins=8, range=[[0, 1]] * 2)
        assert chisquare(counts.flatten()).pvalue > 1e-4
    correlations = np.corrcoef(uniform.flatten(2).flatten(0, 1).numpy())
    assert np.abs(correlations[~np.eye(400, dtype=np.bool_)]).max() < 6 / 250**0.5


@pytest.mark.parametrize(("vocab", "temperature"), [(5, 1.0), (300, 0.5), (384, 1.5)])
def test_tokens_follow_the_tempered_softmax(vocab: int, temperature: float) -> None:
    """Whatever group of the vocabulary they are in; the last ones weigh most."""
    log_p = torch.linspace(-1, 1, vocab, dtype=torch.float64).log_softmax(-1)
    tokens = draw(log_p.expand(60_000, -1), temperature, keys(60_000))
    expected = (log_p / temperature).softmax(-1) * len(tokens)
    assert chisquare(tokens.bincount(minlength=vocab), expected).pvalue > 1e-4


def test_positions_and_steps_draw_independently() -> None:
    log_p = log_softmax(6).expand(20_000, -1)
    one, other = (draw(log_p, 1.5, keys(20_000, committed)) for committed in (3, 4))
    for first, second in ((one, other), (one[:-1], one[1:])):
        table = (first * 6 + second).bincount(minlength=36).reshape(6, 6)
        assert chi2_contingency(table.numpy()).pvalue > 1e-4


def test_a_vocabulary_that_is_filled_up_draws_the_same() -> None:
    log_p, own = log_softmax(50, 300), keys(50)
    filled = torch.nn.functional.pad(log_p, (0, 700), value=-torch.inf)
    assert torch.equal(draw(filled, 0.9, own), draw(log_p, 0.9, own))


def test_extreme_temperatures_and_weights() -> None:
    log_p, own = log_softmax(50, 300), keys(50)
    best = log_p.argmax(-1)
    for temperature in (5e-324, 1e-300, 1e-6):
        assert torch.equal(draw(log_p, temperature, own), best)
    log_p[:, torch.arange(300) % 7 > 0] = -torch.inf
    tokens = draw(log_p, 1000.0, own)
    assert (tokens % 7 == 0).all()
    assert len(set(tokens.tolist())) > 20
    log_p[:] = -torch.inf
    log_p[:, 299] = -800.0
    assert draw(log_p, 1.0, own).tolist() == [299] * 50


def test_uniform_numbers_are_never_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest 64 bits."""
    ends = torch.tensor([[-(1 << 63), (1 << 63) - 1]])
    monkeypatch.setattr(noise, "numbers", lambda *_: ends)
    large, small = exponential(torch.tensor([0]), 2)[0].tolist()
    assert large == pytest.approx(53 * math.log(2))
    assert small == pytest.approx(2.0**-53)
