"""Decode the same prompts in every way, in turns, and sum up.

Methods take turns prompt by prompt (A B C, C A B, ...), in an order drawn anew for every prompt, so
that neither drift of the machine nor what ran just before favours one. Every prompt's time is
compared with plain decoding of the same prompt in the same repeat.
"""

from __future__ import annotations

import os
import platform
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, median_high
from typing import Any

import torch

from spiffy.bench.methods import Method, to_step_through
from spiffy.bench.score import score
from spiffy.bench.watch import (
    Forward,
    Tallies,
    Watched,
    WatchedAdviser,
    decode,
    told,
)
from spiffy.calib.provenance import provenance
from spiffy.runtime import BlockEdges, DiffusionLM
from spiffy.runtime.budget.cost import device_name
from spiffy.runtime.decode import Task, make_task
from spiffy.runtime.generate import Output, collect
from spiffy.runtime.models.text import Prompt
from spiffy.runtime.step.canvas import Canvas, Cursor
from spiffy.schemas.bench import INTERVAL_PROMPTS, Interval, Machine, Result, Split, Walkthrough
from spiffy.schemas.labels import budgets_in_words

_DRAWS = 2000


@dataclass(frozen=True)
class Row:
    """One decode of one prompt by one method.

    Attributes
    ----------
    differs
        Whether the answer is not plain decoding's; None where it need not be the same.
    correct
        None where the dataset does not say what is right.
    peak_bytes
        None where the system does not tell.
    budgets, why
        What an adviser chose for how many forwards, and what its choice at the end rests on.
    """

    method: str
    prompt: int
    repeat: int
    nfe: int
    positions_computed: int
    steps: int
    drafted: int
    accepted: int
    tokens: int
    seconds: float
    forward_seconds: float
    draft_seconds: float
    verify_seconds: float
    halvings: int
    overflows: int
    budgets: Mapping[str, int]
    why: str
    peak_bytes: int | None
    differs: bool | None
    correct: bool | None
    text: str


@dataclass(frozen=True)
class Seen:
    """What a method's first decode of the first prompt looked like from inside."""

    method: str
    canvas: Canvas
    forwards: Sequence[Forward]


@dataclass(frozen=True)
class Measurements:
    """What was measured; of all the states that were drafted, what is shown of them in the end.

    Attributes
    ----------
    rows
        In the order in which they were measured.
    tallies
        Drafts, counted, by method, prompt and repeat.
    seen
        The decode to step through (`to_step_through`); None where it has not been made.
    """

    rows: tuple[Row, ...]
    tallies: Mapping[tuple[str, int, int], Tallies]
    seen: Seen | None

    @property
    def prompts(self) -> int:
        """How many prompts were decoded."""
        return len({row.prompt for row in self.rows})

    @property
    def repeats(self) -> int:
        """How often each of them was."""
        return len({row.repeat for row in self.rows})


def measure(
    model: DiffusionLM,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    records: Sequence[Mapping[str, Any]],
    repeats: int,
    warm_up: int,
    seed: int = 0,
) -> Measurements:
    """Decode every prompt by every method, `repeats` times: all `rounds`, gathered."""
    return gathered([*rounds(model, methods, prompts, records, repeats, warm_up, seed)])


def until_stopped(
    parts: Iterable[Measurements],
) -> tuple[Measurements, KeyboardInterrupt | Exception | None]:
    """All `parts` of a run, gathered, or those before it was stopped, and by what.

    Raises
    ------
    KeyboardInterrupt, Exception
        What stopped it, if there is no part.
    """
    done: list[Measurements] = []
    try:
        for part in parts:
            done.append(part)
    except (KeyboardInterrupt, Exception) as problem:
        if not done:
            raise
        return gathered(done), problem
    return gathered(done), None


def gathered(parts: Sequence[Measurements]) -> Measurements:
    """The first `parts` of a run together, as far as every prompt was decoded equally often.

    A repeat that was cut short is left out, but for the first: of that, the prompts it got to.
    """
    prompts = sum(part.rows[0].repeat == 0 for part in parts)
    whole = parts[: len(parts) // prompts * prompts]
    return Measurements(
        tuple(row for part in whole for row in part.rows),
        {key: counted for part in whole for key, counted in part.tallies.items()},
        next((part.seen for part in whole if part.seen is not None), None),
    )


def rounds(
    model: DiffusionLM,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    records: Sequence[Mapping[str, Any]],
    repeats: int,
    warm_up: int,
    seed: int = 0,
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
    execute_code: bool = False,
    on_decode: Callable[[], None] = lambda: None,
) -> Iterator[Measurements]:
    """Decode a prompt by every method, then the next, all of them `repeats` times.

    Yields what was measured of a prompt once all methods have had it, so that whoever is stopped
    has lost no more. The first method is the baseline; what it answers first, the others have to.
    Before that each method decodes the first prompt `warm_up` times, uncounted. No method has seen
    another prompt before its first counted decode. `on_decode` is called after every decode.
    """
    baseline, shown = methods[0], to_step_through(methods)
    plain: dict[int, list[int]] = {}  # its first answer, by prompt

    def prepared(method: Method, prompt: int, path: Sequence[Cursor]) -> Task:
        drafter = method.drafter(path)
        watched = None if drafter is None else Watched(drafter)
        own = edges if method.edges is None else method.edges
        task = make_task(model, prompts[prompt], method.settings, watched, seed, prompt, own)
        task.adviser = None if method.adviser is None else WatchedAdviser(method.adviser)
        return task

    path: list[Cursor] = []  # plain decoding's, of the prompt in hand
    for _ in range(warm_up):
        for method in methods:
            task = prepared(method, 0, path)
            decode(task)
            path = task.path if method is baseline else path
            on_decode()

    judged: dict[tuple[int, str], bool | None] = {}  # running code twice tells nothing new
    for repeat in range(repeats):
        for prompt, record in enumerate(records):
            answers: dict[str, tuple[Output, int | None]] = {}  # and the peak of memory
            tallies: dict[tuple[str, int, int], Tallies] = {}
            seen = None
            # A decode right after a heavy one is slower by some percent: nobody always comes then.
            for method in _turns(methods, f"{seed} {repeat} {prompt}"):
                task = prepared(method, prompt, path)
                reset_peak(model.device)
                forwards = decode(task)
                peak = peak_bytes(model.device)
                answers[method.name] = collect(task), peak
                tallies[method.name, prompt, repeat] = Tallies.of(task.canvas, forwards)
                if method is shown and prompt == repeat == 0:
                    seen = Seen(method.name, task.canvas, forwards)
                if method is baseline:
                    path = task.path
                del task, forwards  # their states are not of the next decode's peak
                on_decode()
            expected = plain.setdefault(prompt, answers[baseline.name][0].token_ids)
            settings = {method.name: method.settings for method in methods}
            rows: list[Row] = []
            for name, (output, peak) in answers.items():
                said = prompt, output.text
                if said not in judged:
                    judged[said] = score(output.text, record, execute_code)
                same = settings[name] == baseline.settings
                rows.append(
                    Row(
                        method=name,
                        prompt=prompt,
                        repeat=repeat,
                        tokens=len(output.token_ids),
                        peak_bytes=peak,
                        differs=output.token_ids != expected if same else None,
                        correct=judged[said],
                        text=output.text,
                        **asdict(output.stats),
                    )
                )
            yield Measurements(tuple(rows), tallies, seen)


def _turns(methods: Sequence[Method], seed: str) -> list[Method]:
    """An order drawn by `seed`; what drafts along plain decoding's path comes after it."""
    order = random.Random(seed).sample(methods, len(methods))
    at = next(k for k, method in enumerate(order) if method is methods[0])
    before = next((k for k in range(at) if order[k].kind == "perfect"), at)
    order[at], order[before] = order[before], order[at]
    return order


def results(methods: Sequence[Method], measured: Measurements) -> tuple[Result, ...]:
    """Sum up the rows of every method."""
    by_method: dict[str, list[Row]] = {method.name: [] for method in methods}
    for row in measured.rows:
        by_method[row.method].append(row)
    base = by_method[methods[0].name]
    return tuple(
        _result(method, by_method[method.name], base, measured.tallies) for method in methods
    )


def _result(
    method: Method,
    rows: Sequence[Row],
    base: Sequence[Row],
    tallies: Mapping[tuple[str, int, int], Tallies],
) -> Result:
    repeat = _middle_repeat(rows)
    once = [row for row in rows if row.repeat == repeat]
    prompts = {row.prompt for row in once}
    compared = [row for row in once if row.differs is not None]
    scored = [row for row in once if row.correct is not None]
    counted = Tallies.together(tallies[method.name, prompt, repeat] for prompt in prompts)

    def total(field: str) -> int:
        return sum(getattr(row, field) for row in once)

    def seconds(field: str) -> float:
        medians: list[float] = [
            median(getattr(row, field) for row in rows if row.prompt == prompt)
            for prompt in prompts
        ]
        return sum(medians)

    forward, draft, verify = map(seconds, ("forward_seconds", "draft_seconds", "verify_seconds"))
    rest = max(0.0, seconds("seconds") - forward - draft - verify)
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    return Result(
        name=method.name,
        kind=method.kind,
        budget=_usual_budget(once) if method.adviser is not None else method.budget,
        note=budgets_in_words((row.budgets for row in once), once[-1].why),
        nfe=total("nfe"),
        positions_computed=total("positions_computed"),
        steps=total("steps"),
        drafted=total("drafted"),
        accepted=total("accepted"),
        tokens=total("tokens"),
        tokens_per_second=_speed(rows),
        speedup=speedup(rows, base),
        seconds=Split(forward=forward, draft=draft, verify=verify, rest=rest),
        peak_bytes=max(peaks, default=None),
        compared=len(compared),
        differing=len({row.prompt for row in rows if row.differs}),
        scored=len(scored),
        correct=sum(row.correct is True for row in scored),
        acceptance=counted.acceptance(),
    )


def _middle_repeat(rows: Sequence[Row]) -> int:
    """The first repeat with the median number of forwards, of all prompts; of two, with the more.

    What learns while it decodes makes others in every repeat, and mostly fewer once it has met the
    prompts. Times are medians over all of them.
    """
    nfe: Counter[int] = Counter()
    for row in rows:
        nfe[row.repeat] += row.nfe
    middle = median_high(nfe.values())
    return min(repeat for repeat, forwards in nfe.items() if forwards == middle)


def _usual_budget(rows: Sequence[Row]) -> int:
    """The number of drafts that was chosen for most forwards, whoever drafts them; 0: none."""
    used: Counter[int] = Counter()
    for row in rows:
        for name, forwards in row.budgets.items():
            used[0 if name == "plain" else int(name.rsplit(" ", 1)[-1])] += forwards
    return max(used, key=lambda drafts: (used[drafts], -drafts), default=0)


def _speed(rows: Sequence[Row]) -> float:
    repeats = {row.repeat for row in rows}
    return median(
        sum(row.tokens for row in rows if row.repeat == repeat)
        / sum(row.seconds for row in rows if row.repeat == repeat)
        for repeat in repeats
    )


def speedup(rows: Sequence[Row], base: Sequence[Row]) -> Interval:
    """Seconds of plain decoding over ours: the median prompt, of medians over its repeats.

    The interval resamples prompts: other prompts of this kind would give another median. Of too
    few prompts for one, it is the range.
    """
    plain = {(row.prompt, row.repeat): row.seconds for row in base}
    ratios: dict[int, list[float]] = {}
    for row in rows:
        ratios.setdefault(row.prompt, []).append(plain[row.prompt, row.repeat] / row.seconds)
    values = [median(of) for of in ratios.values()]
    if len(values) < INTERVAL_PROMPTS:
        return Interval(value=median(values), low=min(values), high=max(values))
    generator = random.Random(0)
    medians = sorted(median(generator.choices(values, k=len(values))) for _ in range(_DRAWS))
    return Interval(
        value=median(values), low=medians[_DRAWS // 40], high=medians[-1 - _DRAWS // 40]
    )


def walkthrough(
    model: DiffusionLM, baseline: Method, text: str, measured: Measurements
) -> Walkthrough | None:
    """The decode to step through, of the first prompt (`text`); None where it was not made."""
    look = measured.seen
    if look is None:
        return None
    first = {row.method: row for row in measured.rows if (row.prompt, row.repeat) == (0, 0)}
    return told(
        model,
        look.canvas,
        look.forwards,
        prompt=text,
        method=look.method,
        plain_nfe=first[baseline.name].nfe,
        text=first[look.method].text,
    )


def machine(model: DiffusionLM, load_before: float | None) -> Machine:
    """Where this runs."""
    kind = model.device.type
    after = load_average()
    made_by = provenance()
    return Machine(
        device=device_name(model.device),
        dtype=model.kernels,
        threads=torch.get_num_threads() if kind == "cpu" else None,
        system=f"{platform.system()} {platform.machine()}",
        load=None if load_before is None or after is None else (load_before, after),
        versions=made_by.versions | _deciding_speed(kind),
        git_revision=made_by.git,
    )


def _deciding_speed(kind: str) -> dict[str, str]:
    """Versions of what need not be there: numba searches for drafts, CUDA runs the kernels."""
    found = {}
    with suppress(PackageNotFoundError):
        found["numba"] = version("numba")
    if kind == "cuda" and torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    return found


def load_average() -> float | None:
    """Processes that wanted to run during the last minute, if the system counts them."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def reset_peak(device: torch.device) -> None:
    """Start to count peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory since `reset_peak`: allocated on a GPU, resident on Linux, else unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def overlap(digests: Iterable[str], calibrated: Iterable[str] | None) -> int | None:
    """How many prompts were calibrated on; None where the artifact does not say which were."""
    if calibrated is None:
        return None
    known = set(calibrated)
    return sum(digest in known for digest in digests)
