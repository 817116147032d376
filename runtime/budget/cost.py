"""What verifying drafts costs here: measured once per machine and setting, then remembered."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from spiffy.runtime.budget.estimates import ladder
from spiffy.runtime.decode import (
    Task,
    batches_head,
    denoising_step,
    find,
    keys_of,
    likely_states,
    looked_at,
    may_complete,
)
from spiffy.runtime.draft import Drafter, rank_candidates, search_of
from spiffy.runtime.draft.acceptance import TOKEN_RANKS
from spiffy.runtime.forward.cache import CACHES, Cache, Forwards
from spiffy.runtime.forward.evaluation import Evaluation
from spiffy.runtime.forward.pack import forward
from spiffy.runtime.forward.request import Reader
from spiffy.runtime.models.device import synchronize
from spiffy.runtime.step.canvas import Cursor
from spiffy.runtime.step.reading import Reading
from spiffy.schemas import CostPoint, CostProfile, SpiffyError
from spiffy.schemas.errors import is_out_of_memory
from spiffy.schemas.io import canonical_json, read_json, write_atomically

_ROUNDS = 20  # times that every number of drafts is timed, at most
_SITES = 3  # roots at which they are
#: A forward this many times the price of a plain one never pays: walks are not that long.
_HOPELESS = 6.0


#: From a number of drafts to a drafter of at most that many.
MakeDrafter = Callable[[int], Drafter]
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class _Site:
    """A root on the way through a task's first block, and what is known there."""

    root: Cursor
    known: Reading
    fresh: Tensor


@dataclass(frozen=True)
class _Stage:
    """The decode loop's parts, to be run one by one at some roots of a task's first block.

    Roots differ: the first of a block has most masked positions, the last ones have drafts that
    complete it. So several are taken, spread evenly over a plain decode of the block.
    """

    task: Task
    cache: Cache
    sites: tuple[_Site, ...]

    @classmethod
    def set_for(cls, task: Task, limit: float) -> _Stage:
        """Decode the first block plainly, for at most about `limit` seconds."""
        started = perf_counter()
        task = _whole_blocks(task)
        model, canvas = task.model, task.canvas
        reader = Reader(
            model, task.settings, canvas, TOKEN_RANKS + 1, asks_rejected=True, noise=task.noise
        )
        cache = CACHES[task.settings.cache](model, canvas, task.edges, reader)
        cursor = canvas.start(task.prompt, model.mask_token_id)
        passed: list[_Site] = []
        while True:
            evaluation = _run(task, cache.evaluate(cursor, cursor.ids[None], False))
            first_only = cache.first_only(cursor)
            positions = looked_at(task, cursor, first_only)
            known = evaluation.reading(0, positions, keys_of(task, cursor, positions))
            following = denoising_step(task, cursor, known, first_only)
            if first_only and following.block == cursor.block:  # tells about one position only
                cursor = following
                continue
            if not passed:  # what is known before a block's first forward is known less well
                passed.append(_Site(cursor, known, known.positions[:0]))
            if following.block > cursor.block or following.finished:
                break
            fresh = (following.ids != cursor.ids).nonzero()[:, 0]
            passed.append(_Site(following, known, fresh))
            if perf_counter() - started > limit:
                break
            cursor = following
        if not cache.crosses:  # a block's first forward has no drafts
            passed = passed[1:] or passed
        count = min(len(passed), _SITES)
        return cls(
            task,
            cache,
            tuple(passed[(2 * k + 1) * len(passed) // (2 * count)] for k in range(count)),
        )

    def draft(self, site: _Site, drafter: Drafter) -> Tensor:
        """Root and drafts, int64 [1 + n, length]."""
        task, root = self.task, site.root
        masked = task.canvas.masked(root, task.model.mask_token_id)
        candidates = rank_candidates(
            site.known,
            task.settings,
            task.model.mask_token_id,
            drafter.token_ranks,
            masked,
            site.fresh,
            search_of(drafter),
        )
        drafts = drafter(root, candidates, len(masked) - (not may_complete(task, self.cache, root)))
        return torch.cat((root.ids[None], drafts))

    def forward(self, site: _Site, states: Tensor) -> Evaluation:
        """One forward over root and drafts, and what it passes through an expensive output head."""
        evaluation = _run(self.task, self.cache.evaluate(site.root, states, len(states) > 1))
        if batches_head(self.task):
            evaluation.precompute(likely_states(self.task, site.root, states, evaluation, 0))
        return evaluation

    def step(self, site: _Site, states: Tensor, evaluation: Evaluation) -> None:
        """One denoising step of the walk."""
        positions = looked_at(self.task, site.root)
        keys = keys_of(self.task, site.root, positions)
        following = denoising_step(self.task, site.root, evaluation.reading(0, positions, keys))
        find(states, following.ids)


def _whole_blocks(task: Task) -> Task:
    """The task without the end of its prompt that opens the first block, if it does."""
    canvas = task.canvas
    if canvas.first in (0, canvas.prompt_length):
        return task
    shorter = replace(canvas, prompt_length=canvas.first)
    return replace(task, prompt=task.prompt[: canvas.first], canvas=shorter, path=[])


def _run(task: Task, forwards: Forwards) -> Evaluation:
    rows = next(forwards)
    while True:
        try:
            rows = forwards.send(forward(task.model, rows, [task.canvas.length] * len(rows)))
        except StopIteration as done:
            evaluation: Evaluation = done.value
            return evaluation


@dataclass
class _Timings:
    """Seconds by what was done, for how many drafts, and at which site (None: not warmed up)."""

    device: torch.device
    seconds: dict[tuple[str, int], dict[_Site | None, list[float]]] = field(default_factory=dict)

    def time(self, what: str, n: int, site: _Site | None, action: Callable[[], _Result]) -> _Result:
        synchronize(self.device)
        started = perf_counter()
        result = action()
        synchronize(self.device)
        by_site = self.seconds.setdefault((what, n), {})
        by_site.setdefault(site, []).append(perf_counter() - started)
        return result

    def of(self, what: str, n: int) -> float:
        """Mean over the sites of their medians; what was not warmed up counts if all else lacks."""
        medians = {site: median(values) for site, values in self.seconds[what, n].items()}
        return fmean([v for site, v in medians.items() if site is not None] or medians.values())


def measure_cost(
    task: Task,
    largest: int,
    drafters: Mapping[str, MakeDrafter] | None = None,
    limit: float = 4.0,
) -> CostProfile:
    """Time what a forward with 0 to `largest` drafts costs behind the task's prompt.

    Drafting, forwards and denoising steps are those of the decode loop, in its order and several
    turns in a row: what runs before leaves the processor's caches in its own state, which makes a
    tenth of a small model's forward. Numbers of drafts are interleaved, so that drift of the
    machine hits them alike, for up to `limit` seconds; medians are reported. On slow models one
    draft is tried in any case.
    """
    if largest < 1:
        raise ValueError(f"largest {largest}: must be at least 1")
    stage = _Stage.set_for(task, limit / 4)
    timings = _Timings(task.model.device)
    budgets = [0, *ladder(largest)]
    made = {way: {n: make(n) for n in budgets[1:]} for way, make in (drafters or {}).items()}
    started = perf_counter()

    def late() -> bool:
        return perf_counter() - started > limit

    def plain_turn(n: int, site: _Site, warm: bool) -> None:
        at, states = site if warm else None, site.root.ids.repeat(1 + n, 1)
        evaluation = timings.time("forward", n, at, partial(stage.forward, site, states))
        timings.time("step", 0, at, partial(stage.step, site, states, evaluation))

    def turn(way: str, n: int, site: _Site, warm: bool) -> None:
        at = site if warm else None
        states = timings.time(way, n, at, partial(stage.draft, site, made[way][n]))
        # Choosing drafts also chills the processor's caches for the forward behind it.
        after = f"forward after {way}"
        evaluation = timings.time(after, n, at, partial(stage.forward, site, states))
        timings.time("step", 0, at, partial(stage.step, site, states, evaluation))

    middle = stage.sites[len(stage.sites) // 2]

    def turns(n: int, warm: bool) -> float:
        began = perf_counter()
        plain_turn(n, middle, warm)
        for way in made if n else ():
            turn(way, n, middle, warm)
        return perf_counter() - began

    def hopeless(n: int) -> bool:
        return timings.of("forward", n) > _HOPELESS * timings.of("forward", 0)

    timed, promising = [], []
    for n in budgets:  # warms up, and finds out how far to go
        if n > 1 and late():
            break
        try:
            took = turns(n, warm=False)
            if hopeless(n):  # or the first of its size, which compiles something or loads kernels
                started += max(0.0, took - turns(n, warm=True))
        except RuntimeError as error:
            if not is_out_of_memory(error) or not n:
                raise
            break
        timed.append(n)
        if hopeless(n):
            break
        promising.append(n)
    for _ in range(_ROUNDS):
        for n in promising:
            if late():
                break
            plain_turn(n, middle, warm=False)
            for site in [middle] if n else 2 * stage.sites:  # everything is compared with 0 drafts
                plain_turn(n, site, warm=True)
            for way in made if n else ():
                turn(way, n, stage.sites[-1], warm=False)
                for site in stage.sites:
                    turn(way, n, site, warm=True)

    def points(of: Callable[[int], float], least: int = 1) -> tuple[CostPoint, ...]:
        return tuple(CostPoint(drafts=n, seconds=of(n)) for n in timed if n >= least)

    def whole_turn(way: str, n: int) -> float:
        return timings.of(way, n) + timings.of(f"forward after {way}", n)

    return CostProfile(
        points=points(partial(timings.of, "forward"), least=0),
        step_seconds=timings.of("step", 0),
        drafting={way: points(partial(timings.of, way)) for way in made},
        turns={way: points(partial(whole_turn, way)) for way in made},
        largest=largest,
        **conditions(task),
    )


def conditions(task: Task) -> dict[str, Any]:
    """What a cost profile depends on, as fields of `CostProfile`."""
    model, settings, canvas = task.model, task.settings, task.canvas
    kind = model.device.type
    suffix = canvas.length - canvas.span(0).stop
    outside = canvas.length - canvas.block_length
    if settings.plain_cache in ("prefix", "block"):
        outside = canvas.first
    return {
        "device": device_name(model.device),
        "dtype": model.kernels,
        "threads": torch.get_num_threads() if kind == "cpu" else None,
        "torch": torch.__version__ + (", numba" if find_spec("numba") else ""),
        "model": model.fingerprint,
        "block_length": settings.block_length,
        "cache": settings.cache,
        "policy": settings.policy,
        "prefix_length": outside,
        "suffix_length": suffix if settings.plain_cache == "prefix" else None,
    }


def device_name(device: torch.device) -> str:
    """The GPU or CPU model by its own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = _cpuinfo().get("model name") or platform.processor() or platform.machine() or "cpu"
    # Virtual machines go by one name with and without.
    return f"{name} with AMX" if has_amx() else name


def has_amx() -> bool:
    """Whether the CPU multiplies tiles of bfloat16, beside which float32 is slow (Linux)."""
    return "amx_bf16" in _cpuinfo().get("flags", "").split()


def _cpuinfo() -> dict[str, str]:
    """What Linux says of a processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _key(conditions: Mapping[str, Any]) -> str:
    """The same for conditions under which the same cost is expected."""
    lengths = {name: conditions[name] for name in ("prefix_length", "suffix_length")}
    buckets = {  # that double from one to the next
        name: None if length is None else int(length).bit_length()
        for name, length in lengths.items()
    }
    return canonical_json({**conditions, **buckets})


def cost_profile(
    task: Task,
    largest: int,
    drafters: Mapping[str, MakeDrafter] | None = None,
    stored: tuple[CostProfile, ...] = (),
    remeasure: bool = False,
) -> CostProfile:
    """The cost profile for a task: this machine's if it is known, else measured now and kept.

    Parameters
    ----------
    stored
        Profiles that came with an artifact; one that was measured under these conditions serves.
    remeasure
        Measure in any case, and replace what was kept.
    """
    largest = min(largest, task.most_drafts)
    known = None if remeasure else known_profile(task, stored, largest, set(drafters or {}))
    if known is not None:
        return known
    profile = measure_cost(task, largest, drafters)
    key = _key(conditions(task))
    _remembered[key] = profile
    _save(_profile_path(key), profile)
    return profile


def known_profile(
    task: Task,
    stored: tuple[CostProfile, ...] = (),
    largest: int = 0,
    drafters: Collection[str] = (),
) -> CostProfile | None:
    """What was measured for such tasks on this machine; None if nothing was.

    Parameters
    ----------
    stored
        Profiles that came with an artifact.
    largest, drafters
        The number of drafts and the ways of drafting that have to be among what was measured.
    """
    here = conditions(task)
    key = _key(here)
    known = (_remembered.get(key), _load(_profile_path(key)), *stored)
    return next((p for p in known if p is not None and _serves(p, here, largest, drafters)), None)


_remembered: dict[str, CostProfile] = {}  # by key, for machines where nothing can be written


def _serves(
    profile: CostProfile, here: Mapping[str, Any], largest: int, drafters: Collection[str]
) -> bool:
    there = profile.model_dump(include=set(here))
    enough = profile.largest is not None and profile.largest >= largest
    return _key(there) == _key(here) and enough and set(drafters) <= set(profile.turns)


def cache_folder() -> Path | None:
    """Where measurements are kept; None if this user has no home.

    `$SPIFFY_CACHE`, else `$XDG_CACHE_HOME/spiffy`, else `~/.cache/spiffy`.
    """
    if own := os.environ.get("SPIFFY_CACHE"):
        return Path(own)
    if users := os.environ.get("XDG_CACHE_HOME"):
        return Path(users) / "spiffy"
    try:
        return Path.home() / ".cache" / "spiffy"
    except RuntimeError:
        return None


def _profile_path(key: str) -> Path | None:
    folder = cache_folder()
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    return None if folder is None else folder / "cost" / name


def _load(path: Path | None) -> CostProfile | None:
    """A kept profile; None if there is none or it is damaged: it can be measured again."""
    try:
        if path is None or not path.is_file():
            return None
        return CostProfile.model_validate_json(canonical_json(read_json(path)))
    except (SpiffyError, ValueError, OSError):  # pydantic's errors are ValueErrors
        return None


def _save(path: Path | None, profile: CostProfile) -> None:
    """Keep a profile where that is possible."""
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, canonical_json(profile.model_dump(mode="json")) + "\n")
    except (SpiffyError, OSError):
        return
