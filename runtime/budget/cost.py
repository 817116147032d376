"""What verifying drafts costs here: measured once per machine and setting, then remembered."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from spiffy.runtime.budget.timed import MakeDrafter, timed
from spiffy.runtime.decode import Task
from spiffy.schemas import CostProfile, SpiffyError
from spiffy.schemas.io import canonical_json, read_json, write_atomically


def measure_cost(
    task: Task,
    largest: int,
    drafters: Mapping[str, MakeDrafter] | None = None,
    limit: float = 4.0,
) -> CostProfile:
    """What a forward with 0 to `largest` drafts costs behind the task's prompt: see `timed`."""
    found = timed(task, largest, drafters or {}, limit)
    return CostProfile(**vars(found), largest=largest, **conditions(task))


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
    return f"{name} with {how}" if (how := multiplies_bfloat16()) else name


#: Instructions that multiply bfloat16, by their flags, the faster ones first.
_BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}


def multiplies_bfloat16() -> str | None:
    """By which instructions the CPU does, beside which float32 is slow; None: by none (Linux)."""
    flags = _cpuinfo().get("flags", "").split()
    return next((name for flag, name in _BFLOAT16.items() if flag in flags), None)


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
    if len(profile.points) > 1:  # else memory was short, which it may not be another time
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
    timed_all = len(profile.points) == 1 or set(drafters) <= set(profile.turns)  # or none fitted
    return _key(there) == _key(here) and enough and timed_all


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
