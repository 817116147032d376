"""Unmasking policies that are not shipped: what they are asked, and the names they go by.

docs/extending.md shows one. Whatever it commits, drafts do not change it, as long as it is a pure
function of what it is given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spiffy.schemas import SpiffyError
from spiffy.schemas.decoding import is_own_policy
from spiffy.schemas.errors import PolicyError, is_out_of_memory, said

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Step:
    """What a policy is told of a denoising step, on the host: the same with drafts and without.

    Of the M masked positions of the block that may be filled now (of the sub-block, if there are
    any), in ascending order.

    Attributes
    ----------
    score
        [M], the policy's own.
    tokens
        [M], what the model would fill in.
    positions
        [M], counted from the answer's first.
    quota
        How many positions `tokens_per_step` or `steps_per_block` ask for.
    block, block_step
        Number of the block, and steps made in it so far.
    """

    score: Floats
    tokens: Ints
    positions: Ints
    quota: int
    block: int
    block_step: int


class Policy(Protocol):
    """Decides which masked positions a step commits. It has to be a pure function.

    Plain and drafted decoding ask it as often as it suits them, and in any order.
    """

    def score(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """How sure of each position: float64 [M], higher is drafted and committed earlier.

        On the device of `log_p`, preferably without asking it anything (as `.item()` does). A
        function of each row alone: which rows come together depends on the forward.

        Parameters
        ----------
        log_p
            float64 [M, vocab], the model's log-probabilities, whatever the temperature, with those
            of the mask token. Not to be changed.
        tokens
            int64 [M], the likeliest tokens, or those that were drawn.
        """
        ...

    def select(self, step: Step) -> Bools:
        """Which positions are committed: bool [M].

        If they are fewer than `step.quota`, those that score best of the others are added.
        """
        ...


_registered: dict[str, Policy] = {}


def register_policy(name: str, policy: Policy) -> None:
    """Let a policy of your own be decoded and calibrated with, in this process.

    Parameters
    ----------
    name
        `module:object`, by which settings and artifacts name it, and which commands import. What
        was registered by it before is replaced.

    Raises
    ------
    SpiffyError
        If the name is of another form, or the object is no policy.
    """
    if not isinstance(name, str) or not is_own_policy(name):
        raise SpiffyError(
            f"policy {name!r}: name one of your own module:object, such as my_policies:factor"
        )
    if isinstance(policy, type):
        raise SpiffyError(f"policy {name} is a class: give an object of it")
    lacks = [each for each in ("score", "select") if not callable(getattr(policy, each, None))]
    if lacks:
        kind = type(policy).__name__
        raise SpiffyError(f"policy {name}, of type {kind}, has no {' and no '.join(lacks)}")
    _registered[name] = policy


def import_policy(name: str) -> None:
    """Import and register the object that a policy's name says, from this folder too.

    Only for names that the user gives, never for those that artifacts hold.

    Raises
    ------
    SpiffyError
        If there is no such module or object, it cannot be imported, or is no policy.
    """
    if name in _registered:
        return
    where, _, what = name.partition(":")
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = import_module(where)
    except (Exception, SystemExit) as error:  # whatever the module does
        reason = f"{type(error).__name__}: {said(error)}"
        raise SpiffyError(f"policy {name}: {where} cannot be imported ({reason})") from None
    if not hasattr(module, what):
        raise SpiffyError(f"policy {name}: {where} ({_file_of(module)}) has no {what}")
    register_policy(name, getattr(module, what))


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "a folder"  # of a namespace


def registered_policy(name: str) -> Policy:
    """The policy of that name.

    Raises
    ------
    SpiffyError
        If there is none: says how there can be.
    """
    if name not in _registered:
        raise SpiffyError(
            f"policy {name} is not shipped, and an artifact imports no code: give --policy {name} "
            f"(in Python call register_policy({name!r}, ...) first; for Ray and "
            f"lm-evaluation-harness give policy={name})"
        )
    return _registered[name]


def own_score(name: str, log_p: Tensor, tokens: Tensor) -> Tensor:
    """The scores of a policy; see `Policy.score`.

    Raises
    ------
    PolicyError
        If they are of another kind, or it fails.
    """
    with _named(name, "score"):
        score = registered_policy(name).score(log_p, tokens)
    asked = f"float64 {list(tokens.shape)}"
    if not isinstance(score, Tensor) or _kind(score) != asked:
        raise PolicyError(f"policy {name}: score gave {_kind(score)} instead of a tensor, {asked}")
    if score.device != log_p.device:
        where = f"{score.device} instead of {log_p.device}"
        raise PolicyError(f"policy {name}: score gave a tensor on {where}")
    return score


def own_choice(name: str, step: Step) -> Bools:
    """The positions that a policy commits, as many as the quota at least: bool [M].

    Raises
    ------
    PolicyError
        If its scores are no numbers, what it selects is of another kind, or it fails.
    """
    score = step.score.copy()
    if np.isnan(score).any():
        place = step.positions[np.isnan(score)][0]
        raise PolicyError(f"policy {name}: the score of the answer's position {place} is NaN")
    with _named(name, "select"):
        chosen = registered_policy(name).select(step)
    asked = f"bool {list(score.shape)}"
    if not isinstance(chosen, np.ndarray) or _kind(chosen) != asked:
        what = f"{_kind(chosen)} instead of a NumPy array, {asked}"
        raise PolicyError(f"policy {name}: select gave {what}")
    missing = step.quota - int(chosen.sum())
    if missing > 0:
        chosen = chosen.copy()
        others = np.flatnonzero(~chosen)
        chosen[others[(-score[others]).argsort(kind="stable")[:missing]]] = True
    return chosen


@contextmanager
def _named(name: str, method: str) -> Iterator[None]:
    """Say whose fault an error is; not of those that tell how much memory there is."""
    try:
        yield
    except SpiffyError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {said(error)}"
        raise PolicyError(f"policy {name}: {method} failed ({reason})") from error


def _kind(found: object) -> str:
    if isinstance(found, Tensor | np.ndarray):
        return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    return f"an object of type {type(found).__name__}"
