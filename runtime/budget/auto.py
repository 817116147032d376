"""Budget "auto" in the decode loop: an `Adviser` that asks a `SharedController`."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from threading import RLock
from weakref import ref

import numpy as np

from spiffy.runtime.budget.cost import known_profile
from spiffy.runtime.budget.estimates import PLAIN, Choice
from spiffy.runtime.budget.predict import pairs, steps_by_drafts
from spiffy.runtime.budget.shared import SharedController
from spiffy.runtime.decode import Advice, Task
from spiffy.runtime.draft import (
    AcceptanceDrafter,
    Drafter,
    Selection,
    fastest_search,
    way_of,
)
from spiffy.runtime.draft.artifact import same_steps
from spiffy.runtime.draft.ngrams import Floats
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.kept import KeptPerModule
from spiffy.runtime.step.canvas import Canvas
from spiffy.schemas import CostProfile, DecodingSettings, DraftGraph, ExpectedSteps
from spiffy.schemas.records import MOST_UNASKED


@dataclass(frozen=True)
class Cutoff:
    """How many of a root's drafts, by descending probability, are worth verifying.

    A draft with acceptance probability p gains p steps, which would otherwise take p / rate
    seconds, and makes the forward longer.

    Attributes
    ----------
    rate
        Steps per second of forwards and drafting that decoding achieves anyway.
    seconds
        float64 [n + 1], seconds of a forward with 0, 1, ... n drafts, not falling.
    """

    rate: float
    seconds: Floats

    def __call__(self, p: Floats) -> int:
        """From acceptance probabilities [k], descending, to how many drafts to keep."""
        n = min(len(p), len(self.seconds) - 1)
        gain = np.concatenate(([0.0], np.cumsum(p[:n])))
        worth = gain - self.rate * (self.seconds[: n + 1] - self.seconds[0])
        return int(worth.argmax())  # the fewest of equals


class AutoBudget:
    """Drafts by an artifact, as many as pay, as a `SharedController` learns it: an `Adviser`.

    One serves all sequences of a process that are decoded with the same model, graph and settings
    (`auto_budget`), together or one by one.

    Parameters
    ----------
    prior
        What forwards cost here as measured before, if it was.
    """

    def __init__(
        self,
        model: DiffusionLM,
        graph: DraftGraph,
        settings: DecodingSettings,
        selection: Selection = "model",
        prior: CostProfile | None = None,
    ) -> None:
        self.graph, self.settings = graph, settings
        self._module = ref(model.module)  # whose `AutoBudget` lives no longer than it
        steps = steps_by_drafts(graph)
        if selection == "graph" or not same_steps(graph, settings):
            steps.pop("model", None)
        steps = steps or {"graph": _UNSTATED}
        if "model" in steps:
            fastest_search()  # compiles, which must not happen amid forwards that are timed
        points = {way: [(p.drafts, p.steps) for p in curve] for way, curve in steps.items()}
        # Plain forwards alone say nothing of what drafts cost.
        seconds = [] if prior is None or len(prior.points) < 2 else pairs(prior.points)
        self.shared = SharedController(points, min(graph.budget, MOST_UNASKED), seconds)
        self._by_graph: dict[int, Drafter] = {}  # by number of drafts
        self._by_model: AcceptanceDrafter | None = None  # a copy of it drafts each forward
        self._lock = RLock()  # threads that decode with one model share it

    @property
    def rests(self) -> bool:
        """See `Adviser`."""
        return self.shared.rests

    def begin(self, canvas: Canvas) -> None:
        """See `Adviser`: where forwards compute all the answer, a longer one makes them longer."""
        block = canvas.span(0)
        # Positions that a plain forward computes; other caches recompute only the block.
        computed = {"none": range(canvas.length), "prefix": range(block.start, canvas.length)}
        with self._lock:
            # Forwards that several sequences share mix their lengths: nothing is scaled there.
            self.shared.by_batch[1].start(len(computed.get(self.settings.plain_cache, block)))

    def after_forward(self, sequences: int, seconds: float) -> None:
        """See `Adviser`."""
        with self._lock:
            self.shared.after_forward(sequences, seconds)

    def advise(self) -> Advice:
        """See `Adviser`."""
        with self._lock:
            choice = self.shared.choose()
            if choice.way is None:
                return _NO_DRAFTS
            return Advice(self._drafter(choice), choice)

    def learn(self, advice: Advice, steps: int, seconds: float) -> None:
        """See `Adviser`."""
        with self._lock:
            self.shared.learn(advice.choice, steps, seconds)

    def why(self) -> str:
        """See `Adviser`."""
        with self._lock:
            return self.shared.current.why()

    def _drafter(self, choice: Choice) -> Drafter:
        """Who drafts one forward, by a choice with drafts."""
        assert choice.way is not None
        if choice.way == "graph":
            if choice.drafts not in self._by_graph:
                self._by_graph[choice.drafts] = self._way_of("graph", choice.drafts)
            return self._by_graph[choice.drafts]
        if self._by_model is None:
            made = self._way_of("model", choice.drafts)
            assert isinstance(made, AcceptanceDrafter)  # other settings have no such choices
            self._by_model = made
        # A copy shares the weights; its price is that of this thread's forwards, not of another's.
        drafter = copy(self._by_model)
        drafter.budget, drafter.cutoff = choice.drafts, self._cutoff(choice)
        return drafter

    def _way_of(self, way: Selection, drafts: int) -> Drafter:
        module = self._module()
        assert module is not None  # it is decoding
        model = DiffusionLM.of(module)
        assert model is not None  # one was made of it
        return way_of(model, self.graph, self.settings, drafts, way)

    def _cutoff(self, choice: Choice) -> Callable[[Floats], int]:
        """How many of a root's drafts to keep: all, where their number is only being tried."""
        controller = self.shared.current  # of this thread: others may have larger batches
        if controller.is_tried(choice):
            return len
        costs = controller.costs
        return Cutoff(1 / costs.per_step(choice), np.array(costs.forward_seconds(choice)))


_NO_DRAFTS = Advice(None, PLAIN)

#: Steps per forward where an artifact states none: about what the tiny models accept.
_UNSTATED = tuple(
    ExpectedSteps(drafts=n, steps=s) for n, s in ((0, 1.0), (1, 1.5), (3, 2.0), (8, 2.5), (32, 3.5))
)

_known: KeptPerModule[AutoBudget] = KeptPerModule()


def auto_budget(
    task: Task,
    graph: DraftGraph,
    selection: Selection = "model",
    prior: CostProfile | None = None,
) -> AutoBudget | None:
    """The process's `AutoBudget` for tasks like this one; None where there is nothing to draft.

    With `selection="model"` the graph's nodes compete too: choosing by the acceptance model takes
    time.

    Parameters
    ----------
    prior
        What forwards cost here; by default what was measured before for such tasks, if it was.
    """
    if not graph.nodes:
        return None
    model, settings = task.model, task.settings
    same = settings.model_dump_json(exclude={"gen_length", "stop_at_eos"})
    key = (id(graph), same, selection)  # it holds on to the graph

    def make() -> AutoBudget:
        known = prior or known_profile(task, graph.cost_profiles)
        return AutoBudget(model, graph, settings, selection, known)

    return _known.get(model.module, key, make, anew=prior is not None)
