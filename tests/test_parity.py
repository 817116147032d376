"""Logits and trajectories of the official model code and decoding loops, reproduced exactly.

tests/parity/*/README.md say how the goldens were made. They hold the state after every official
forward; forwards that commit nothing (cache refreshes of a full block, stores, zero-token steps)
repeat a state, so repeats are folded on both sides.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import PARITY, decode, fold, parity_model, states, with_eos
from safetensors.torch import load_file
from torch import Tensor

from spiffy.runtime import generate
from spiffy.runtime.decode import make_task, run
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.schemas import DecodingSettings, SpiffyError

CHECKPOINTS = ("llada-a", "dream-a", "sdar-a")
GOLDEN: dict[str, dict[str, Any]] = {
    name: json.loads((PARITY / name / "golden.json").read_text()) for name in CHECKPOINTS
}
SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


def options_of(run: dict[str, Any]) -> dict[str, Any] | None:
    """The official settings in our terms; None where we promise something else."""
    given, function = run["settings"], run["function"]
    if given.get("eps", 1e-3) != 1e-3 or given.get("draw") == "multinomial":
        return None  # we have no such options
    if function == "dream.diffusion_generate":
        length, score = given["max_new_tokens"], SCORES[given["alg"]]
        options: dict[str, Any] = {"policy": "static", "score": score, "schedule": "timestep"}
        options |= {"block_length": length, "steps_per_block": given["steps"]}
    elif function.startswith("fast_dllm.block") and given["alg"] in SCORES:
        # Every block has timesteps of its own, and whatever `alg` says, this loop ranks by entropy
        # (the recorded confidences are negative).
        blocks = given["max_new_tokens"] // given["block_length"]
        options = {"policy": "static", "score": "entropy", "schedule": "timestep"}
        options |= {"steps_per_block": given["steps"] // blocks}
    elif function == "fast_dllm.diffusion_generate":
        return None  # its threshold also caps a step at masks / steps
    elif function == "sdar.block_diffusion_generate":
        strategy = given["remasking_strategy"]
        policy = {"low_confidence_dynamic": "threshold", "sequential": "sequential"}
        options = {"policy": policy.get(strategy, "static"), "cache": "block"}
        options |= {"steps_per_block": given["denoising_steps"]}
        if policy.get(strategy) == "threshold":
            options["threshold"] = given["confidence_threshold"]
    elif given.get("threshold") is not None:
        options = {"policy": "threshold", "threshold": given["threshold"]}
    else:
        blocks = given["gen_length"] // given["block_length"]
        options = {"policy": "static", "steps_per_block": given["steps"] // blocks}
    if function == "fast_dllm.block.diffusion_generate":
        options["cache"] = "dual" if given["dual_cache"] else "prefix"
    elif function.startswith("fast_dllm.generate_with"):
        options["cache"] = "dual" if "dual" in function else "prefix"
    gen_length = given.get("gen_length") or given["max_new_tokens"]
    geometry = {"gen_length": gen_length, "block_length": given.get("block_length", gen_length)}
    return {**geometry, **options}


def trajectories() -> list[Any]:
    """One case per recorded decode and batch row: checkpoint, name, row (None: no batch)."""
    cases = []
    for checkpoint, golden in GOLDEN.items():
        for recorded in golden["decode"]:
            if options_of(recorded) is None:
                continue
            batch = isinstance(recorded["prompt_ids"][0], list)
            for row in range(len(recorded["prompt_ids"])) if batch else [None]:
                name = recorded["name"] if row is None else f"{recorded['name']}-row{row}"
                cases.append(pytest.param(checkpoint, recorded, row, id=f"{checkpoint}-{name}"))
    return cases


def row_of(recorded: dict[str, Any], row: int | None) -> tuple[Tensor, list[list[int]], list[int]]:
    """Prompt, states and final ids of one sequence; left padding cut off."""
    prompt, official, final = (recorded[k] for k in ("prompt_ids", "states", "final_ids"))
    if row is not None:
        prompt, official, final = prompt[row], [state[row] for state in official], final[row]
    padding = 0
    if row is not None and "attention_mask" in recorded:
        padding = recorded["attention_mask"][row].count(0)
    return torch.tensor(prompt[padding:]), [s[padding:] for s in official], final[padding:]


FORWARDS = [
    pytest.param(checkpoint, case, id=f"{checkpoint}-{case['name']}")
    for checkpoint, golden in GOLDEN.items()
    for case in golden["forward"]
    if "attention_mask" not in case  # forward_logits takes no padded batches
]


@pytest.mark.parametrize(("checkpoint", "case"), FORWARDS)
def test_logits_equal_the_official_models(checkpoint: str, case: dict[str, Any]) -> None:
    model = parity_model(checkpoint)
    ours = model.forward_logits(torch.tensor(case["input_ids"]), case.get("block_length"))
    official = load_file(PARITY / checkpoint / "golden.safetensors")[case["logits"]]
    if model.family.logit_shift:  # the official rows are raw: row k speaks of token k + 1
        ours, official = ours[:, 1:], official[:, :-1]
    assert ours.shape == official.shape
    assert ours.dtype == torch.float32
    assert (ours - official).abs().max() < 5e-4


def test_a_shifted_family_keeps_the_raw_row_of_position_0() -> None:
    case = GOLDEN["dream-a"]["forward"][0]
    ours = parity_model("dream-a").forward_logits(torch.tensor(case["input_ids"]))
    official = load_file(PARITY / "dream-a" / "golden.safetensors")[case["logits"]]
    assert (ours[:, 0] - official[:, 0]).abs().max() < 5e-4


def test_bidirectional_families_refuse_an_attention_block_length() -> None:
    with pytest.raises(SpiffyError, match="takes no block_length"):
        parity_model("llada-a").forward_logits(torch.tensor([[1, 2, 3]]), block_length=4)


@pytest.mark.parametrize(("checkpoint", "recorded", "row"), trajectories())
def test_trajectory_equals_the_official_loop(
    checkpoint: str, recorded: dict[str, Any], row: int | None
) -> None:
    options = options_of(recorded)
    assert options is not None
    model = parity_model(checkpoint)
    stops = recorded["settings"].get("stopping_criteria_idx")
    if stops:
        model = with_eos(model, stops)
    prompt, official, final = row_of(recorded, row)
    task = decode(model, prompt, DecodingSettings.parse(**options, stop_at_eos=bool(stops)))
    start = [[*prompt.tolist(), *[model.mask_token_id] * (len(final) - len(prompt))]]
    assert fold(start + states(task)) == fold(start + official)
    assert states(task)[-1] == final


@pytest.mark.parametrize(("checkpoint", "recorded", "row"), trajectories())
def test_plain_decoding_spends_a_forward_only_where_something_is_committed_or_stored(
    checkpoint: str, recorded: dict[str, Any], row: int | None
) -> None:
    """The official loops' forwards, less those that neither commit nor are needed later."""
    options = options_of(recorded)
    assert options is not None
    stops = recorded["settings"].get("stopping_criteria_idx")
    model = with_eos(parity_model(checkpoint), stops or ())
    prompt, official, _ = row_of(recorded, row)
    task = decode(model, prompt, DecodingSettings.parse(**options, stop_at_eos=bool(stops)))
    start = [*prompt.tolist(), *[model.mask_token_id] * (len(official[0]) - len(prompt))]
    committing = len(fold([start, *official])) - 1
    assert task.stats.nfe == committing  # stores ride in forwards that commit
    assert task.stats.accepted == task.stats.drafted == 0
    unfolded = decode(model, prompt, task.settings, edges=BlockEdges(fold=False))
    # The official SDAR loop stores the last block as well, which nothing will read.
    stores = recorded.get("nfe_prefill", 0) + max(recorded.get("nfe_store", 0) - 1, 0)
    assert unfolded.stats.nfe == committing + stores
    assert states(unfolded) == states(task)


def test_rows_of_an_official_batch_equal_ours_decoded_in_one_batch() -> None:
    recorded = next(r for r in GOLDEN["llada-a"]["decode"] if "batch2" in r["name"])
    options = options_of(recorded)
    assert options is not None
    settings = DecodingSettings.parse(**options, stop_at_eos=False)
    model = parity_model("llada-a")
    tasks = [make_task(model, torch.tensor(ids), settings) for ids in recorded["prompt_ids"]]
    for _ in run(model, tasks, batch_size=2):
        pass
    assert [states(task)[-1] for task in tasks] == recorded["final_ids"]


def test_generate_returns_the_answer_and_every_state() -> None:
    recorded = next(r for r in GOLDEN["llada-a"]["decode"] if r["name"] == "full_L8_2tok")
    options = options_of(recorded)
    assert options is not None
    prompt = torch.tensor(recorded["prompt_ids"])
    out = generate(parity_model("llada-a"), prompt, trace=True, stop_at_eos=False, **options)
    assert out.states == recorded["states"]
    assert out.token_ids == recorded["final_ids"][len(prompt) :]
    assert out.stats.steps == out.stats.nfe == recorded["nfe"]
    assert out.stats.positions_computed == recorded["nfe"] * len(recorded["final_ids"])
