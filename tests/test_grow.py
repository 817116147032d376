"""A model grown into a larger shape decodes what it decoded before, by the same states."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from helpers import chain_graph, decode, parity_model, random_prompt, states

from spiffy.bench.grow import SHAPES, Shape, blank, grow, grow_graph, shape_named
from spiffy.calib.prompts import load_prompts
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.draft import Selection, graph_drafter
from spiffy.runtime.draft.acceptance import POSITION_FEATURES, TOKEN_FEATURES
from spiffy.schemas import AcceptanceModel, CacheName, DraftGraph, PolicyName, SpiffyError

NAMES = ("tiny-llada", "tiny-dream", "tiny-sdar")
# Every size larger, heads grouped and twice as wide, a head count that is no power of two.
WIDE = Shape("wide", 6, 384, 12, 6, 128, 544, 1536, tied=True)
UNTIED = Shape("untied", 5, 640, 4, 4, 192, 512, 1100, tied=False)
# The stream as wide as before: no spare dimension, so no added tokens.
NARROW = Shape("narrow", 6, 256, 8, 4, 64, 1024, 1024, tied=True)
CACHES: tuple[tuple[str, CacheName], ...] = (
    ("tiny-llada", "none"),
    ("tiny-llada", "dual"),
    ("tiny-dream", "dual"),
    ("tiny-sdar", "block"),
)
SELECTIONS: tuple[Selection, ...] = ("graph", "model")
GEN_LENGTH = 32
BUDGET = 2


@cache
def small(name: str) -> DiffusionLM:
    return load_model(name, device="cpu", dtype="float32")


@cache
def wide(name: str) -> DiffusionLM:
    return grow(small(name), WIDE)


@cache
def graph(name: str, kind: CacheName, policy: PolicyName) -> DraftGraph:
    """No calibration: all that an acceptance model may ask of the model counts a little."""
    found = chain_graph(name, cache=kind, policy=policy, gen_length=GEN_LENGTH)
    position = dict.fromkeys(POSITION_FEATURES, 0.02) | {"logit": 1.0, "nearness": 1.0}
    acceptance = AcceptanceModel(
        position=position,
        commit=position | {"spread": 0.5} if policy == "threshold" else None,
        token=dict.fromkeys(TOKEN_FEATURES, 0.02) | {"log_p": 1.0},
        bigrams=tuple((token, token + 1, 3) for token in range(100)),
    )
    return found.model_copy(update={"acceptance": acceptance})


@pytest.mark.parametrize("shape", [WIDE, UNTIED, NARROW], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", NAMES)
def test_logits_stay(name: str, shape: Shape) -> None:
    model, grown = small(name), grow(small(name), shape)
    ids = random_prompt(model, 2 * 96).view(2, 96)

    ours, theirs = grown.forward_logits(ids), model.forward_logits(ids)

    assert Shape.of(grown) == replace(shape, name=grown.name)
    assert (ours[..., : model.vocab_size] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_added_tokens_have_no_probability_at_all(name: str, dtype: str) -> None:
    model = load_model(name, device="cpu", dtype=dtype)
    ids = random_prompt(model, 4 * 64).view(4, 64)
    ids[1] = model.mask_token_id
    ids[2] = 7  # everywhere the same: as far from text as it gets
    for shape in (WIDE, UNTIED):
        p = grow(model, shape).forward_logits(ids).double().softmax(-1)

        assert p.isfinite().all()
        assert p[..., model.vocab_size :].max() == 0.0


@pytest.mark.parametrize("policy", ["static", "threshold"])
@pytest.mark.parametrize(("name", "kind"), CACHES)
def test_tokens_states_and_forwards_stay(name: str, kind: CacheName, policy: PolicyName) -> None:
    model, grown = small(name), wide(name)
    ours = graph(name, kind, policy)
    theirs = grow_graph(ours, model, grown)
    settings = decoding_settings(model, ours)
    assert decoding_settings(grown, theirs) == settings
    prompt = model.encode(load_prompts("synthetic", 1, split="test").texts[0])

    pairs = [(decode(model, prompt, settings), decode(grown, prompt, settings))]
    for selection in SELECTIONS:
        drafters = (
            graph_drafter(lm, artifact, settings, BUDGET, selection)
            for lm, artifact in ((model, ours), (grown, theirs))
        )
        before, after = (
            decode(lm, prompt, settings, drafter)
            for lm, drafter in zip((model, grown), drafters, strict=True)
        )
        pairs.append((before, after))

    for before, after in pairs:
        assert states(after) == states(before)
        assert after.stats.nfe == before.stats.nfe
        assert after.stats.positions_computed == before.stats.positions_computed
    if policy == "static":
        assert all(after.stats.accepted for _, after in pairs[1:])


def test_the_same_is_drawn_at_temperatures_above_0() -> None:
    drawn = []
    for lm in (small("tiny-sdar"), wide("tiny-sdar")):
        settings = decoding_settings(lm, gen_length=16, temperature=0.9, stop_at_eos=False)
        prompt = lm.encode(load_prompts("synthetic", 1, split="test").texts[0])
        drawn.append(states(decode(lm, prompt, settings)))
    assert drawn[0] == drawn[1]


def test_what_is_no_weight_stays_but_costs_are_measured_anew() -> None:
    model, grown = small("tiny-sdar"), wide("tiny-sdar")

    assert grown.name == "tiny-sdar grown to wide"
    assert grown.tokenizer is model.tokenizer
    assert (grown.family, grown.mask_token_id, grown.eos_token_ids, grown.max_length) == (
        model.family,
        model.mask_token_id,
        model.eos_token_ids,
        model.max_length,
    )
    assert grown.default_block_length == model.default_block_length
    assert (grown.device, grown.dtype) == (model.device, model.dtype)
    # Costs are remembered by fingerprint, so equal ones would be a lie.
    assert grown.fingerprint != model.fingerprint
    assert grown.fingerprint != grow(model, UNTIED).fingerprint
    assert grow(model, WIDE).fingerprint == grown.fingerprint


def test_a_graph_of_another_model_is_refused() -> None:
    ours = graph("tiny-sdar", "block", "static")
    with pytest.raises(SpiffyError, match="graph"):
        grow_graph(ours, small("tiny-llada"), wide("tiny-llada"))


def test_a_variant_keeps_the_block_size_that_only_its_name_states() -> None:
    model = load_model("tiny-sdar", device="cpu", dtype="float32")
    model.name = "my/tiny-sdar-b16"

    assert grow(model, WIDE).default_block_length == 16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": 4}, "layers 4 is less than its 5"),
        ({"hidden": 128}, "hidden 128 is less than its 256"),
        ({"kv_heads": 2}, "kv_heads 2 is less than its 4"),
        ({"feed_forward": 511}, "feed_forward 511"),
        ({"vocabulary": 1023}, "vocabulary 1023"),
        ({"head_dim": 96}, "head_dim 96 is no multiple of its 64"),
        ({"heads": 10, "kv_heads": 4}, "10 heads cannot share 4 kv_heads"),
        ({"hidden": 256}, "larger vocabulary takes a larger hidden size"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_shape_that_does_not_hold_the_model_is_refused(
    name: str, change: dict[str, int], says: str
) -> None:
    with pytest.raises(SpiffyError, match=says) as refused:
        grow(small(name), replace(WIDE, **change))

    assert "\n" not in str(refused.value)


def test_what_cannot_be_grown_is_refused() -> None:
    grouped = parity_model("sdar-a")  # two heads share a key-value head
    one_each = replace(Shape.of(grouped), name="one each", kv_heads=Shape.of(grouped).heads)
    with pytest.raises(SpiffyError, match="heads share a key-value head"):
        grow(grouped, one_each)
    with pytest.raises(SpiffyError, match="float16"):
        grow(load_model("tiny-sdar", device="cpu", dtype="float16"), WIDE)
    with pytest.raises(SpiffyError, match=r"unknown shape 'large': choose one of 0\.3b"):
        shape_named("large")


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [  # published, except for 0.3b
        ("tiny-sdar", "0.3b", 293_670_656),
        ("tiny-sdar", "qwen3-0.6b", 596_049_920),
        ("tiny-sdar", "qwen3-1.7b", 1_720_574_976),
        ("tiny-sdar", "qwen3-4b", 4_022_468_096),
        ("tiny-sdar", "sdar-4b", 4_411_424_256),
        ("tiny-sdar", "sdar-8b", 8_190_735_360),
        ("tiny-llada", "llada-8b", 8_015_581_184),
        ("tiny-dream", "dream-7b", 7_615_616_512),
    ],
)
def test_real_shapes_have_the_published_sizes(name: str, shape: str, parameters: int) -> None:
    module = blank(small(name), SHAPES[shape])

    assert sum(weight.numel() for weight in module.parameters()) == parameters


def test_memory_is_written_to_even_where_it_is_zero() -> None:
    """Pages that were never written are one page of zeros, and reading them costs nothing."""
    psutil = pytest.importorskip("psutil")
    shape = replace(WIDE, hidden=1024, vocabulary=65536)
    before = psutil.Process().memory_info().rss
    grown = grow(small("tiny-llada"), shape)
    taken = psutil.Process().memory_info().rss - before
    weights = sum(weight.numel() * weight.element_size() for weight in grown.module.parameters())

    assert taken > 0.9 * weights
