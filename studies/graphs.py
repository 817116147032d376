"""Measure what docs/results-drafting.md states about drafting: about 20 minutes on one core.

Every tiny model decodes generated problems plainly, once to calibrate and once, on others, to
measure. Nearly all is replayed from these recordings, exactly: how close growth comes to the
best of all graphs, what the baselines, the paper's pruning and the acceptance model are worth on
the problems held out, and whether a graph per phase of the block would gain anything. What rejected
drafts say is in no plain decode: with them the problems are decoded, each alone, and the tokens
compared with those of plain decoding alone.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import takewhile
from math import exp, log
from pathlib import Path

import pages
import torch
from phases import phases
from rich.progress import track

from spiffy.calib.fit import fit_acceptance
from spiffy.calib.pipeline import nodes_of, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.record import MAX_DEPTH, Trace
from spiffy.calib.replay_drafts import replay_drafter
from spiffy.graphs import (
    Chain,
    ChainCounts,
    Fill,
    count_chains,
    grow,
    grow_by_all_parents,
    grow_by_children,
    grow_by_chosen_parents,
    grow_by_count,
    grow_by_nodes_and_transitions,
    grow_by_transitions,
    grow_on_replay,
    replay,
)
from spiffy.graphs.grow import Trie
from spiffy.graphs.optimum import optimum
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.draft import AcceptanceDrafter, Drafter, GeometricMeanDrafter
from spiffy.runtime.draft.acceptance import acceptance_weights
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.generate import answer_ids
from spiffy.schemas import AcceptanceModel, CacheName, DecodingSettings, PolicyName

LAYOUTS: tuple[tuple[str, CacheName], ...] = (
    ("tiny-llada", "none"),
    ("tiny-dream", "none"),
    ("tiny-sdar", "block"),
)
POLICIES: tuple[PolicyName, ...] = ("static", "threshold")
PROVEN = (3, 5, 8, 16)  # budgets at which growth is compared with the optimum
DRAFTS = (1, 3, 5, 8, 16, 32)
POOL = 4  # times the drafts: the graph that run-time pruning chooses from
Growth = Callable[[Mapping[Chain, int], int], list[Fill]]

BASELINES: dict[str, Growth] = {
    "connected count": grow_by_count,
    "paper: q + all parents": grow_by_all_parents,
    "paper: q + chosen parents": grow_by_chosen_parents,
    "nodes + transitions": grow_by_nodes_and_transitions,
    "transitions": grow_by_transitions,
    "q + children": grow_by_children,
}
GREEDY = "**greedy, expected steps**"
ON_REPLAY = "greedy on replayed forwards"
MODEL = "acceptance model at run time"
ASKING = "acceptance model, asking rejected drafts"
BOUNDS = {"bound: perfect drafts, token rank 0": 1, "bound: perfect drafts, token ranks 0-3": 4}
LIMITS = "of the four likeliest tokens, with a block cache none in a block's first forward"


@dataclass(frozen=True)
class Case:
    """One model and policy: plain decodes to calibrate on, and others to measure on."""

    model: DiffusionLM
    settings: DecodingSettings
    calibration: Sequence[Trace]
    held_out: Sequence[Trace]

    @property
    def name(self) -> str:
        """Model and policy."""
        return f"{self.model.name} {self.settings.policy}"

    @property
    def prompts(self) -> list[torch.Tensor]:
        """The held-out prompts, encoded."""
        starts = [trace.path[0].ids for trace in self.held_out]
        return [start[start != self.model.mask_token_id] for start in starts]

    @cached_property
    def counts(self) -> Counter[Chain]:
        """Chains of the calibration prompts."""
        return count_chains(trace.chains for trace in self.calibration)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Decode every model by every policy."""
    for name, cache in LAYOUTS:
        if name not in args.models:
            continue
        model = load_model(name, device="cpu", dtype="float32")
        for policy in POLICIES:
            settings = decoding_settings(
                model, gen_length=args.gen_length, cache=cache, policy=policy
            )
            calibration = load_prompts("synthetic", args.calibrate)
            test = load_prompts("synthetic", args.samples, split="test")
            calibrated, measured = (
                record(model, prepare(model, prompts, settings)).prompts
                for prompts in (calibration, test)
            )
            yield Case(model, settings, calibrated, measured)


def optimality(case: Case) -> Iterator[str]:
    """Markdown lines: accepted steps of growth and of the best of all graphs."""
    trie = Trie(case.counts)
    for budget in PROVEN:
        ours = trie.value(set(grow(case.counts, budget)))
        best = optimum(case.counts, budget)
        gap = (best.bound - ours) / max(best.bound, 1)
        proven = "yes" if best.value == best.bound else f"at most {best.bound}"
        yield f"| {case.name} | {budget} | {ours} | {best.value} | {proven} | {gap:.2%} |"


def fitted(case: Case) -> AcceptanceModel:
    """The acceptance model of the calibration prompts.

    Raises
    ------
    SystemExit
        If they are too few for one: before all else is measured.
    """
    found = fit_acceptance(case.model, case.settings, case.calibration)
    if found is None:
        raise SystemExit(f"{case.name}: too few problems to fit a model to, give more --calibrate")
    return found


def held_out(case: Case) -> tuple[dict[str, list[float]], int]:
    """Steps per forward on the held-out prompts, by method, at every number of drafts.

    And how many answers of real decodes with drafts are not plain decoding's.
    """
    weights = acceptance_weights(fitted(case), case.model.vocab_size)
    chains = [trace.chains for trace in case.held_out]

    def static(fills: Sequence[Fill]) -> list[float]:
        return [replay(chains, set(fills[:n])).steps_per_forward for n in DRAFTS]

    def drawn(drafter_of: Callable[[int], Drafter]) -> list[float]:
        return [replay_drafter(case.held_out, drafter_of(n)).steps_per_forward for n in DRAFTS]

    steps = {name: static(growth(case.counts, max(DRAFTS))) for name, growth in BASELINES.items()}
    steps[GREEDY] = static(grow(case.counts, max(DRAFTS)))
    calibration = [trace.chains for trace in case.calibration]
    steps[ON_REPLAY] = static(grow_on_replay(calibration, max(DRAFTS)))

    large = nodes_of(grow(case.counts, POOL * max(DRAFTS)), ChainCounts.of(case.counts))
    pool = nodes_of(
        grow_by_transitions(case.counts, POOL * max(DRAFTS)), ChainCounts.of(case.counts)
    )
    prune = GeometricMeanDrafter
    steps |= {
        "geometric mean": drawn(lambda n: prune(large[: POOL * n], case.model, n)),
        "geometric mean, pool by transitions": drawn(
            lambda n: prune(pool[: POOL * n], case.model, n)
        ),
        "geometric mean, mean with children": drawn(
            lambda n: prune(large[: POOL * n], case.model, n, "mean")
        ),
        "geometric mean, sum with children": drawn(
            lambda n: prune(large[: POOL * n], case.model, n, "sum")
        ),
    }
    drafters = {n: AcceptanceDrafter(weights, n, case.model) for n in DRAFTS}
    steps[MODEL] = drawn(drafters.__getitem__)
    # Without what replays leave out: drafts in the first forward of a block with a block cache.
    edges = BlockEdges(first=case.settings.cache != "block")
    plain = [alone(case, prompt, None, edges) for prompt in case.prompts]
    steps[ASKING], differing = [], 0
    for n in DRAFTS:
        ours = [alone(case, prompt, drafters[n], edges) for prompt in case.prompts]
        found = sum(task.stats.steps for task in ours), sum(task.stats.nfe for task in ours)
        steps[ASKING].append(found[0] / found[1])
        differing += sum(answer_ids(a) != answer_ids(b) for a, b in zip(ours, plain, strict=True))
    futures = [[needed(trace, at) for at in range(len(trace.roots))] for trace in case.held_out]
    for name, ranks in BOUNDS.items():
        steps[name] = [perfect(futures, n, ranks) for n in DRAFTS]
    return steps, differing


def alone(case: Case, prompt: torch.Tensor, drafter: Drafter | None, edges: BlockEdges) -> Task:
    """A real decode of a held-out prompt, by itself."""
    task = make_task(case.model, prompt, case.settings, drafter, edges=edges)
    for _ in run(case.model, [task]):
        pass
    return task


def perfect(futures: Sequence[Sequence[Sequence[int]]], drafts: int, ranks: int) -> float:
    """Steps per forward of drafts that are always right and use the first `ranks` tokens only.

    `futures` holds `needed` of every state of every decode. Walks may stop wherever that saves
    forwards later on: within `LIMITS` no drafter of this many drafts and ranks does better.
    """
    steps = forwards = 0
    for decode in futures:
        fewest = [0] * (len(decode) + 1)  # forwards from each state to the end
        for at in reversed(range(len(decode))):
            usable = takewhile(lambda rank: rank < ranks, decode[at][:drafts])
            reach = at + 1 + sum(1 for _ in usable)
            fewest[at] = 1 + min(fewest[at + 1 : reach + 1])
        forwards += fewest[0]
        steps += len(decode)
    return steps / forwards


def needed(trace: Trace, at: int) -> list[int]:
    """The highest token rank in a draft of each state that followed, while one can name it."""
    root = trace.roots[at]
    if root is None:
        return []
    known = root.candidates
    # Without the last state, which a decode ends with.
    ids = torch.stack([cursor.ids for cursor in trace.path[at:-1][: max(DRAFTS) + 1]])
    changed = ids[1:] != ids[0]
    right = ids[1:, known.positions, None] == known.tokens
    new = changed[:, known.positions]
    named = (new & right.any(-1)).sum(-1)
    ranks = right.int().argmax(-1).where(new, 0).amax(-1) if new.shape[1] else named
    possible = (named == changed.sum(-1)) & (named <= root.room)
    return [
        rank
        for rank, _ in takewhile(
            lambda p: p[1], zip(ranks.tolist(), possible.tolist(), strict=True)
        )
    ]


def _mean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return exp(sum(map(log, values)) / len(values))


def _head(*columns: object) -> list[str]:
    return [f"| {' | '.join(map(str, columns))} |", f"|{' --- |' * len(columns)}"]


def steps_table(title: str, steps: Mapping[str, Sequence[float]]) -> str:
    """Markdown: one line per method, and what is best of the baselines in every column."""
    lines = [f"**{title}**", "", *_head("steps per forward at drafts", *DRAFTS, "mean")]
    rows = dict(steps)
    best = [max(column) for column in zip(*(steps[name] for name in BASELINES), strict=True)]
    rows[f"{GREEDY} / best baseline of the column"] = [
        ours / other for ours, other in zip(steps[GREEDY], best, strict=True)
    ]
    lines += [
        f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} | {_mean(row):.3f} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def gain_table(measured: Sequence[tuple[Case, dict[str, list[float]]]]) -> str:
    """Markdown: accepted drafts per forward, against the best static way of the same budget."""
    bound = next(reversed(BOUNDS))
    pruned = [name for name in measured[0][1] if name.startswith("geometric mean")]
    lines = _head(
        "accepted drafts per forward", "drafts", "best baseline", "our graph", "acceptance model",
        "asking rejected drafts", "that / best baseline", f"perfect drafts ({LIMITS})",
    )  # fmt: skip
    for case, steps in measured:
        for drafts in (8, 32):
            at = DRAFTS.index(drafts)
            accepted = {name: row[at] - 1 for name, row in steps.items()}
            best = max((*BASELINES, *pruned), key=lambda name: accepted[name])
            cells = (
                f"{accepted[best]:.2f} ({best})",
                f"{accepted[GREEDY]:.2f}",
                f"{accepted[MODEL]:.2f}",
                f"{accepted[ASKING]:.2f}",
                f"{accepted[ASKING] / accepted[best]:.2f}x" if accepted[best] else "-",
                f"{accepted[bound]:.2f}",
            )
            lines.append(f"| {case.name} | {drafts} | {' | '.join(cells)} |")
    return "\n".join(lines)


def forwards_table(measured: Sequence[tuple[Case, dict[str, list[float]]]]) -> str:
    """Markdown: NFE of the held-out prompts, and how many times fewer than plain static decoding.

    SDAR's official loop spends a forward on storing the prompt and every block, too, which our
    plain decoding folds into others.
    """
    bound = next(reversed(BOUNDS))
    lines = _head(
        "model", "plain static", "static, 8 drafts", "static, 32", "plain threshold",
        "threshold, 8", "threshold, 32", f"threshold, 32 perfect ({LIMITS})",
        "official loop: static, threshold",
    )  # fmt: skip
    for static, threshold in zip(measured[::2], measured[1::2], strict=True):
        (case, steps), (other, other_steps) = static, threshold
        plain = _steps(case)

        def cell(nfe: float, over: float = plain) -> str:
            return f"{nfe:.0f} ({over / nfe:.2f}x)"

        def after(of: Case, rows: Mapping[str, Sequence[float]], name: str, drafts: int) -> str:
            return cell(_steps(of) / rows[name][DRAFTS.index(drafts)])

        cells = (
            f"{plain}",
            *(after(case, steps, ASKING, n) for n in (8, 32)),
            cell(_steps(other)),
            *(after(other, other_steps, ASKING, n) for n in (8, 32)),
            after(other, other_steps, bound, 32),
            f"{_official(case)}, {_official(other)}",
        )
        lines.append(f"| {case.model.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _steps(case: Case) -> int:
    """Denoising steps of the held-out prompts: a forward each without drafts."""
    return sum(len(trace.roots) for trace in case.held_out)


def _official(case: Case) -> int:
    """Forwards of the official loop on the held-out prompts."""
    # The prompt, and every block that was reached.
    stores = sum(trace.path[-1].block + 1 for trace in case.held_out)
    return _steps(case) + stores * (case.settings.cache == "block")


def plot(measured: Sequence[tuple[Case, dict[str, list[float]]]], path: Path) -> None:
    """Steps per forward by number of drafts, one panel per model and policy."""
    import matplotlib

    from spiffy.bench.plots.style import COLOURS, STYLE, legend_below, new_figure

    bound = next(reversed(BOUNDS))
    baselines = [*BASELINES, *(n for n in measured[0][1] if n.startswith("geometric mean"))]
    ways = {
        "perfect drafts": (COLOURS["perfect"], "x", lambda s: s[bound]),
        "acceptance model": (COLOURS["model"], "^", lambda s: s[ASKING]),
        "our graph": (COLOURS["graph"], "o", lambda s: s[GREEDY]),
        "best baseline of each budget": (
            COLOURS["paper-graph"],
            "D",
            lambda s: [max(column) for column in zip(*(s[n] for n in baselines), strict=True)],
        ),
    }
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "spiffy"}):
        figure = new_figure(9.0, 5.6)
        for k, (case, steps) in enumerate(measured):
            axes = figure.add_subplot(
                2, len(measured) // 2, 1 + k // 2 + k % 2 * len(measured) // 2
            )
            for label, (colour, marker, row) in ways.items():
                axes.plot(DRAFTS, row(steps), color=colour, marker=marker, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(DRAFTS, [str(n) for n in DRAFTS])
            ticks = (1, 2, 4, 8, 16) if case.settings.policy == "static" else (1, 1.5, 2, 3)
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_title(case.name)
            if k % 2:
                axes.set_xlabel("drafts")
            if k < 2:
                axes.set_ylabel("steps per forward")
        legend_below(figure)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def report(measured: Sequence[tuple[Case, dict[str, list[float]]]]) -> str:
    """All tables as Markdown."""
    lines = _head("calibration roots", "drafts", "greedy", "optimum", "proven", "gap")
    for case, _ in track(measured, description="optimum"):
        lines += optimality(case)
    blocks = ["\n".join(lines), gain_table(measured), forwards_table(measured)]
    blocks += [steps_table(case.name, steps) for case, steps in measured]
    together = {
        name: [_mean(column) for column in zip(*(s[name] for _, s in measured), strict=True)]
        for name in measured[0][1]
    }
    blocks.append(steps_table("All of them (geometric mean)", together))

    lines = _head("gain of graphs per phase at drafts", *DRAFTS, "mean")
    splits: dict[str, list[list[float]]] = {}
    for case, steps in track(measured, description="phases"):
        for label, gains in phases(case.calibration, case.held_out, steps[GREEDY], DRAFTS):
            splits.setdefault(label, []).append(gains)
    for label, all_gains in splits.items():
        columns = list(zip(*all_gains, strict=True))
        cells = [
            f"{_mean([1 + gain for gain in column]) - 1:+.1%} "
            f"({min(column):+.1%} to {max(column):+.1%})"
            for column in columns
        ]
        overall = _mean([1 + gain for column in columns for gain in column]) - 1
        cells.append(f"{overall:+.1%}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n\n".join([*blocks, "\n".join(lines)])


def main() -> None:
    """Print the tables, or put them into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for name, _ in LAYOUTS]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    number = pages.at_least(1)
    parser.add_argument("--calibrate", type=number, default=60, help="calibration problems")
    parser.add_argument("--samples", type=number, default=40, help="test problems")
    parser.add_argument("--gen-length", type=number, default=64)
    pages.add_into(parser)
    parser.add_argument("--plot", type=Path, help="SVG to write (needs matplotlib)")
    args = parser.parse_args()
    pages.whole(parser, args, "models")
    pages.expect(parser, args.into, "graphs")
    if args.plot and not (find_spec("matplotlib") and args.plot.parent.is_dir()):
        parser.error(f"--plot {args.plot}: it takes matplotlib, and a folder that is there")
    total, differing = len(set(args.models)) * len(POLICIES), 0
    measured: list[tuple[Case, dict[str, list[float]]]] = []
    for case in track(cases(args), description="decoding", total=total):
        steps, wrong = held_out(case)
        measured.append((case, steps))
        differing += wrong
        print(f"\n{steps_table(case.name, steps)}", flush=True)
    answers = sum(len(DRAFTS) * len(case.held_out) for case, _ in measured)
    note = (
        f"`{pages.command(args)}` ({pages.machine()}, float32; {args.calibrate} generated "
        f"calibration problems, {args.samples} test problems; cache none, tiny-sdar block; graphs "
        f"look {MAX_DEPTH} steps ahead; answers that drafts changed: {differing} of {answers})"
    )
    block = f"{note}\n\n{report(measured)}"
    print(f"\n{block}")
    if args.plot:
        plot(measured, args.plot)
    pages.fill(args.into, "graphs", block)


if __name__ == "__main__":
    pages.start(main)
