"""LLaDA2, iLLaDA, Stable-DiffCoder, A2D, Fast-dLLM: checkpoints, and drafts on them.

Logits and trajectories are in test_parity.py; random weights in float64, as in
test_losslessness.py.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PARITY,
    Checkpoint,
    Oracle,
    decode,
    own_examples,
    parity_model,
    random_prompt,
    states,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from spiffy.calib.record import Recorder, Trace
from spiffy.calib.replay_drafts import replay_drafter
from spiffy.graphs import count_chains, grow, replay
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.draft import GraphDrafter
from spiffy.runtime.forward.cache import NO_EDGES, BlockEdges
from spiffy.runtime.models.diffcoder import STABLE_DIFFCODER
from spiffy.runtime.models.family import Family
from spiffy.runtime.models.illada import ILLADA
from spiffy.runtime.models.llada2 import LLADA2
from spiffy.runtime.models.weights import _in_parts
from spiffy.runtime.step.canvas import Canvas
from spiffy.schemas import DecodingSettings, SpiffyError

QKV_1 = "model.layers.1.attention.query_key_value.weight"
IDS = torch.tensor([[1, 2, 3, 4, 9, 8, 7]])


# ---------------------------------------------------------------- which family it is


@pytest.mark.parametrize(
    ("source", "name", "block", "caches"),
    [
        ("llada2-a", "llada2", 32, ("block",)),
        ("illada-a", "illada", 32, ("none", "dual", "prefix", "prefix-shared")),
        ("sdc-a", "stable-diffcoder", 4, ("block",)),
        ("a2d-mdlm-a", "a2d-mdlm", 32, ("none", "dual", "prefix", "prefix-shared")),
        ("a2d-bd3lm-a", "a2d-bd3lm", 32, ("block",)),
    ],
)
def test_a_family_is_known_by_its_config_or_name(
    source: str, name: str, block: int, caches: tuple[str, ...]
) -> None:
    model = parity_model(source)
    assert (model.family.name, model.family.caches) == (name, caches)
    assert model.default_block_length == block


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], [], None, "Llama", [3, {}]])
def test_a_plain_llama_is_refused(tmp_path: Path, architectures: Any) -> None:
    checkpoint = Checkpoint(tmp_path, "sdc-a")
    checkpoint.config["architectures"] = architectures
    message = checkpoint.refusal()
    assert f"model_type 'llama' is not supported as {architectures}" in message
    assert "llama of StableDiffcoderForCausalLM" in message


@pytest.mark.parametrize("folder", ["qwen3-diffusion", "mdlm-and-bd3lm"])
def test_a_kind_of_a2d_is_never_guessed(tmp_path: Path, folder: str) -> None:
    checkpoint = Checkpoint(tmp_path / folder, "a2d-bd3lm-a")
    message = checkpoint.refusal()
    assert "does not tell which kind of a2d-qwen3 it is" in message
    assert "name says mdlm or bd3lm, or family= in Python (a2d-mdlm or a2d-bd3lm)" in message
    assert checkpoint.load(family="a2d-bd3lm").family.name == "a2d-bd3lm"
    assert checkpoint.load(family="a2d-mdlm").family.name == "a2d-mdlm"


def test_the_kind_is_that_of_the_checkpoint_not_of_the_folders_above(tmp_path: Path) -> None:
    above = tmp_path / "mdlm"
    above.mkdir()
    assert Checkpoint(above / "A2D-BD3LM", "a2d-bd3lm-a").load().family.name == "a2d-bd3lm"


def test_the_kind_is_read_from_the_name_of_a_cached_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--dllm-hub--Qwen3-0.6B-diffusion-bd3lm-v0.1" / "snapshots" / "c0"
    snapshot.parent.mkdir(parents=True)
    assert Checkpoint(snapshot, "a2d-bd3lm-a").load().family.name == "a2d-bd3lm"


def test_a_family_that_does_not_fit_the_config_is_refused(tmp_path: Path) -> None:
    message = Checkpoint(tmp_path, "illada-a").refusal(family="dream")
    assert "family 'dream' does not fit its config.json: illada" in message


@pytest.mark.parametrize(
    ("source", "family", "published"),
    [
        ("llada2-a", LLADA2, 156895),
        ("illada-a", ILLADA, 5),
        ("sdc-a", STABLE_DIFFCODER, 5),
        ("a2d-mdlm-a", None, 151669),
    ],
)
def test_a_mask_token_that_no_file_has_is_the_published_one(
    tmp_path: Path, source: str, family: Family | None, published: int
) -> None:
    checkpoint = Checkpoint(tmp_path / "mdlm", source)
    vocab = checkpoint.config["vocab_size"]
    del checkpoint.config["mask_token_id"]
    if published < vocab:
        assert checkpoint.load().mask_token_id == published
    else:  # of a vocabulary larger than the test's
        assert f"mask_token_id {published} is not a token of {vocab}" in checkpoint.refusal()


@pytest.mark.parametrize(
    ("source", "field", "value"),
    [
        ("llada2-a", "score_function", "softmax"),
        ("llada2-a", "use_qkv_bias", True),
        ("llada2-a", "norm_topk_prob", False),
        ("illada-a", "layer_norm_eps", 1e-5),
        ("illada-a", "attention_bias", True),
        ("sdc-a", "mlp_bias", True),
        ("a2d-mdlm-a", "use_sliding_window", True),
    ],
)
def test_fields_that_select_another_architecture_are_refused(
    tmp_path: Path, source: str, field: str, value: Any
) -> None:
    checkpoint = Checkpoint(tmp_path / "mdlm", source)
    checkpoint.config[field] = value
    assert f"{field} = {value!r} is not supported" in checkpoint.refusal()


# ---------------------------------------------------------------- LLaDA2.0's layout


def test_rows_of_the_fused_matrix_land_in_their_places(tmp_path: Path) -> None:
    loaded = parity_model("llada2-a").module.state_dict()
    stored = Checkpoint(tmp_path, "llada2-a").weights
    attention = "model.layers.1.self_attn."
    parts = [loaded[f"{attention}{part}_proj.weight"] for part in "qkv"]
    assert [len(part) for part in parts] == [96, 48, 48]
    assert torch.equal(torch.cat(parts), stored[QKV_1])


def test_parts_of_a_stored_matrix_are_read_one_by_one() -> None:
    read: list[Any] = []

    class Stored:
        def get_shape(self) -> list[int]:
            return [8, 3]

        def __getitem__(self, index: Any) -> Tensor:
            read.append(index)
            return torch.arange(24).view(8, 3)[index]

    split = {"qkv": {"q": 4, "k": 2, "v": 2}}
    parts = _in_parts("x", LLADA2, {"qkv": Stored(), "other": Stored()}, split)
    assert sorted(parts) == ["k", "other", "q", "v"]
    assert parts["k"].get_shape() == [2, 3]
    assert read == []
    assert torch.equal(parts["k"][...], torch.arange(12, 18).view(2, 3))
    assert read == [slice(4, 6)]


def test_a_fused_matrix_of_another_height_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "llada2-a")
    checkpoint.weights[QKV_1] = checkpoint.weights[QKV_1][:-1].clone()
    assert f"mismatched parameter {QKV_1}" in checkpoint.refusal()


def test_a_missing_fused_matrix_is_named_by_its_parts(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "llada2-a")
    del checkpoint.weights[QKV_1]
    message = checkpoint.refusal()
    assert "missing parameter model.layers.1.self_attn.k_proj.weight (3 in all)" in message


@pytest.mark.parametrize("layer", [3, 46, 92])
def test_a_surplus_layer_is_refused(tmp_path: Path, layer: int) -> None:
    """Transformers' GLM would skip layers 46 and 92 without a word."""
    checkpoint = Checkpoint(tmp_path, "llada2-a")
    extra = f"model.layers.{layer}.input_layernorm.weight"
    checkpoint.weights[extra] = torch.ones(48)
    assert f"unexpected parameter {extra}" in checkpoint.refusal()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_group": 3}, "16 experts do not make 3 groups"),
        ({"n_group": 16}, "16 experts do not make 16 groups"),
        ({"topk_group": 5}, "4 groups of which 5 are kept"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is more than"),
        ({"num_shared_experts": 0}, "num_shared_experts 0 must be"),
        ({"n_group": "4"}, "n_group '4' must be a whole number"),
    ],
)
def test_experts_that_do_not_add_up_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    checkpoint = Checkpoint(tmp_path, "llada2-a")
    checkpoint.config |= changes
    assert reason in checkpoint.refusal()


def test_a_device_map_loads_the_same(tmp_path: Path) -> None:
    whole = parity_model("llada2-a")
    mapped = load_model(str(PARITY / "llada2-a"), device_map="cpu", dtype="float32")
    assert torch.equal(mapped.forward_logits(IDS), whole.forward_logits(IDS))


# ---------------------------------------------------------------- A2D's layouts


def test_qwen2_with_its_biases_loads_and_attends_everywhere(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "mdlm", "a2d-mdlm-a")
    config = checkpoint.config
    config |= {"model_type": "a2d-qwen2", "head_dim": None}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields = {name: config[name] for name in (*names, "num_attention_heads", "num_key_value_heads")}
    torch.manual_seed(0)
    official = Qwen2ForCausalLM(
        Qwen2Config(
            **fields,
            rms_norm_eps=config["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            tie_word_embeddings=True,
            max_position_embeddings=256,
        )
    ).eval()
    for name, value in official.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    tied = official.state_dict()
    checkpoint.weights = {k: v.detach().clone() for k, v in tied.items() if k != "lm_head.weight"}
    everywhere = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    with torch.inference_mode():
        expected = official(input_ids=IDS, attention_mask=everywhere, use_cache=False).logits
    ours = checkpoint.load().forward_logits(IDS)
    assert expected.std() > 0.01
    assert (ours - expected).abs().max() < 1e-5


def test_a_tied_head_may_be_stored_as_well(tmp_path: Path) -> None:
    """As the published sizes of A2D's checkpoints suggest."""
    checkpoint = Checkpoint(tmp_path / "mdlm", "a2d-mdlm-a")
    checkpoint.weights["lm_head.weight"] = checkpoint.weights["model.embed_tokens.weight"].clone()
    logits = checkpoint.load().forward_logits(IDS)
    assert torch.equal(logits, parity_model("a2d-mdlm-a").forward_logits(IDS))


# ---------------------------------------------------------------- where blocks lie


def test_blocks_from_position_0_open_with_the_prompts_tail() -> None:
    canvas = Canvas.plan(11, 16, 8, block_causal=True)
    assert [canvas.span(k) for k in range(canvas.blocks)] == [
        range(8, 16),
        range(16, 24),
        range(24, 32),
    ]
    assert canvas.answer(0) == range(11, 16)
    assert canvas.attention_blocks(0, 16) == [range(8), range(8, 16)]


def test_a_cut_block_ends_with_the_answer() -> None:
    canvas = Canvas.plan(11, 16, 8, block_causal=True, cut=True)
    assert canvas.span(2) == range(24, 27)
    assert canvas.length == 27
    assert canvas.blocks == 3


@pytest.mark.parametrize(
    ("prompt", "before"),
    [(3, [range(3)]), (8, [range(8)]), (19, [range(3), range(3, 11), range(11, 19)])],
)
def test_blocks_that_end_with_the_prompt_leave_its_first_one_shorter(
    prompt: int, before: list[range]
) -> None:
    canvas = Canvas.plan(prompt, 12, 8, block_causal=True, ends_with_prompt=True, cut=True)
    assert canvas.attention_blocks(0, prompt) == before
    spans = [canvas.span(k) for k in range(canvas.blocks)]
    assert spans == [range(prompt, prompt + 8), range(prompt + 8, prompt + 12)]
    assert canvas.attention_blocks(prompt, prompt + 8) == spans[:1]
    assert canvas.attention_blocks(prompt, prompt) == []


# ---------------------------------------------------------------- drafts

Fills = list[list[tuple[int, int]]]

# 21 is no multiple of 8: the last block is cut where the family cuts it.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llada2": ("llada2-a", {"cache": "block", "gen_length": 16}),
    "illada-none": ("illada-a", {"cache": "none", "gen_length": 16}),
    "illada-dual": ("illada-a", {"cache": "dual", "gen_length": 16}),
    "illada-prefix": ("illada-a", {"cache": "prefix", "gen_length": 16}),
    "diffcoder": ("sdc-a", {"cache": "block", "gen_length": 21}),
    "mdlm-none": ("a2d-mdlm-a", {"cache": "none", "gen_length": 16}),
    "mdlm-dual": ("a2d-mdlm-a", {"cache": "dual", "gen_length": 16}),
    "mdlm-prefix": ("a2d-mdlm-a", {"cache": "prefix", "gen_length": 16}),
    "bd3lm": ("a2d-bd3lm-a", {"cache": "block", "gen_length": 21}),
}
POLICIES: dict[str, dict[str, Any]] = {
    "static": {},
    "uneven": {"steps_per_block": 3},
    "round": {"steps_per_block": 3, "schedule": "round"},
    "threshold": {"policy": "threshold", "threshold": 0.5},
    "entropy-bounded": {"policy": "entropy-bounded", "entropy_bound": 2.0},
}
COMBINATIONS = [
    pytest.param(layout, policy, id=f"{layout}-{policy}")
    for layout in LAYOUTS
    for policy in POLICIES
    if "prefix" not in layout or policy == "static"  # for time's sake
]
# Known drafts at one temperature where there are many policies, so that every layout, and every
# policy, meets both; random drafts draw theirs.
DEGREES = [
    (layout, policy, temperature)
    for layout, policy in (case.values for case in COMBINATIONS)
    for k, temperature in enumerate((0.0, 0.7))
    if "prefix" in layout or ([*LAYOUTS].index(layout) + [*POLICIES].index(policy)) % 2 == k
]


def setting_of(
    layout: str, policy: str, temperature: float = 0.0
) -> tuple[DiffusionLM, DecodingSettings]:
    checkpoint, options = LAYOUTS[layout]
    options = {**options, **POLICIES[policy], "block_length": 8, "temperature": temperature}
    return parity_model(checkpoint, "float64"), DecodingSettings.parse(stop_at_eos=False, **options)


@cache
def plain(layout: str, policy: str, temperature: float = 0.0, prompt_length: int = 11) -> Task:
    model, setting = setting_of(layout, policy, temperature)
    return decode(model, random_prompt(model, prompt_length), setting)


def assert_lossless(ours: Task, plainly: Task) -> None:
    assert states(ours) == states(plainly)
    assert ours.stats.nfe + ours.stats.accepted == plainly.stats.nfe


def fills() -> st.SearchStrategy[Fills]:
    pair = st.tuples(st.integers(0, 3), st.one_of(st.integers(0, 2), st.integers(0, 400)))
    return st.lists(st.lists(pair, min_size=1, max_size=8), max_size=12)


@pytest.mark.parametrize(("layout", "policy"), COMBINATIONS)
def test_any_drafts_leave_every_state_as_it_was(layout: str, policy: str) -> None:
    @own_examples(layout, policy)
    @settings(max_examples=6)
    @given(
        graph=fills(),
        temperature=st.sampled_from((0.0, 0.7)),
        prompt_length=st.sampled_from([1, 8, 11]),
    )
    def check(graph: Fills, temperature: float, prompt_length: int) -> None:
        model, setting = setting_of(layout, policy, temperature)
        plainly = plain(layout, policy, temperature, prompt_length)
        assert_lossless(decode(model, plainly.prompt, setting, GraphDrafter(graph, model)), plainly)

    check()


@pytest.mark.parametrize(("layout", "policy", "temperature"), DEGREES)
def test_drafts_that_hit_leave_every_state_as_it_was(
    layout: str, policy: str, temperature: float
) -> None:
    model, setting = setting_of(layout, policy, temperature)
    plainly = plain(layout, policy, temperature)
    ours = decode(model, plainly.prompt, setting, Oracle(plainly, depth=3))
    assert_lossless(ours, plainly)
    assert ours.stats.accepted > 0


@pytest.mark.parametrize("layout", ["llada2", "diffcoder", "bd3lm"])
def test_block_edges_change_the_cost_and_never_the_tokens(layout: str) -> None:
    model, setting = setting_of(layout, "static")
    plainly = plain(layout, "static")
    whole = decode(model, plainly.prompt, setting, edges=NO_EDGES)
    drafted = decode(model, plainly.prompt, setting, Oracle(plainly, depth=3), edges=NO_EDGES)
    assert states(whole) == states(drafted) == states(plainly)
    assert drafted.stats.nfe < whole.stats.nfe
    assert whole.stats.nfe > plainly.stats.nfe  # stores are forwards of their own


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batched_decoding_equals_one_by_one(layout: str) -> None:
    """Prompts of several lengths, so first and last blocks of several lengths share forwards."""
    model, setting = setting_of(layout, "static")
    prompts = [random_prompt(model, length) for length in (1, 8, 11)]
    tasks = [make_task(model, prompt, setting) for prompt in prompts]
    for _ in run(model, tasks, batch_size=3):
        pass
    alone = [plain(layout, "static", 0.0, len(prompt)) for prompt in prompts]
    assert [states(task) for task in tasks] == [states(task) for task in alone]


@pytest.mark.parametrize("policy", ["static", "entropy-bounded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replay_predicts_the_forwards_of_real_decoding(layout: str, policy: str) -> None:
    model, setting = setting_of(layout, policy)
    prompts = [random_prompt(model, length) for length in (5, 8, 11)]
    traces = [Trace.of(decode(model, prompt, setting, Recorder())) for prompt in prompts]
    graph = grow(count_chains(trace.chains for trace in traces), 12)
    # What a rejected draft says about the next block is not in a plain decode's record.
    edges = BlockEdges(first=setting.cache != "block")
    for prompt, trace in zip(prompts, traces, strict=True):
        ours = decode(model, prompt, setting, GraphDrafter(graph, model), edges=edges)
        predicted = replay([trace.chains], set(graph))
        assert (ours.stats.steps, ours.stats.nfe) == (predicted.steps, predicted.forwards)


JOINT = {"policy": "joint", "threshold": 0.5, "edit_threshold": 0.6, "max_post_steps": 4}


@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ("fastdllm2-a", {"sub_block_length": 4}),
        ("fastdllm2-a", {"sub_block_length": 4, "policy": "threshold", "threshold": 0.5}),
        ("llada21-a", JOINT),
        ("llada21-a", JOINT | {"edit_threshold": 1.0}),
        ("llada-a", JOINT | {"cache": "none"}),
    ],
)
def test_replay_predicts_forwards_of_sub_blocks_and_edits(
    checkpoint: str, options: dict[str, Any]
) -> None:
    """By nodes and by the drafts of a model; some of the steps find nothing to replace."""
    model = parity_model(checkpoint, "float64")
    base: dict[str, Any] = {"cache": "block", "block_length": 8, "gen_length": 16}
    setting = DecodingSettings.parse(stop_at_eos=False, **(base | options))
    prompts = [random_prompt(model, length) for length in (5, 8, 11, 14)]
    traces = [Trace.of(decode(model, prompt, setting, Recorder())) for prompt in prompts]
    graph = grow(count_chains(trace.chains for trace in traces), 12)
    assert graph
    edges = BlockEdges(first=setting.cache != "block")
    for prompt, trace in zip(prompts, traces, strict=True):
        plainly = decode(model, prompt, setting)
        drafter = GraphDrafter(graph, model)
        ours = decode(model, prompt, setting, drafter, edges=edges)
        assert_lossless(ours, plainly)
        assert ours.stats.nfe == replay([trace.chains], set(graph)).forwards
        assert ours.stats.nfe == replay_drafter([trace], drafter).forwards


def test_a_sub_block_is_finished_before_the_next_one_is_begun() -> None:
    model = parity_model("llada-a", "float64")
    setting = DecodingSettings.parse(
        cache="none", block_length=8, sub_block_length=4, gen_length=16, stop_at_eos=False
    )
    task = decode(model, random_prompt(model, 5), setting)
    order = [
        int((after.ids != before.ids).nonzero()[0, 0]) - 5
        for before, after in pairwise([task.canvas.start(task.prompt, 0), *task.path])
    ]
    assert [position // 4 for position in order[1:]] == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sub_block_length": 3}, "sub_block_length 3 does not divide block_length 8"),
        ({"policy": "joint", "cache": "dual"}, "decodes with cache none or block, not dual"),
        ({"policy": "joint", "score": "margin"}, "it takes no 'margin'"),
        ({"policy": "joint", "edit_threshold": 1.5}, "edit_threshold"),
        ({"policy": "joint", "max_post_steps": -1}, "max_post_steps"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpiffyError, match=reason):
        DecodingSettings.parse(block_length=8, gen_length=16, **options)


def test_what_joint_and_sub_blocks_read_is_stated_only_with_them() -> None:
    """So that what was calibrated before there were any keeps its digest."""
    new = {"edit_threshold", "max_post_steps", "sub_block_length"}
    assert not new & DecodingSettings.parse().model_dump().keys()
    given = DecodingSettings.parse(policy="joint", cache="block", sub_block_length=8)
    assert new <= given.model_dump().keys()
    assert DecodingSettings.parse(**given.model_dump()) == given


def test_fast_dllm_decodes_by_its_own_sub_blocks_unless_told_otherwise() -> None:
    model = parity_model("fastdllm2-a")
    assert decoding_settings(model).sub_block_length == 8
    assert decoding_settings(model, sub_block_length=4).sub_block_length == 4
    assert decoding_settings(parity_model("sdar-a")).sub_block_length is None


def test_joint_does_not_edit_what_the_model_says_nothing_of() -> None:
    with pytest.raises(SpiffyError, match="policy joint cannot edit it"):
        decoding_settings(parity_model("fastdllm2-a"), policy="joint")


def test_settings_may_be_dumped_in_part() -> None:
    settings = DecodingSettings.parse(threshold=0.8)
    assert settings.model_dump(exclude_defaults=True) == {"threshold": 0.8}
    assert settings.model_dump(include={"policy"}) == {"policy": "static"}
