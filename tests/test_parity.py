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

CHECKPOINTS = (
    "llada-a",
    "dream-a",
    "sdar-a",
    "llada2-a",
    "illada-a",
    "illadalike-a",
    "sdc-a",
    "a2d-mdlm-a",
    "a2d-bd3lm-a",
    "llada21-a",
    "fastdllm2-a",
)
GOLDEN: dict[str, dict[str, Any]] = {
    name: json.loads((PARITY / name / "golden.json").read_text()) for name in CHECKPOINTS
}
SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


def recorded_length(run: dict[str, Any]) -> int:
    """Answer tokens up to the last block's end; Fast-dLLM v2 predicts one more."""
    return len(run["final_ids"]) - len(run["prompt_ids"]) - 1


def options_of(run: dict[str, Any]) -> dict[str, Any] | None:
    """The official settings in our terms; None where we promise something else."""
    given, function = run["settings"], run["function"]
    if given.get("eps", 1e-3) != 1e-3 or given.get("draw") == "multinomial":
        return None  # we have no such options
    if given.get("right_shift_logits") or given.get("eos_early_stop"):
        return None  # nor these
    if function == "stable_diffcoder.generate_block" and given["eos_id"] is not None:
        return None  # it overwrites what follows an EOS in its block
    if function == "dllm.mdlm.sample" and given["max_new_tokens"] % given["block_size"]:
        return None  # blocks of a bidirectional model are whole
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
    elif function == "llada2.generate":
        options = {"cache": "block", "steps_per_block": min(given["steps"], given["block_length"])}
        if given["threshold"] < 1:  # no confidence exceeds 1: the schedule alone
            options |= {"policy": "threshold", "threshold": given["threshold"]}
    elif function == "llada21.generate":
        options = {"policy": "joint", "cache": "block", "threshold": given["threshold"]}
        options |= {"edit_threshold": given["editing_threshold"]}
        options |= {"tokens_per_step": given["num_to_transfer"]}
        options |= {"max_post_steps": given["max_post_steps"]}
    elif function == "fast_dllm_v2.generate":
        if given["use_block_cache"] or given["stop_token"] != -1:
            return None  # stale keys and values; a block that is left before it is full
        options = {"cache": "block", "block_length": given["block_size"]}
        options |= {"sub_block_length": given["small_block_size"]}
        if given["threshold"] < 1:
            options |= {"policy": "threshold", "threshold": given["threshold"]}
        return {**options, "gen_length": recorded_length(run)}
    elif function == "stable_diffcoder.generate_block":
        options = {"cache": "block"}
        if given["threshold"] is None:
            options["steps_per_block"] = given["steps_per_block"]
        else:
            options |= {"policy": "threshold", "threshold": given["threshold"]}
    elif function.startswith("dllm."):
        blocks = -(-given["max_new_tokens"] // given["block_size"])
        steps = given.get("steps_per_block") or -(-given["steps"] // blocks)
        options = {"cache": "none" if "mdlm" in function else "block", "schedule": "round"}
        options |= {"steps_per_block": steps, "block_length": given["block_size"]}
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


def stops_of(recorded: dict[str, Any]) -> list[int]:
    """Tokens that end the official loop after their block."""
    given = recorded["settings"]
    eos = given.get("eos_id")
    return given.get("stopping_criteria_idx") or ([] if eos in (None, -1) else [eos])


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
    stop = -1 if recorded["function"] == "fast_dllm_v2.generate" else None
    cut = slice(padding, stop)
    return torch.tensor(prompt[padding:]), [s[cut] for s in official], final[cut]


FORWARDS = [
    pytest.param(checkpoint, case, id=f"{checkpoint}-{case['name']}")
    for checkpoint, golden in GOLDEN.items()
    for case in golden["forward"]
    if "attention_mask" not in case  # forward_logits takes no padded batches
]


@pytest.mark.parametrize(("checkpoint", "case"), FORWARDS)
def test_logits_equal_the_official_models(checkpoint: str, case: dict[str, Any]) -> None:
    model = parity_model(checkpoint)
    blocks = {key: case[key] for key in ("block_length", "first_block") if key in case}
    ours = model.forward_logits(torch.tensor(case["input_ids"]), **blocks)
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
    for option in ("block_length", "first_block"):
        with pytest.raises(SpiffyError, match=f"takes no {option}"):
            parity_model("llada-a").forward_logits(torch.tensor([[1, 2, 3]]), **{option: 4})


@pytest.mark.parametrize("first", [0, 5])
def test_a_first_block_larger_than_the_others_is_refused(first: int) -> None:
    model = parity_model("a2d-bd3lm-a")
    with pytest.raises(SpiffyError, match=f"first_block {first} must be 1 to block_length 4"):
        model.forward_logits(torch.tensor([[1, 2, 3]]), block_length=4, first_block=first)


@pytest.mark.parametrize(("checkpoint", "recorded", "row"), trajectories())
def test_trajectory_equals_the_official_loop(
    checkpoint: str, recorded: dict[str, Any], row: int | None
) -> None:
    """In its forwards, less those that neither commit nor are needed later."""
    options = options_of(recorded)
    assert options is not None
    stops = stops_of(recorded)
    model = with_eos(parity_model(checkpoint), stops)
    prompt, official, final = row_of(recorded, row)
    task = decode(model, prompt, DecodingSettings.parse(**options, stop_at_eos=bool(stops)))
    start = [[*prompt.tolist(), *[model.mask_token_id] * (len(final) - len(prompt))]]
    assert fold(start + states(task)) == fold(start + official)
    assert states(task)[-1] == final
    committing = len(fold(start + official)) - 1
    if recorded["function"] == "llada21.generate":  # a block's last one finds nothing to replace
        committing = recorded["nfe"]
    assert task.stats.nfe == committing  # stores ride in forwards that commit
    assert task.stats.accepted == task.stats.drafted == 0
    unfolded = decode(model, prompt, task.settings, edges=BlockEdges(fold=False))
    if recorded["function"] == "fast_dllm_v2.generate":  # stores commit, but that of a tail
        stores = int(task.canvas.first not in (0, len(prompt)))
    elif recorded["function"].startswith("llada2"):  # it has no cache and stores nothing
        stores = (task.canvas.first > 0) + task.path[-1].block - 1
    elif "nfe_prefix" in recorded:  # computed again for every block, where we store the last one
        stores = recorded["nfe_prefix"]
    else:  # the official SDAR loop stores the last block as well, which nothing will read
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
