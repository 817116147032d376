"""Decoding prompts with one or several drafters, and what is printed about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.table import Table

from spiffy.cli.common import log, note_if_inexact, note_of_ties
from spiffy.cli.streams import write_utf8
from spiffy.schemas.errors import is_out_of_memory
from spiffy.schemas.labels import budgets_in_words
from spiffy.schemas.records import COUNTS, MAX_NODES

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from spiffy.runtime import BlockEdges
    from spiffy.runtime.decode import Adviser, Task
    from spiffy.runtime.draft import Drafter
    from spiffy.runtime.generate import Output
    from spiffy.runtime.models import DiffusionLM
    from spiffy.schemas import DecodingSettings


@dataclass(frozen=True)
class Way:
    """A way of decoding: who drafts, or who chooses that; neither: plain."""

    drafter: Drafter | None = None
    adviser: Adviser | None = None


@dataclass(frozen=True)
class Shared:
    """What decoding prompts together took: how many at a time, forwards in all, seconds."""

    batch_size: int
    forwards: int
    seconds: float


@dataclass
class Runs:
    """Decodes prompts with one or several drafters, and keeps the outputs by drafter."""

    lm: DiffusionLM
    settings: DecodingSettings
    seed: int
    edges: BlockEdges
    prompts: list[tuple[int, Tensor]]
    stop: tuple[str, ...]
    ways: dict[str, Way] = field(default_factory=dict)
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    fitting: dict[str, int] = field(default_factory=dict)  # drafts that memory allows
    shared: Shared | None = None
    overflowed: bool = False  # a draft, of which is told once

    @property
    def shown(self) -> str:
        """Whose answers are printed."""
        return next(reversed(self.ways))

    def decode(self, prompt: tuple[int, Tensor], name: str) -> None:
        """Decode one prompt with one drafter."""
        from spiffy.runtime.decode import run
        from spiffy.runtime.generate import collect

        task = self._begun(prompt, name)
        for _ in run(self.lm, [task]):
            pass
        self._keep(task, collect(task), name)

    def stream(self, prompt: tuple[int, Tensor], name: str) -> Iterator[str]:
        """Decode one prompt; yields the text of each block when it is finished."""
        from spiffy.runtime.streaming import Stream

        task = self._begun(prompt, name)
        pieces = Stream(task)
        yield from pieces
        self._keep(task, pieces.output, name)

    def _begun(self, prompt: tuple[int, Tensor], name: str) -> Task:
        task = self._task(prompt, name)
        task.most_drafts = min(task.most_drafts, self.fitting.get(name, task.most_drafts))
        return task

    def _keep(self, task: Task, output: Output, name: str) -> None:
        """Keep an answer, and how many drafts memory allowed."""
        if task.stats.halvings:
            self.fitting[name] = task.most_drafts
            _note_fewer_drafts(task)
        self._note_overflow(task)
        self.outputs.setdefault(name, []).append(output)

    def together(
        self, prompts: Iterable[tuple[int, Tensor]], name: str, batch_size: int
    ) -> Iterator[tuple[int, Output | Exception]]:
        """Decode prompts, up to `batch_size` sharing forwards; yields answers as they finish.

        In place of an answer that failed stands why. Afterwards `shared` says what that took.
        """
        from spiffy.runtime.decode import Scheduler
        from spiffy.runtime.generate import collect

        scheduler, began, fewest = Scheduler(self.lm, batch_size), perf_counter(), MAX_NODES
        tasks = (self._task(prompt, name) for prompt in prompts)
        for task in chain.from_iterable(scheduler.run(tasks, failed_too=True)):
            if task.stats.halvings and task.most_drafts < fewest:
                fewest = task.most_drafts
                _note_fewer_drafts(task)
            self._note_overflow(task)
            yield task.sequence, collect(task) if task.error is None else task.error
        self.shared = Shared(batch_size, scheduler.forwards, perf_counter() - began)

    def _note_overflow(self, task: Task) -> None:
        if not task.stats.overflows or self.overflowed:
            return
        self.overflowed = True
        dtype = str(self.lm.dtype).removeprefix("torch.")
        log.print(
            f"a draft overflowed in {dtype}: such answers go on without drafts, to the same "
            "tokens; another --dtype may not overflow",
            soft_wrap=True,
        )

    def fits(self, prompt: tuple[int, Tensor], name: str) -> bool:
        """Whether memory suffices to decode a prompt now."""
        from spiffy.runtime.decode import run

        task = self._task(prompt, name)
        for _ in run(self.lm, [task], failed_too=True):
            pass
        return task.error is None or not is_out_of_memory(task.error)

    def _task(self, prompt: tuple[int, Tensor], name: str) -> Task:
        from spiffy.runtime.decode import make_task

        sequence, ids = prompt
        way = self.ways[name]
        options = (way.drafter, self.seed, sequence, self.edges, self.stop)
        task = make_task(self.lm, ids, self.settings, *options)
        task.adviser, task.keeps_path = way.adviser, False
        return task


def _note_fewer_drafts(task: Task) -> None:
    log.print(
        f"out of memory: going on with at most {task.most_drafts} drafts per forward, the tokens "
        "stay the same",
        soft_wrap=True,
    )


def _totals(outputs: Sequence[Output]) -> dict[str, float]:
    """Sums over prompts."""
    stats = [asdict(output.stats) for output in outputs]
    numbers = [key for key, value in stats[0].items() if isinstance(value, (int, float))]
    totals: dict[str, float] = {key: sum(s[key] for s in stats) for key in numbers}
    totals["tokens"] = sum(len(output.token_ids) for output in outputs)
    return totals


def compare(runs: Runs, out: Console) -> bool:
    """Print the table that --verify ends in; whether all answers are those of plain decoding."""
    settings, plain = runs.settings, runs.outputs["plain"]
    base = _totals(plain)
    table = Table(
        title=f"{runs.lm.name}: {settings.policy}, cache {settings.cache}, "
        f"block {settings.block_length}, {len(plain)} prompts"
    )
    table.add_column("")
    table.add_column("plain", justify="right")
    rows: dict[str, list[str]] = {
        "prompts": [str(len(plain))],
        "tokens identical": ["-"],
        "NFE (model forwards)": [f"{base['nfe']:.0f}"],
        "positions computed": [f"{base['positions_computed']:.0f}"],
        "steps per forward": [f"{base['steps'] / base['nfe']:.2f}"],
        "tokens/s": [f"{base['tokens'] / base['seconds']:.1f}"],
    }
    differing = 0
    for name, outputs in runs.outputs.items():
        if name == "plain":
            continue
        table.add_column(name, justify="right")
        ours = _totals(outputs)
        wrong = sum(
            (a.token_ids, a.text) != (b.token_ids, b.text)
            for a, b in zip(plain, outputs, strict=True)
        )
        differing += wrong
        speed = ours["tokens"] / ours["seconds"]
        ratio = speed / (base["tokens"] / base["seconds"]) if base["tokens"] else 1.0
        rows["prompts"].append(str(len(outputs)))
        rows["tokens identical"].append(f"no ({wrong} prompts differ)" if wrong else "yes")
        rows["NFE (model forwards)"].append(
            f"{ours['nfe']:.0f} ({base['nfe'] / ours['nfe']:.2f}x fewer)"
        )
        rows["positions computed"].append(
            f"{ours['positions_computed']:.0f} "
            f"({ours['positions_computed'] / base['positions_computed']:.2f}x)"
        )
        rows["steps per forward"].append(f"{ours['steps'] / ours['nfe']:.2f}")
        rows["tokens/s"].append(f"{speed:.1f} ({ratio:.2f}x)")
    for label, cells in rows.items():
        table.add_row(label, *cells)
    out.print(table)
    for outputs in runs.outputs.values():
        note_budgets(outputs)
    note_if_inexact(settings)
    if differing and settings.exact:
        note_of_ties(runs.lm)
    return not differing


def report(runs: Runs) -> None:
    """Print what the answers cost."""
    totals, shared = _totals(runs.outputs[runs.shown]), runs.shared
    forwards = f"{totals['nfe']:.0f} forwards"
    if shared is not None:
        forwards = f"{shared.forwards} forwards that up to {shared.batch_size} prompts shared"
    seconds = totals["seconds"] if shared is None else shared.seconds
    log.print(
        f"{totals['tokens']:.0f} tokens, {forwards}, "
        f"{totals['positions_computed']:.0f} positions, "
        f"{totals['steps'] / totals['nfe']:.2f} steps per forward, "
        f"{totals['tokens'] / seconds:.1f} tokens/s"
    )
    note_budgets(runs.outputs[runs.shown])
    if runs.shown != "plain":
        note_if_inexact(runs.settings)


def note_budgets(outputs: Sequence[Output]) -> None:
    """Say what `auto` chose, and what that rests on."""
    chosen = budgets_in_words((o.stats.budgets for o in outputs), outputs[-1].stats.why)
    if chosen:
        log.print(f"budget auto: {chosen}", soft_wrap=True)


def as_json(index: int, output: Output) -> dict[str, Any]:
    """One answer as `--json` prints it and `--out` keeps it."""
    stats = output.stats
    return {
        "index": index,
        "text": output.text,
        "token_ids": output.token_ids,
        **{name: getattr(stats, name) for name in COUNTS},
        "seconds": round(stats.seconds, 6),
    }


def print_json(index: int, output: Output) -> None:
    """Print one answer as a line of JSON."""
    write_utf8(json.dumps(as_json(index, output), ensure_ascii=False) + "\n")
