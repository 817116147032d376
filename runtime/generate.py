"""The public entry points of decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, SupportsIndex, TypeVar, get_args

from spiffy.runtime.budget.auto import auto_budget
from spiffy.runtime.decode import Scheduler, Stats, Task, checked_stop, decoded, make_task, run
from spiffy.runtime.draft import Drafter, Selection, lasting_drafter
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.text import Prompt, without_beginnings
from spiffy.runtime.step.own_policy import registered_policy
from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.decoding import FILTERS
from spiffy.schemas.errors import said
from spiffy.schemas.html import block, page, table
from spiffy.schemas.records import Budget

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass
class Output:
    """One decoded answer.

    Attributes
    ----------
    text, token_ids
        The answer up to and with its first end-of-sequence token (which the text leaves out), or
        before its first stop string.
    stats
        What it cost.
    states
        With `trace=True`: the whole sequence (prompt and answer ids) after every denoising step.
    """

    text: str
    token_ids: list[int]
    stats: Stats
    states: list[list[int]] = field(default_factory=list)

    def _repr_html_(self) -> str:
        """For notebooks: the answer, and what it cost."""
        stats, tokens = self.stats, len(self.token_ids)
        rows: list[list[object]] = [
            ["tokens", tokens],
            ["forwards (NFE)", stats.nfe],
            ["positions computed", stats.positions_computed],
            ["denoising steps", stats.steps],
            ["seconds", f"{stats.seconds:.3g}"],
        ]
        if stats.drafted:
            rows.append(["drafts accepted", f"{stats.accepted} of {stats.drafted}"])
        if stats.seconds:
            rows.append(["tokens/s", f"{tokens / stats.seconds:.1f}"])
        if stats.budgets:
            used = ", ".join(f"{name}: {count}" for name, count in stats.budgets.items())
            rows.append(["forwards by drafts", used])
        answer = block(self.text) if self.text else block(" ".join(map(str, self.token_ids)))
        return page(answer, table([], rows))


def decoding_settings(
    model: DiffusionLM,
    graph: DraftGraph | None = None,
    *,
    any_model: bool = False,
    **options: Any,
) -> DecodingSettings:
    """Settings for a model: the given options, then the graph's, then the family's defaults.

    With `any_model` the graph may be of another model of the family.

    Raises
    ------
    SpiffyError
        If an option is unknown or invalid, or the family cannot decode that way.
    """
    if graph is not None:
        graph.check_fits(model.family.name, model.fingerprint, model.vocab_size, any_model)
        base = graph.decoding.model_dump()
    else:
        base = {
            "sub_block_length": model.family.sub_block_length,
            "cache": model.family.caches[0],
        }
        if options.get("block_length") is None:  # not asked for what nothing may state
            base["block_length"] = model.default_block_length
    given = {key: value for key, value in options.items() if value is not None}
    if "tokens_per_step" in given:  # the graph's other way of saying the same gives way
        base |= {"steps_per_block": None, "schedule": "even"}
    if given.get("temperature") == 0:  # the graph's filters filter nothing then
        base |= dict.fromkeys(FILTERS)
    if isinstance(most := given.get("top_k"), int) and most >= model.vocab_size:
        given["top_k"] = None  # all of them, whatever the graph says
    settings = DecodingSettings.parse(**{**base, **given})
    if settings.own_policy:
        registered_policy(settings.policy)
    if settings.cache not in model.family.caches:
        known = ", ".join(model.family.caches)
        raise SpiffyError(f"{model.family.name} has no cache {settings.cache!r}: choose {known}")
    if settings.policy == "joint" and model.family.begins_blocks_alone:
        raise SpiffyError(
            f"{model.family.name} says nothing of a block's first token once the block has begun: "
            "policy joint cannot edit it, choose another"
        )
    return settings


def check_drafting(graph: DraftGraph | None, budget: Budget, selection: Selection) -> None:
    """Check what says how many drafts there are, and who chooses them.

    Raises
    ------
    SpiffyError
        If one is none, or there is nothing to draft with.
    """
    if graph is not None and not isinstance(graph, DraftGraph):
        raise SpiffyError(
            f"graph of type {type(graph).__name__}: give a DraftGraph, as DraftGraph.load(FILE) is"
        )
    if budget != "auto" and type(budget) is not int:
        raise SpiffyError(f"budget {budget!r}: give 'auto' or a number of drafts")
    if selection not in get_args(Selection):
        raise SpiffyError(f"selection {selection!r}: choose {' or '.join(get_args(Selection))}")
    if graph is None and budget != "auto":
        raise SpiffyError(f"budget {budget} counts drafts: give a graph")


def _check_drafter(drafter: Drafter, graph: DraftGraph | None) -> None:
    if graph is not None:
        raise SpiffyError("give a graph or a drafter of your own, not both")
    missing = [name for name in ("token_ranks", "asks_rejected") if not hasattr(drafter, name)]
    if missing or not callable(drafter) or isinstance(drafter, type):
        lacks = " and ".join(missing) or "__call__"
        if isinstance(drafter, type):
            raise SpiffyError(f"drafter {drafter.__name__} is a class: give an object of it")
        raise SpiffyError(f"drafter of type {type(drafter).__name__} has no {lacks}: see Drafter")


def check_seed(seed: object, name: str = "seed") -> None:
    """Refuse a seed, or another number by its name, that is not whole.

    Raises
    ------
    SpiffyError
        Names it.
    """
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
        raise SpiffyError(f"{name} {seed!r}: give a whole number")


class Drafts:
    """Who drafts for tasks that are decoded with a graph: one drafter, or who chooses it.

    Raises
    ------
    SpiffyError
        If the arguments, which are those of `generate`, are wrong.
    """

    def __init__(
        self, graph: DraftGraph | None, budget: Budget = "auto", selection: Selection = "model"
    ) -> None:
        check_drafting(graph, budget, selection)
        self.graph, self.budget, self.selection = graph, budget, selection
        self._drafters: dict[DecodingSettings, Drafter] = {}  # tasks of the same settings share one

    def give(self, task: Task) -> None:
        """Let them draft for a task; without a graph nobody does.

        Raises
        ------
        SpiffyError
            If the budget is a number below 1.
        """
        if self.graph is None:
            return
        if self.budget == "auto":
            task.adviser = auto_budget(task, self.graph, self.selection)
            return
        if task.settings not in self._drafters:
            drafting = (self.graph, task.settings, self.budget, self.selection)
            self._drafters[task.settings] = lasting_drafter(task.model, *drafting)
        task.drafter = self._drafters[task.settings]


class TaskMaker:
    """The options of `generate`, checked: what makes tasks of prompts."""

    def __init__(
        self,
        model: DiffusionLM,
        *,
        raw: bool = False,
        system: str | None = None,
        stop: str | Sequence[str] | None = (),
        graph: DraftGraph | None = None,
        budget: Budget = "auto",
        selection: Selection = "model",
        drafter: Drafter | None = None,
        seed: int = 0,
        sequence: int = 0,
        edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
        trace: bool = False,
        any_model: bool = False,
        **options: Any,
    ) -> None:
        self._drafts = Drafts(graph, budget, selection)
        if drafter is not None:
            _check_drafter(drafter, graph)
        check_seed(seed)
        check_seed(sequence, "sequence")
        self.model, self.trace = model, trace
        self._settings = decoding_settings(model, graph, any_model=any_model, **options)
        self._encoding: dict[str, Any] = {"raw": raw, "system": system}
        self._drafter, self._seed, self._sequence, self._edges = drafter, seed, sequence, edges
        self._stop = checked_stop(model, stop)

    def one(self, prompt: Prompt) -> Task:
        """Prepare the decoding of a prompt.

        Raises
        ------
        SpiffyError
            If it cannot be decoded.
        """
        task = self._made(prompt, self._sequence)
        self._drafts.give(task)
        return task

    def all(self, prompts: Iterable[Prompt]) -> list[Task]:
        """Prepare the decoding of several, each of them a sequence of its own.

        Raises
        ------
        SpiffyError
            If one cannot be decoded: says which.
        """
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise SpiffyError(f"prompts of type {type(prompts).__name__}: give a list of prompts")
        tasks = []
        for number, prompt in enumerate(prompts):
            try:
                tasks.append(self._made(prompt, self._sequence + number))
            except SpiffyError as problem:
                raise SpiffyError(f"prompt {number}: {problem}") from None
        for task in tasks:
            self._drafts.give(task)
        return tasks

    def _made(self, prompt: Prompt, sequence: int) -> Task:
        ids = self.model.encode(prompt, **self._encoding)
        making = (self._drafter, self._seed, sequence, self._edges, self._stop)
        task = make_task(self.model, ids, self._settings, *making)
        task.keeps_path = self.trace
        return task


def generate(
    model: DiffusionLM,
    prompt: Prompt,
    *,
    raw: bool = False,
    system: str | None = None,
    stop: str | Sequence[str] | None = (),
    graph: DraftGraph | None = None,
    budget: Budget = "auto",
    selection: Selection = "model",
    drafter: Drafter | None = None,
    seed: int = 0,
    sequence: int = 0,
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
    trace: bool = False,
    any_model: bool = False,
    **options: Any,
) -> Output:
    """Decode one prompt; with a graph speculatively, to the same tokens.

    Parameters
    ----------
    prompt
        Text or messages, which the chat template wraps; or token ids int64 [length], or what a
        tokenizer returns.
    raw
        The text is templated already, or is to be continued: no template, and special tokens that
        it spells are tokens.
    system
        System message to put in front.
    stop
        Strings; the answer ends before the first of them.
    graph
        Draft graph of this model, also the source of options not given; None decodes plainly.
    budget
        Drafts per forward, the root not counted. "auto" learns while decoding how many pay, plain
        decoding included (`AutoBudget`); `Output.stats` says what was used and why. A number is
        taken as it is.
    selection
        "model" lets the artifact's acceptance model choose the drafts, where it has one, unless
        others would have more accepted (`BestOfDrafter`); "graph" takes its nodes in order.
    drafter
        A drafter of your own, instead of a graph's (docs/extending.md). Whatever it proposes, the
        tokens stay the same.
    seed, sequence
        With temperature > 0: the noise of a step is a function of these and the state alone.
    edges
        What may happen at the edge between two blocks; changes the cost, never the tokens.
    trace
        Also return the sequence after every denoising step.
    any_model
        Take a graph of another model of the family, such as the one this was fine-tuned from.
    options
        Fields of `DecodingSettings` (gen_length, block_length, policy, cache, ...).

    Raises
    ------
    SpiffyError
        If an option, the prompt, or the graph does not fit the model.
    """
    maker = TaskMaker(
        model,
        raw=raw,
        system=system,
        stop=stop,
        graph=graph,
        budget=budget,
        selection=selection,
        drafter=drafter,
        seed=seed,
        sequence=sequence,
        edges=edges,
        trace=trace,
        any_model=any_model,
        **options,
    )
    task = maker.one(prompt)
    for _ in run(model, [task]):
        pass
    return collect(task, trace)


def generate_many(
    model: DiffusionLM,
    prompts: Iterable[Prompt],
    *,
    graph: DraftGraph | None = None,
    batch_size: int = 8,
    budget: Budget = "auto",
    **options: Any,
) -> Iterator[Output]:
    """Decode many prompts in shared forwards; yields their outputs in order, as they are ready.

    The tokens are those of `generate`, prompt by prompt, but for what another batch size changes in
    floating point. A prompt that finishes makes room for the next. All are read and checked before
    this returns; the first forward is made when the first output is asked for.

    Parameters
    ----------
    prompts
        Each is whatever `generate` takes.
    batch_size
        Prompts that share forwards, at most.
    graph, budget, options
        As for `generate`, the same for all prompts. With temperature > 0 prompt k draws as
        `generate(..., sequence=sequence + k)` does.

    Raises
    ------
    SpiffyError
        If an option or the graph does not fit the model, or a prompt does not, whose number (from
        0) is named. So is that of one whose decode fails, after the outputs before it. A policy of
        your own that fails is no matter of one prompt: that is raised at once.
    """
    maker = TaskMaker(model, graph=graph, budget=budget, **options)
    scheduler, tasks = Scheduler(model, batch_size), maker.all(prompts)
    finished = chain.from_iterable(scheduler.run(tasks, failed_too=True))
    collected = (
        (task, collect(task, maker.trace) if task.error is None else task.error)
        for task in finished
    )
    return _unless_failed(in_order(tasks, collected))


def _unless_failed(outputs: Iterable[Output | Exception]) -> Iterator[Output]:
    for number, output in enumerate(outputs):
        if isinstance(output, Exception):
            reason = said(output) or type(output).__name__
            raise SpiffyError(f"prompt {number}: {reason}") from output
        yield output


def in_order(keys: Iterable[Key], pairs: Iterable[tuple[Key, Value]]) -> Iterator[Value]:
    """Values in the order of their keys, as soon as they and those before them have come."""
    waiting, came = deque(keys), {}
    for key, value in pairs:
        came[key] = value
        while waiting and waiting[0] in came:
            yield came.pop(waiting.popleft())


def answer_ids(task: Task) -> list[int]:
    """The answer decoded so far: finished blocks, up to its end; see `answer`."""
    return answer(task)[1]


def answer(task: Task) -> tuple[str, list[int]]:
    """Text and ids of the answer so far, up to and with the first EOS, or before a stop string.

    Of a decode that is not finished: of finished blocks, and without text that more may change,
    such as half a character or what may become a stop string.
    """
    if not task.path:
        return "", []
    cursor, model = task.path[-1], task.model
    ids = decoded(task, cursor.ids, task.canvas.span(cursor.block).start)
    if task.stop and (cut := model.codec.before_stop(ids, task.stop)):
        return cut
    text = model.decode_text(ids)
    return (text if cursor.finished else settled(text, task.stop)), ids


def settled(text: str, stop: Sequence[str]) -> str:
    """What of an unfinished answer's text more tokens will not change."""
    return without_beginnings(text.rstrip("\ufffd"), stop)


def collect(task: Task, trace: bool = False) -> Output:
    """The output of a finished task."""
    if task.adviser is not None:
        task.stats.why = task.adviser.why()
    text, ids = answer(task)
    states = [cursor.ids.tolist() for cursor in task.path] if trace else []
    return Output(text, ids, task.stats, states)
