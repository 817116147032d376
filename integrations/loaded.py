"""What the doors that decode many prompts share: a model, a graph, and settings by their names."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from spiffy.runtime import decoding_settings, load_model
from spiffy.runtime.decode import Task, make_task
from spiffy.runtime.generate import Drafts, check_seed
from spiffy.runtime.models import DiffusionLM
from spiffy.runtime.models.source import model_of_graph
from spiffy.runtime.models.text import Prompt
from spiffy.runtime.step.own_policy import import_policy
from spiffy.schemas import Budget, DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.decoding import is_own_policy

_LOADING = tuple(signature(load_model).parameters)[1:]  # without the name


class Loaded:
    """A model and the draft graph that it decodes with, if any.

    Parameters
    ----------
    model
        Alias, hub id or folder; None: the graph's.
    graph
        File, folder or hub repository of a draft graph; None: decode plainly.
    budget
        Drafts per forward, or "auto".
    seed
        Decides the noise where the temperature is above 0.
    any_model
        Take a graph of another model of the family.
    options
        Options of `load_model`, and fields of `DecodingSettings`; what of these is not given is
        the graph's, else the family's. A policy `module:object` is imported if it is given here.

    Raises
    ------
    SpiffyError
        If an option is wrong, or the model or the graph cannot be had or do not fit together.
    """

    def __init__(
        self,
        model: str | None,
        graph: str | Path | None,
        *,
        budget: Budget | None = None,
        seed: int = 0,
        any_model: bool = False,
        **options: Any,
    ) -> None:
        check_seed(seed)
        if not isinstance(any_model, bool):  # such as "no", which would be taken for True
            raise SpiffyError(f"any_model {any_model!r}: give True or False")
        self.graph = None if graph is None else DraftGraph.find(graph)
        if self.graph is None and budget not in (None, "auto"):
            raise SpiffyError(f"budget {budget} counts drafts: give a graph")
        if budget not in (None, "auto") and (type(budget) is not int or budget < 1):
            raise SpiffyError(f"budget {budget!r}: give 'auto' or a number of drafts from 1")
        policy = options.get("policy")
        if isinstance(policy, str) and is_own_policy(policy):  # the user's words, not the graph's
            import_policy(policy)
        self.budget: Budget = budget or "auto"
        self.seed = seed
        loading = {name: options.pop(name) for name in _LOADING if name in options}
        self.model = _load(model, self.graph, graph, loading)
        self.settings = decoding_settings(self.model, self.graph, any_model=any_model, **options)
        self._drafts = Drafts(self.graph, self.budget)

    def task(
        self,
        prompt: Prompt,
        settings: DecodingSettings,
        sequence: int,
        stop: Sequence[str] = (),
        *,
        plain: bool = False,
    ) -> Task:
        """Prepare the decoding of one prompt, with drafts unless `plain`.

        Raises
        ------
        SpiffyError
            If the prompt cannot be decoded.
        """
        task = make_task(self.model, prompt, settings, None, self.seed, sequence, stop=stop)
        task.keeps_path = False
        if not plain:
            self._drafts.give(task)
        return task


def _load(
    model: str | None, graph: DraftGraph | None, place: str | Path | None, loading: dict[str, Any]
) -> DiffusionLM:
    """The model that is named, else that beside the graph, else the one that the graph names.

    It is for inference alone, so a large one is prepacked where that makes it faster.
    """
    loading = {"prepack": "auto", **loading}
    if model is not None:
        return load_model(model, **loading)
    if graph is None or place is None:
        raise SpiffyError("name a model, or give a graph, which names its own")
    name, revision = model_of_graph(graph, str(place))
    return load_model(name, **{**loading, "revision": loading.get("revision") or revision})
