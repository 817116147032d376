"""Decode at random with drafts, and compare every state with plain decoding's.

Every case draws a random-weight checkpoint of any family, a cache, a policy, lengths, blocks, a
temperature and a batch of prompts, decodes each prompt plainly and alone in float64, and then, a
few times, all of them together with drafts of any origin: random graphs, graphs that hold this
future, acceptance models with random coefficients, drafters that know or guess, taking turns or
not. Each drafted decode is counted; one with another state, answer or number of steps is a bug and
is printed with its seed.

    python studies/fuzz_decodes.py --cases 19000
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from seeds import Tally, arguments
from torch import Tensor

from spiffy.runtime import DiffusionLM, load_model
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.decode.task import Advice
from spiffy.runtime.draft import (
    AcceptanceDrafter,
    BestOfDrafter,
    Candidates,
    Drafter,
    GraphDrafter,
)
from spiffy.runtime.draft.acceptance import POSITION_FEATURES, TOKEN_FEATURES, AcceptanceWeights
from spiffy.runtime.draft.ngrams import Bigrams
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.generate import answer_ids
from spiffy.runtime.step.canvas import Canvas, Cursor
from spiffy.schemas import DecodingSettings

PARITY = Path(__file__).parent.parent / "tests" / "parity"
ROUNDS = 3  # of drafts for the same plain decodes
PLAIN = BlockEdges(complete=False, first=False, fold=False)
Fills = list[list[tuple[int, int]]]


@cache
def models() -> dict[str, DiffusionLM]:
    """The random-weight checkpoints, in float64: other shapes of matmuls round otherwise.

    Two layers of each, for time's sake: the second's keys and values depend on other tokens, which
    is what caches freeze.
    """
    found = {}
    for folder in sorted(PARITY.iterdir()):
        found[folder.name] = load_model(str(folder), device="cpu", dtype="float64")
        module: Any = found[folder.name].module
        module.model.layers = module.model.layers[:2]
        module.config.num_hidden_layers = 2
    return found


@dataclass
class Setup:
    """What decides the tokens of a batch.

    Attributes
    ----------
    prompts
        int64 [length] each.
    noise
        Seed of temperature's noise.
    """

    name: str
    model: DiffusionLM
    settings: DecodingSettings
    prompts: list[Tensor]
    noise: int


def setup(rng: random.Random) -> Setup:
    """A random one, small enough to decode in milliseconds."""
    name = rng.choice(sorted(models()))
    model = copy.copy(models()[name])
    ends = rng.choice((0, 0, 0, 1, 20))  # most random tokens would end nothing
    model.eos_token_ids = frozenset(rng.sample(range(model.vocab_size), ends))
    block = rng.choice((1, 2, 3, 4, 4, 5, 6, 8, 8, 8))
    caches = [kind for kind in model.family.caches if kind != "prefix-shared"]
    options: dict[str, Any] = {"cache": rng.choice(caches), "block_length": block}
    options["gen_length"] = block * rng.randint(1, max(1, 16 // block))
    if options["cache"] == "block" and rng.random() < 0.3:
        options["gen_length"] = rng.randint(1, 16)
    policies = ["static", "static", "threshold", "sequential", "entropy-bounded"]
    if options["cache"] in ("none", "block"):
        policies += ["joint"] * (3 if name == "llada21-a" else 1)
    options["policy"] = rng.choice(policies)
    if rng.random() < 0.4:
        options["steps_per_block"] = rng.randint(1, 2 * block)
        options["schedule"] = rng.choice(("even", "timestep", "round"))
    else:
        options["tokens_per_step"] = rng.randint(1, rng.choice((2, block + 1)))
    if options["policy"] != "joint":
        options["score"] = rng.choice(("confidence", "confidence", "margin", "entropy"))
    options |= {
        "threshold": rng.choice((0.0, 0.02, 0.1, 0.5, 0.9, 1.0, rng.random())),
        "edit_threshold": rng.choice((0.0, 0.02, 0.2, 0.9, 1.0)),
        "max_post_steps": rng.choice((0, 1, 2, 3, 16)),
        "entropy_bound": rng.choice((0.0, 0.1, 2.0, 20.0)),
        "temperature": rng.choice((0.0, 0.0, 0.3, 1.0, 5.0)),
        "stop_at_eos": rng.random() < 0.5,
    }
    if options["temperature"] > 0:
        options["top_k"] = rng.choice((None, None, 1, 2, 5, 1000))
        options["top_p"] = rng.choice((None, None, 0.1, 0.5, 0.95, 1.0))
    if model.family.sub_block_length or rng.random() < 0.15:
        options["sub_block_length"] = rng.choice([k for k in range(1, block + 1) if block % k == 0])
    prompts = [
        torch.tensor([draw_token(rng, model) for _ in range(rng.randint(1, 13))])
        for _ in range(rng.choice((1, 1, 2, 3)))
    ]
    return Setup(name, model, DecodingSettings.parse(**options), prompts, rng.randrange(1 << 31))


def draw_token(rng: random.Random, model: DiffusionLM) -> int:
    """Any token but the mask."""
    token = rng.randrange(model.vocab_size - 1)
    return token + (token >= model.mask_token_id)


# ---------------------------------------------------------------- drafts


class Origins:
    """Drafts nothing and keeps, for every root, the candidates that drafts would be made of."""

    token_ranks = 1 << 20  # all of them
    asks_rejected = False

    def __init__(self) -> None:
        self.by_step: dict[int, Candidates] = {}

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """No drafts."""
        self.by_step[root.step] = candidates
        return root.ids.new_empty((0, len(root.ids)))


class Knows:
    """Drafts states that plain decoding passed through, and states that are nearly so."""

    token_ranks = 1
    asks_rejected = True

    def __init__(self, task: Task, rng: random.Random, wrong: float) -> None:
        self.task, self.rng, self.wrong = task, rng, wrong

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """Up to five next states, some of them with another token."""
        mask, drafts = self.task.model.mask_token_id, []
        for cursor in self.task.path[root.step :][: self.rng.randint(0, 5)]:
            ids = cursor.ids.clone()
            if int((ids[candidates.positions] != mask).sum()) > room:
                continue
            filled = [k for k in candidates.positions.tolist() if ids[k] != mask]
            if filled and self.rng.random() < self.wrong:
                ids[self.rng.choice(filled)] = draw_token(self.rng, self.task.model)
            drafts.append(ids)
        return torch.stack(drafts) if drafts else root.ids.new_empty((0, len(root.ids)))


class TakingTurns:
    """Another drafter, or none, for every forward."""

    rests = False

    def __init__(self, drafters: Sequence[Drafter | None], rng: random.Random) -> None:
        self.drafters, self.rng = drafters, rng

    def begin(self, canvas: Canvas) -> None:
        """Nothing to prepare."""

    def after_forward(self, sequences: int, seconds: float) -> None:
        """Nothing to hear."""

    def advise(self) -> Advice:
        """Any of them."""
        drafter = self.rng.choice(self.drafters)
        return Advice(drafter, None)

    def learn(self, advice: Advice, steps: int, seconds: float) -> None:
        """Nothing to learn."""

    def why(self) -> str:
        """Nothing to say."""
        return "at random"


def future(plain: Task, setup_: Setup, sequence: int, depth: int) -> Fills:
    """What a graph has to hold to draft this very decode so many steps ahead."""
    origins = Origins()
    task = decoded(setup_, sequence, origins, PLAIN)
    fills: set[tuple[tuple[int, int], ...]] = set()
    for step, ranked in origins.by_step.items():
        for later in task.path[step : step + depth]:
            pairs = []
            for i, position in enumerate(ranked.positions.tolist()):
                token = int(later.ids[position])
                if token != plain.model.mask_token_id:
                    pairs.append((i, ranked.tokens[i].tolist().index(token)))
            if pairs:
                fills.add(tuple(pairs))
    return [list(fill) for fill in sorted(fills)]


def random_fills(rng: random.Random) -> Fills:
    """Nodes that extend each other, or hold anything."""
    fills: Fills = [[]]
    widest = rng.choice((2, 4, 40))
    for _ in range(rng.choice((1, 4, 12))):
        pair = (rng.randrange(widest), rng.choice((0, 0, 1, 2, rng.randrange(400))))
        fills.append([*rng.choice(fills if rng.random() < 0.8 else [[]]), pair])
    return fills[1:]


def random_weights(rng: random.Random, model: DiffusionLM) -> AcceptanceWeights:
    """An acceptance model that means nothing."""
    draw = np.random.default_rng(rng.randrange(1 << 31)).normal
    tokens = [(rng.randrange(model.vocab_size), rng.randrange(model.vocab_size), 3) for _ in "ab"]
    return AcceptanceWeights(
        draw(0, 1, len(POSITION_FEATURES)),
        draw(0, 1, len(POSITION_FEATURES) + 1) if rng.random() < 0.5 else None,
        abs(draw(0, 1)),
        draw(0, 1, len(TOKEN_FEATURES)),
        Bigrams(tokens, model.vocab_size),
    )


def drafter_of(
    rng: random.Random, plain: Task, setup_: Setup, sequence: int
) -> tuple[str, Callable[[Task], None]]:
    """Kind of the drafts for a decode, and what gives them to its task."""
    model = setup_.model
    make: dict[str, Callable[[], Drafter]] = {
        "random graph": lambda: GraphDrafter(random_fills(rng), model),
        "its own future": lambda: GraphDrafter(
            future(plain, setup_, sequence, rng.randint(1, 4)), model
        ),
        "acceptance model": lambda: AcceptanceDrafter(
            random_weights(rng, model), rng.randint(1, 12), model
        ),
        "one that knows": lambda: Knows(plain, rng, rng.choice((0.0, 0.3, 1.0))),
    }
    several = ["random graph", "acceptance model", "one that knows"]
    make["the best of several"] = lambda: BestOfDrafter(
        [make[one]() for one in rng.sample(several, len(several))]
    )
    kind = rng.choice((*make, "taking turns"))

    def give(task: Task) -> None:
        if kind == "taking turns":
            task.adviser = TakingTurns([None, *(make[one]() for one in several)], rng)
        else:
            task.drafter = make[kind]()

    return kind, give


# ---------------------------------------------------------------- verdict


def decoded(setup_: Setup, sequence: int, drafter: Drafter | None, edges: BlockEdges) -> Task:
    """One prompt, decoded alone."""
    task = make_task(
        setup_.model,
        setup_.prompts[sequence],
        setup_.settings,
        drafter,
        setup_.noise,
        sequence,
        edges,
    )
    for _ in run(setup_.model, [task]):
        pass
    return task


def states(task: Task) -> list[list[int]]:
    """Token ids of the whole sequence after every denoising step."""
    return [cursor.ids.tolist() for cursor in task.path]


def difference(ours: Task, plain: Task) -> str:
    """Say "same", or what plain decoding did otherwise."""
    mine, theirs = states(ours), states(plain)
    if mine != theirs:
        first = next((k for k, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), -1)
        return f"STATE {first} of {len(mine)}, {len(theirs)} plainly"
    if answer_ids(ours) != answer_ids(plain):
        return "ANSWER"
    if ours.stats.steps != plain.stats.steps:
        return f"{ours.stats.steps} STEPS, {plain.stats.steps} plainly"
    return "same"


def judge(seed: int) -> list[tuple[str, str]]:
    """Name, and "same" or what is wrong, of every drafted decode of a case."""
    rng = random.Random(seed)
    chosen = setup(rng)
    plains = [decoded(chosen, k, None, PLAIN) for k in range(len(chosen.prompts))]
    label = f"{chosen.name}, {chosen.settings.cache}, {chosen.settings.policy}"
    found = []
    for _ in range(ROUNDS):
        edges = BlockEdges(*(rng.random() < 0.5 for _ in range(3)))
        kinds, tasks = [], []
        for sequence, plain in enumerate(plains):
            kind, give = drafter_of(rng, plain, chosen, sequence)
            task = make_task(
                *(chosen.model, plain.prompt, chosen.settings, None),
                *(chosen.noise, sequence, edges),
            )
            give(task)
            kinds.append(kind)
            tasks.append(task)
        for _ in run(chosen.model, tasks, rng.randint(1, len(tasks))):
            pass
        found += [
            (f"{label}, {kind}", difference(ours, plain))
            for kind, ours, plain in zip(kinds, tasks, plains, strict=True)
        ]
    return found


def main() -> None:
    """Run all cases and print the counts."""
    options = arguments(__doc__, 19_000).parse_args()
    torch.set_num_threads(1)
    tally = Tally(("same",))
    for seed in tally.seeds(options):
        started = process_time()
        try:
            found = judge(seed)
        except Exception as error:  # what this is looking for
            found = [("broken", f"TRACEBACK {type(error).__name__}: {error}"[:300])]
        seconds = (process_time() - started) / len(found)
        for name, outcome in found:
            kind = name.rpartition(", ")[0] or name
            tally.add(kind, outcome, f"seed {seed} ({name})", seconds)
    print(tally.table())
    print(tally.line())
    sys.exit(bool(tally.bugs))


if __name__ == "__main__":
    main()
