"""What is decoded both on the CPU and on another device, to be compared.

Run as a script, `device_cases.py DEVICE` prints what every case gives on either, as JSON. "far" is
the pretend accelerator of `far.py`, whose crossings are counted; it lasts as long as its process,
hence one of its own.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import own_policies
import pytest
import torch

from spiffy.calib.pipeline import record
from spiffy.calib.record import Recorder
from spiffy.integrations import custom_generate
from spiffy.integrations.likelihood import log_likelihood
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.budget.cost import measure_cost
from spiffy.runtime.decode import Advice, Task, driver, make_task, run
from spiffy.runtime.draft import AcceptanceDrafter, Drafter, GraphDrafter
from spiffy.runtime.draft.acceptance import AcceptanceWeights
from spiffy.runtime.forward import request
from spiffy.runtime.forward.pack import Row, RowOutput
from spiffy.runtime.step.canvas import Canvas
from spiffy.schemas import SpiffyError

PARITY = Path(__file__).parent / "parity"
PROMPT = (11, 7, 23, 5, 99, 41, 3, 17, 250, 8, 61)
GEN, BLOCK, DRAFTS, SEQUENCES = 8, 4, 6, 3

WAYS = ("plain", "graph", "model")
ONE = ("model",)
# Every family with each cache that it has, and ways of drafting. Beside static unmasking of one
# token per step:
LAYOUTS: dict[str, tuple[str, dict[str, Any], Sequence[str]]] = {
    "llada, none": ("llada-a", {"cache": "none"}, WAYS),
    "llada, dual": ("llada-a", {"cache": "dual"}, WAYS),
    "llada, prefix": ("llada-a", {"cache": "prefix"}, ONE),
    "llada, prefix-shared": ("llada-a", {"cache": "prefix-shared"}, ONE),
    "dream, none": ("dream-a", {"cache": "none"}, ONE),
    "dream, dual": ("dream-a", {"cache": "dual"}, WAYS),
    "dream, prefix": ("dream-a", {"cache": "prefix"}, ONE),
    "illada": ("illada-a", {}, ONE),
    "a2d-mdlm": ("a2d-mdlm-a", {}, ONE),
    "sdar": ("sdar-a", {}, WAYS),
    "llada2": ("llada2-a", {}, ONE),
    "sdc": ("sdc-a", {}, ONE),
    "a2d-bd3lm": ("a2d-bd3lm-a", {}, ONE),
    "fast-dllm-v2": ("fastdllm2-a", {"sub_block_length": 2}, WAYS),
    "threshold": ("sdar-a", {"policy": "threshold", "threshold": 0.1}, WAYS),
    "threshold, none": ("llada-a", {"policy": "threshold", "threshold": 0.1}, ONE),
    "sequential": ("sdar-a", {"policy": "sequential"}, ONE),
    "entropy-bounded": ("llada-a", {"policy": "entropy-bounded", "entropy_bound": 2.0}, ONE),
    "own policy": ("llada-a", {"policy": own_policies.ODD, "temperature": 0.7}, ONE),
    "margin": ("dream-a", {"score": "margin"}, ONE),
    "entropy": ("sdar-a", {"score": "entropy", "steps_per_block": 3}, ONE),
    "joint": ("llada21-a", {"policy": "joint", "threshold": 0.2, "max_post_steps": 1}, ONE),
    "temperature": ("sdar-a", {"temperature": 0.7}, WAYS),
    "temperature, threshold": (
        "llada-a",
        {"temperature": 0.4, "policy": "threshold", "threshold": 0.1},
        ONE,
    ),
    "filters": ("sdar-a", {"temperature": 0.9, "top_k": 30, "top_p": 0.8}, ("graph",)),
    "temperature, timestep": (
        "dream-a",
        {"temperature": 0.4, "schedule": "timestep", "steps_per_block": 6},
        ("graph",),
    ),
}
BATCHES = ("llada, none", "dream, dual", "sdar", "temperature")


@dataclass
class Outcome:
    """What a case gave: tokens (or whatever has to be equal), and what it cost.

    `waits` says by kind and line how often the host waited for the device.
    """

    values: Any
    steps: int = 0
    forwards: int = 0
    accepted: int = 0
    waits: Sequence[tuple[tuple[str, str], int]] = ()


@cache
def model(name: str, device: str) -> DiffusionLM:
    """In float64, where another order of summation decides no tie."""
    return load_model(str(PARITY / name), device=device, dtype="float64")


def drafter(way: str, lm: DiffusionLM, sets: bool) -> Drafter | None:
    if way == "plain":
        return None
    if way == "graph":  # what most walks hop along: the most confident position, the two, ...
        chain = [[(rank, 0) for rank in range(depth)] for depth in range(1, DRAFTS)]
        return GraphDrafter([*chain, [(0, 1)]], lm)
    commit = {"logit": 0.7} if sets else None
    position = {"logit": 1.0, "nearness": 0.3}
    weights = AcceptanceWeights.of(position, commit, {"log_p": 1.0}, [(1, 2, 3)], lm.vocab_size)
    return AcceptanceDrafter(weights, DRAFTS, lm)


def tasks_of(lm: DiffusionLM, sequences: int, way: str = "plain", **options: Any) -> list[Task]:
    """Sequences with prompts of unequal lengths."""
    given = {"gen_length": GEN, "block_length": BLOCK, "stop_at_eos": False, **options}
    settings = decoding_settings(lm, **given)
    drafts = drafter(way, lm, settings.policy == "threshold")
    prompts = [torch.tensor(PROMPT[: len(PROMPT) - 3 * k]) for k in range(sequences)]
    return [make_task(lm, ids, settings, drafts, sequence=k) for k, ids in enumerate(prompts)]


def outcome(lm: DiffusionLM, tasks: list[Task]) -> Outcome:
    forwards = sum(1 for _ in run(lm, tasks, len(tasks)))
    return Outcome(
        [[cursor.ids.tolist() for cursor in task.path] for task in tasks],
        sum(task.stats.steps for task in tasks),
        forwards,
        sum(task.stats.accepted for task in tasks),
    )


def decoded(name: str, way: str, sequences: int, options: dict[str, Any], device: str) -> Outcome:
    lm = model(name, device)
    return outcome(lm, tasks_of(lm, sequences, way, **options))


def logits(name: str, device: str) -> Outcome:
    ids = torch.tensor([PROMPT])
    found = model(name, device).forward_logits(ids)
    return Outcome(found.cpu().mul(1e4).round().long().tolist())


def recorded(device: str) -> Outcome:
    """The chains that calibration records."""
    lm = model("sdar-a", device)
    tasks = tasks_of(lm, 2)
    for task in tasks:
        task.drafter = Recorder()
    traces = record(lm, tasks, batch_size=2)
    steps = sum(task.stats.steps for task in tasks)
    return Outcome([trace.chains for trace in traces.prompts], steps, traces.nfe)


def measured(device: str) -> Outcome:
    """For which numbers of drafts the cost of a forward is measured."""
    lm = model("llada-a", device)
    (task,) = tasks_of(lm, 1, cache="dual")
    profile = measure_cost(task, 1, {"graph": lambda n: GraphDrafter([[(0, 0)]], lm)}, limit=0.05)
    return Outcome([point.drafts for point in profile.points])


@dataclass
class Turns:
    """An adviser by whom plain decoding and all ways of drafting take turns."""

    drafters: Sequence[Drafter | None]
    asked: int = 0
    rests: bool = False

    def begin(self, canvas: Canvas) -> None: ...

    def after_forward(self, sequences: int, seconds: float) -> None: ...

    def advise(self) -> Advice:
        self.asked += 1
        return Advice(self.drafters[self.asked % len(self.drafters)], self.asked)

    def learn(self, *_: Any) -> None: ...

    def why(self) -> str:
        return "in turn"


def advised(device: str) -> Outcome:
    """The number of drafts, and who chooses them, differ from forward to forward."""
    lm = model("sdar-a", device)
    (task,) = tasks_of(lm, 1)
    task.adviser = Turns([drafter(way, lm, sets=False) for way in WAYS])
    return outcome(lm, [task])


def redrawn(device: str) -> Outcome:
    """Steps that draw what was not foreseen: those before them committed nothing."""
    options = {"policy": "threshold", "threshold": 0.3, "schedule": "timestep"}
    lm = model("llada-a", device)
    return outcome(lm, tasks_of(lm, 1, "graph", temperature=0.7, steps_per_block=8, **options))


def halved(device: str) -> Outcome:
    """Forwards with more than three drafts do not fit into memory."""
    lm = model("sdar-a", device)
    forward = driver.forward

    def small(lm: DiffusionLM, rows: Sequence[Row], lengths: Sequence[int] = ()) -> list[RowOutput]:
        if sum(len(row.ids) for row in rows) > 4 * BLOCK:
            raise torch.OutOfMemoryError("out of memory")
        return forward(lm, rows, lengths)

    tasks = tasks_of(lm, 1, "graph")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "forward", small)
        found = outcome(lm, tasks)
    return replace(found, values=[found.values, tasks[0].stats.halvings])


def without_float64(device: str) -> Outcome:
    """Logits come over instead, as for a device that has no float64."""
    lm = model("sdar-a", device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "_HOSTS", {"cpu", device})
        return outcome(lm, tasks_of(lm, 1, "model"))


def generated(device: str) -> Outcome:
    """By transformers' `generate`: a padded batch whose ids are on the device, with a criterion."""
    module: Any = model("sdar-a", device).module
    ids = torch.tensor([PROMPT, (0, 0, *PROMPT[2:])], device=device)
    sequences = module.generate(
        input_ids=ids,
        attention_mask=(ids > 0).long(),
        custom_generate=custom_generate,
        decoding={"block_length": BLOCK, "stop_at_eos": False},
        max_new_tokens=GEN,
        pad_token_id=0,
        stopping_criteria=[lambda found, _: found[:, -1] < 0],
    )
    assert sequences.device == ids.device
    return Outcome(sequences.cpu().tolist())


def likelihood(device: str) -> Outcome:
    """Of a continuation, from 5 of the sets that may be masked, 2 to a forward."""
    found = log_likelihood(model("llada-a", device), PROMPT[:6], PROMPT[6:], 5, 2)
    return Outcome(round(found, 6), forwards=3)


def head_elsewhere(device: str) -> Outcome:
    """The output head (and ids) on another device than the layers, as a device map may have it."""
    lm = load_model(str(PARITY / "sdar-a"), device=device, dtype="float64")
    module: Any = lm.module
    module.lm_head.to("cpu")

    def there(_: Any, inputs: Any, options: dict[str, Any]) -> Any:
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return inputs, moved

    module.model.register_forward_pre_hook(there, with_kwargs=True)  # as accelerate's
    return outcome(lm, tasks_of(lm, 2, "model"))


def by_default(device: str) -> Outcome:
    """Where tensors are made on the device unless another one is named."""
    with torch.device(device):
        found = [decoded("sdar-a", way, 2, {"temperature": 0.7}, device) for way in WAYS]
        found.append(decoded("dream-a", "graph", 1, {"cache": "dual"}, device))
        found.append(redrawn(device))
    return Outcome([one.values for one in found])


def broken(device: str) -> Outcome:
    """What is said of a model that computes NaN."""
    lm = load_model(str(PARITY / "sdar-a"), device=device, dtype="float64")
    weight: Any = lm.module.lm_head.weight  # type: ignore[union-attr]
    weight.data.mul_(torch.nan)
    try:
        outcome(lm, tasks_of(lm, 1))
    except SpiffyError as error:
        return Outcome(str(error))
    return Outcome(None)


def cases() -> Iterator[tuple[str, Callable[[str], Outcome]]]:
    """Names of cases, and what they give on a device."""
    for layout, (name, options, ways) in LAYOUTS.items():
        for way in ways:
            yield f"{layout}: {way}", partial(decoded, name, way, 1, options)
        for way in ways if layout in BATCHES else ():
            yield f"{layout}, batch: {way}", partial(decoded, name, way, SEQUENCES, options)
    yield "logits", partial(logits, "dream-a")
    yield "likelihood: drawn", likelihood
    yield from (("recorded", recorded), ("measured", measured), ("advised", advised))
    yield from (("redrawn", redrawn), ("halved", halved), ("broken", broken))
    yield "generated", generated
    yield from (("head elsewhere", head_elsewhere), ("device by default", by_default))
    yield "no float64", without_float64


def main(device: str) -> None:
    counters: Any = importlib.import_module("far") if device == "far" else None
    for name in {name for name, _, _ in LAYOUTS.values()}:
        model(name, device)  # loading is no forward: its crossings do not count
    found = {}
    for name, case in cases():
        expected = case("cpu")
        if counters is not None:
            counters.reset()
        ours = case(device)
        if counters is not None:
            ours.waits = counters.sources.most_common()
        found[name] = {"cpu": asdict(expected), "device": asdict(ours)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
