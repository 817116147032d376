"""Ray Data: a class for `Dataset.map_batches` that decodes rows with drafts, one model per actor.

    ds.map_batches(Decoder, fn_constructor_kwargs={"graph": "llada.json"}, batch_size=64,
                   compute=ray.data.ActorPoolStrategy(size=8), num_gpus=1)

It needs nothing of Ray itself. Progress, retries and placement are Ray's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiffy.calib.prompt_files import FIELDS, prompt_of
from spiffy.integrations.loaded import Loaded
from spiffy.runtime.decode import Task, run
from spiffy.runtime.generate import Output, collect
from spiffy.runtime.models.text import stop_strings
from spiffy.schemas import Budget, SpiffyError
from spiffy.schemas.errors import said
from spiffy.schemas.records import COUNTS

Columns = Mapping[str, Any]  # each np.ndarray [rows] or a list


class Decoder:
    """Decodes the prompts in batches of rows; every row comes back with its answer.

    Columns added: `text`, `token_ids`, `nfe`, `positions_computed`, `steps`, `accepted`, `seconds`,
    and `error`, which is empty, or says why this row has no answer.

    Parameters
    ----------
    model, graph, budget, seed, any_model, options
        As for `Loaded`.
    field
        Column that holds the prompt, text or messages; None: whichever `spiffy-decode` takes.
    index
        Column that numbers the rows: with temperature > 0 a row's noise depends on `seed` and its
        number. None: on `seed` and its prompt.
    prefix
        In front of the names of the columns added.
    batch_size
        Rows that share forwards; as some finish, others of the batch join.
    raw, system, stop
        See `generate`.

    Raises
    ------
    SpiffyError
        If an option is wrong, or the model or the graph cannot be had or do not fit together.
    """

    def __init__(
        self,
        model: str | None = None,
        graph: str | None = None,
        *,
        field: str | None = None,
        index: str | None = None,
        prefix: str = "",
        batch_size: int = 8,
        raw: bool = False,
        system: str | None = None,
        stop: str | Sequence[str] = (),
        budget: Budget | None = None,
        seed: int = 0,
        any_model: bool = False,
        **options: Any,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise SpiffyError(f"batch_size {batch_size!r}: give a number of rows from 1")
        if raw and system is not None:
            raise SpiffyError("raw takes prompts as they are: write the system message into them")
        self.field, self.index, self.prefix, self.batch_size = field, index, prefix, batch_size
        self.raw, self.system, self.stop = raw, system, stop_strings(stop)
        self.loaded = Loaded(model, graph, budget=budget, seed=seed, any_model=any_model, **options)

    def __call__(self, batch: Columns) -> dict[str, Any]:
        """The batch with the columns added.

        Raises
        ------
        SpiffyError
            If it is no dict of columns, has none of prompts, or one of those that are added.
        """
        self._check(batch)
        rows = len(next(iter(batch.values())))
        tasks: dict[int, Task] = {}
        errors = [""] * rows
        for row in range(rows):
            record = {name: _plain(column[row]) for name, column in batch.items()}
            try:
                tasks[row] = self._task(record)
            except SpiffyError as problem:
                errors[row] = str(problem)
        places = {id(task): row for row, task in tasks.items()}
        outputs: dict[int, Output] = {}
        for finished in run(self.loaded.model, tasks.values(), self.batch_size, failed_too=True):
            for task in finished:
                if task.error is None:
                    outputs[places[id(task)]] = collect(task)
                else:
                    errors[places[id(task)]] = said(task.error)
        found = [outputs.get(row) for row in range(rows)]
        added: dict[str, Any] = {
            "text": ["" if out is None else out.text for out in found],
            "token_ids": [[] if out is None else out.token_ids for out in found],
        }
        for name in COUNTS:
            added[name] = [0 if out is None else getattr(out.stats, name) for out in found]
        added["seconds"] = [0.0 if out is None else out.stats.seconds for out in found]
        added["error"] = errors
        return {**batch, **{self.prefix + name: values for name, values in added.items()}}

    def _check(self, batch: Columns) -> None:
        if not isinstance(batch, Mapping):
            raise SpiffyError(
                f"a batch of type {type(batch).__name__}: give map_batches batch_format='numpy'"
            )
        fields = [self.field] if self.field is not None else FIELDS
        names = {name if self.field is not None else name.lower() for name in batch}
        if names.isdisjoint(fields):
            raise SpiffyError(
                f"no column of prompts ({' or '.join(map(repr, fields))}) among "
                f"{', '.join(map(repr, batch))}: name it (field=)"
            )
        if self.index is not None and self.index not in batch:
            raise SpiffyError(f"no column {self.index!r}, which is to number the rows (index=)")
        added = ("text", "token_ids", *COUNTS, "seconds", "error")
        if taken := [self.prefix + name for name in added if self.prefix + name in batch]:
            raise SpiffyError(f"column {taken[0]!r} is there already: give a prefix= for new ones")

    def _task(self, record: Mapping[str, Any]) -> Task:
        loaded = self.loaded
        prompt = prompt_of(record, self.field)
        ids = loaded.model.encode(prompt, raw=self.raw, system=self.system)
        if self.index is not None:
            number = _number(record[self.index])
        else:
            digest = hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).digest()
            number = int.from_bytes(digest[:8], "big")
        return loaded.task(ids, loaded.settings, number, self.stop)


def _number(value: Any) -> int:
    """The number that a row has; a column with gaps holds 1.0 for 1."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (isinstance(value, float) and number != value):
        raise SpiffyError(f"its index is no whole number: {value!r}")
    return number


def _plain(value: Any) -> Any:
    """A cell as JSON would hold it: tables keep lists as arrays."""
    if isinstance(value, np.ndarray):
        return [_plain(part) for part in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return value
