"""What drafts save for `tiny-llada2`, and how often replaced tokens end a walk: some 15 minutes.

Part of `make results`; the table is in docs/results.md. The model is calibrated on generated
problems for every policy and decodes others, plainly and with 1, 8 and 32 drafts; tokens are
compared. Of a drafted decode's walks, those are counted that ended because a step replaced a
committed token: a draft only fills masks, so it cannot hold such a state. The last walk of each is
not among them: it ends because the answer does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from spiffy.cli.threads import set_threads, wait_passively

wait_passively()  # as the commands do, before torch is imported

# ruff: noqa: E402
import torch
from pages import add_into, at_least, command, expect, fill, machine, start, whole
from rich.progress import track

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import final_answer, problems
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.draft import graph_drafter
from spiffy.runtime.generate import collect
from spiffy.schemas import DecodingSettings

BUDGETS = (0, 1, 8, 32)
# LLaDA2.1's published settings for quality, and stricter ones; 2.0's and SDAR's rule first.
POLICIES: dict[str, dict[str, object]] = {
    "static": {"policy": "static"},
    "threshold 0.9": {"policy": "threshold", "threshold": 0.9},
    "joint 0.9, edits above 0.9": {"policy": "joint", "threshold": 0.9, "edit_threshold": 0.9},
    "joint 0.7, edits above 0.5": {"policy": "joint", "threshold": 0.7, "edit_threshold": 0.5},
}


@dataclass(frozen=True)
class Row:
    """All problems, decoded by one policy with one number of drafts."""

    policy: str
    drafts: int
    nfe: int
    positions: int
    steps: int
    tokens: int
    right: int
    differing: int
    edits: int  # tokens replaced
    walks: int  # that another one follows
    ended_by_edit: int


def edited(before: torch.Tensor, after: torch.Tensor, mask_token_id: int) -> int:
    """Committed tokens that a step replaced; both int64 [length]."""
    return int(((before != after) & (before != mask_token_id)).sum())


def walks(task: Task) -> Iterator[list[torch.Tensor]]:
    """The states of each forward's walk, its root included, in the order of the forwards."""
    states = [task.canvas.start(task.prompt, task.model.mask_token_id), *task.path]
    ends = [*task.roots, len(states) - 1]
    for at, until in pairwise(ends):
        yield [cursor.ids for cursor in states[at : until + 1]]


def ended_by_edit(every: Sequence[Sequence[list[torch.Tensor]]], mask: int) -> tuple[int, int]:
    """Of the walks of several decodes those that another follows, and those that an edit ended."""
    followed = [walk for one in every for walk in one[:-1]]
    return len(followed), sum(edited(walk[-2], walk[-1], mask) > 0 for walk in followed)


def measure(
    model: DiffusionLM, policy: str, settings: DecodingSettings, args: argparse.Namespace
) -> list[Row]:
    """Calibrate, and decode every problem with every number of drafts."""
    prompts = load_prompts("synthetic", args.calibrate)
    traces = record(model, prepare(model, prompts, settings))
    graph = build_graph(model, prompts, settings, traces, max(BUDGETS))
    chosen = list(islice(problems("test"), args.problems))
    rows: list[Row] = []
    plain: list[list[int]] = []
    for drafts in BUDGETS:
        outputs, tasks = [], []
        for problem in track(chosen, f"{policy}, {drafts} drafts", transient=True):
            task = make_task(model, problem.question, settings)
            if drafts:
                task.drafter = graph_drafter(model, graph, settings, drafts)
            for _ in run(model, [task]):
                pass
            tasks.append(task)
            outputs.append(collect(task))
        plain = plain or [output.token_ids for output in outputs]
        mask = model.mask_token_id
        every = [[*walks(task)] for task in tasks]
        rows.append(
            Row(
                policy,
                drafts,
                sum(output.stats.nfe for output in outputs),
                sum(output.stats.positions_computed for output in outputs),
                sum(output.stats.steps for output in outputs),
                sum(len(output.token_ids) for output in outputs),
                sum(
                    final_answer(output.text) == final_answer(problem.answer)
                    for output, problem in zip(outputs, chosen, strict=True)
                ),
                sum(o.token_ids != p for o, p in zip(outputs, plain, strict=True)),
                sum(edited(a, b, mask) for one in every for walk in one for a, b in pairwise(walk)),
                *ended_by_edit(every, mask),
            )
        )
    return rows


def table(rows: Sequence[Row], problems: int) -> Iterator[str]:
    """Markdown, one line per policy and number of drafts."""
    yield (
        "| policy | drafts | NFE | fewer | positions | tokens per step | right answers "
        "| tokens replaced | walks ended so |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        first = next(r for r in rows if r.policy == row.policy)
        so = f"{row.ended_by_edit / row.walks:.1%}" if row.drafts and row.walks else "-"
        yield (
            f"| {row.policy} | {row.drafts} | {row.nfe:,} | {first.nfe / row.nfe:.2f}x "
            f"| {row.positions:,} | {row.tokens / row.steps:.2f} | {row.right} of {problems} "
            f"| {row.edits} | {so} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-llada2")
    parser.add_argument("--problems", type=at_least(1), default=40)
    parser.add_argument("--calibrate", type=at_least(1), default=30)
    parser.add_argument("--gen-length", type=at_least(1), default=64)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    add_into(parser)
    args = parser.parse_args()
    whole(parser, args, "policies")
    expect(parser, args.into, "mixture")
    model = load_model(args.model, device="cpu", dtype="float32")
    rows: list[Row] = []
    for policy in args.policies:
        settings = decoding_settings(model, gen_length=args.gen_length, **POLICIES[policy])
        set_threads(model, settings, None)
        rows += measure(model, policy, settings, args)
        print("\n".join(list(table(rows, args.problems))[-len(BUDGETS) :]), flush=True)
    differing = sum(row.differing for row in rows)
    lines = [
        f"`{command(args)}` ({args.problems} generated problems, {args.calibrate} to calibrate on; "
        f"{machine()}, float32); answers that differ from plain decoding's: {differing}",
        "",
        *table(rows, args.problems),
    ]
    print("\n".join(lines))
    fill(args.into, "mixture", "\n".join(lines))


if __name__ == "__main__":
    start(main)
