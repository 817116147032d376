"""Measure what the acceptance model's parts are worth: about 5 minutes on one core.

Part of `make results`; the table is in docs/results-drafting.md.

Every tiny model decodes generated problems plainly, once to calibrate and once, on others, to
measure. Then the model is fitted again without some of its evidence, and replayed, exactly.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
from pages import add_into, at_least, command, expect, fill, machine, start, whole

from graphs import LAYOUTS, Case, cases, fitted
from spiffy.calib.replay_drafts import replay_drafter
from spiffy.runtime.draft import AcceptanceDrafter
from spiffy.runtime.draft.acceptance import POSITION_FEATURES, TOKEN_FEATURES, acceptance_weights
from spiffy.runtime.draft.features import States, position_features
from spiffy.runtime.draft.ngrams import Bools, Floats
from spiffy.runtime.draft.outlook import Outlook
from spiffy.runtime.draft.search import IN_NUMPY

DRAFTS = (8, 32)
WHOLE = "whole model"


def _named(*parts: str) -> frozenset[str]:
    """Position features whose name says one of these."""
    return frozenset(name for name in POSITION_FEATURES if any(part in name for part in parts))


#: What a fit may not look at: features of positions, and whether tokens are re-ranked.
WITHOUT: Mapping[str, tuple[frozenset[str], bool]] = {
    WHOLE: (frozenset(), True),
    "echo and twins": (_named("echo", "twins"), True),
    "the last four products": (frozenset(POSITION_FEATURES[-4:]), True),
    "what neighbours are": (
        _named("left", "right", "both_masked") - _named("left_above", "right_above"),
        True,
    ),
    "nearness to new tokens": (_named("nearness"), True),
    "what ends the sequence": (_named("eos"), True),
    "re-ranked tokens": (frozenset(), False),
}


@contextmanager
def without(features: frozenset[str], rerank: bool) -> Iterator[None]:
    """Zero some features of positions, in fit and drafts; keep tokens in the order they are in."""
    rows = [POSITION_FEATURES.index(name) for name in features]

    def others(outlook: Outlook, states: States) -> tuple[Floats, Bools]:
        found, masked = position_features(outlook, states)
        found[rows] = 0
        return found, masked

    as_they_are = np.array([float(name == "log_p") for name in TOKEN_FEATURES])
    with ExitStack() as patches:
        if not rerank:
            fit = "spiffy.calib.fit._fit_tokens"
            patches.enter_context(patch(fit, lambda *_: as_they_are))
        patches.enter_context(patch("spiffy.calib.fit.position_features", others))
        patches.enter_context(patch("spiffy.runtime.draft.expand.position_features", others))
        # Compiled code has features of its own.
        numpys = "spiffy.runtime.draft.by_model.fastest_search"
        patches.enter_context(patch(numpys, lambda: IN_NUMPY))
        yield


def steps(case: Case, features: frozenset[str], rerank: bool) -> list[float]:
    """Steps per forward on the held-out prompts, fitted and drafted without these features."""
    with without(features, rerank):
        weights = acceptance_weights(fitted(case), case.model.vocab_size)
        return [
            replay_drafter(
                case.held_out, AcceptanceDrafter(weights, n, case.model)
            ).steps_per_forward
            for n in DRAFTS
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [name for name, _ in LAYOUTS]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--calibrate", type=at_least(1), default=60, help="calibration problems")
    parser.add_argument("--samples", type=at_least(1), default=100, help="test problems")
    parser.add_argument("--gen-length", type=at_least(1), default=64)
    add_into(parser)
    args = parser.parse_args()
    whole(parser, args, "models")
    expect(parser, args.into, "ablations")
    columns: list[str] = []
    rows: dict[str, list[str]] = {name: [] for name in WITHOUT}
    for case in cases(args):
        print(case.name, flush=True)
        columns.append(case.name)
        complete: list[float] = []
        for name, (features, rerank) in WITHOUT.items():
            found = steps(case, features, rerank)
            complete = complete or found
            gains = [f"{a / b - 1:+.1%}" for a, b in zip(found, complete, strict=True)]
            cells = [f"{value:.2f}" for value in found] if name == WHOLE else gains
            rows[name].append(", ".join(cells))
            print(f"  {name}: {rows[name][-1]}", flush=True)
    table = [f"| without | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    table += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    note = (
        f"`{command(args)}` ({args.calibrate} generated calibration problems, {args.samples} test "
        f"problems; {machine()}, float32; steps per forward at {DRAFTS[0]} and {DRAFTS[1]} drafts "
        f"on held-out problems, and their change)"
    )
    block = "\n".join([note, "", *table])
    print(block)
    fill(args.into, "ablations", block)


if __name__ == "__main__":
    start(main)
