"""What several test files need: models, prompts, and decoding with a drafter of one's own."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import Task, loop, make_task, run
from spiffy.runtime.draft import Candidates, Drafter
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.models.text import given_ids
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import (
    CalibrationRecord,
    DecodingSettings,
    DraftGraph,
    ModelRecord,
    Node,
    SpiffyError,
)

PARITY = Path(__file__).parent / "parity"


def shown(page: str, starts: str) -> str:
    """The block of code of a page that has a line starting with these words."""
    text = (PARITY.parent.parent / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if re.search(f"^{starts}", block, re.MULTILINE)]
    return found


def study(name: str) -> Any:
    """The module of a study."""
    with pytest.MonkeyPatch.context() as patch:  # a study may import another
        patch.setattr(sys, "path", [str(PARITY.parent.parent / "studies"), *sys.path])
        for waiting in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):  # some set them
            patch.setenv(waiting, os.environ.get(waiting, ""))
        return importlib.import_module(name)


@cache
def parity_model(name: str, dtype: str = "float32") -> DiffusionLM:
    """One of the random-weight checkpoints in tests/parity; do not change it."""
    return load_model(str(PARITY / name), device="cpu", dtype=dtype)


def with_eos(model: DiffusionLM, tokens: Iterable[int]) -> DiffusionLM:
    """The same model with other end-of-sequence tokens."""
    other = copy.copy(model)
    other.eos_token_ids = frozenset(tokens)
    return other


class Checkpoint:
    """A copy of a checkpoint in tests/parity, to be changed and loaded."""

    def __init__(self, folder: Path, source: str = "llada-a") -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for file in (PARITY / source).glob("*config.json"):
            shutil.copy(file, folder)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights: dict[str, Tensor] = load_file(PARITY / source / "model.safetensors")

    def load(self, **options: Any) -> DiffusionLM:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.weights, self.folder / "model.safetensors", {"format": "pt"})
        return load_model(str(self.folder), device="cpu", **options)

    def refusal(self, **options: Any) -> str:
        return refusal(lambda: self.load(**options))


def refusal(act: Callable[[], object]) -> str:
    """What an action is refused with: one line, and not a long one."""
    with pytest.raises(SpiffyError) as caught:
        act()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 1000
    return message


@dataclass
class Call:
    """Runs commands in this process, as their entry points would be."""

    captured: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, command: str, *arguments: object) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        main = importlib.import_module(f"spiffy.cli.{command.replace('-', '_')}").main
        self.monkeypatch.setattr(sys, "argv", [f"spiffy-{command}", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = self.captured.readouterr()
        return code, printed.out, printed.err


def chain_graph(name: str, drafts: int = 3, **options: Any) -> DraftGraph:
    """A graph of a shipped model that no calibration made: the best position, the best two, ..."""
    model = load_model(name, device="cpu")
    fills = [tuple((rank, 0) for rank in range(n + 1)) for n in range(drafts)]
    nodes = tuple(Node(fill=fill, parents=(n,), count=1) for n, fill in enumerate(fills))
    steps = tuple(1.0 + 0.3 * n for n in range(drafts + 1))
    return _by_hand(model, decoding_settings(model, **options), nodes, steps, roots=1)


def a_graph_of(model: DiffusionLM, **decoding: Any) -> DraftGraph:
    """A graph of three nodes by hand."""
    settings = {"cache": model.family.caches[0], "gen_length": 8, "block_length": 4, **decoding}
    if model.family.sub_block_length is not None:
        settings.setdefault("sub_block_length", settings["block_length"])
    nodes = (
        Node(fill=((0, 0),), parents=(0,), count=3),
        Node(fill=((0, 0), (1, 0)), parents=(1,), count=2),
        Node(fill=((1, 0),), parents=(0,), count=1),
    )
    return _by_hand(
        model, DecodingSettings.parse(**settings), nodes, (1.0, 1.5, 2.0, 2.25), roots=4
    )


def of_another_model(graph: DraftGraph, **facts: Any) -> DraftGraph:
    """The same graph, as if another model of the family had been calibrated."""
    record = graph.model.model_copy(update={"fingerprint": "m1-other", **facts})
    return graph.model_copy(update={"model": record})


def _by_hand(
    model: DiffusionLM,
    settings: DecodingSettings,
    nodes: tuple[Node, ...],
    expected_steps: tuple[float, ...],
    roots: int,
) -> DraftGraph:
    return DraftGraph(
        model=ModelRecord(
            family=model.family.name,
            id=model.name,
            revision=model.revision,
            fingerprint=model.fingerprint,
            vocab_size=model.vocab_size,
        ),
        decoding=settings,
        exact=True,
        calibration=CalibrationRecord(
            dataset="by hand",
            dataset_sha256="0" * 64,
            samples=1,
            held_out_samples=0,
            roots=roots,
            seed=0,
            objective="paper",
            tool_version="0.1.0",
        ),
        expected_steps=expected_steps,
        nodes=nodes,
    )


def own_examples(*case: object) -> Callable[[Any], Any]:
    """Examples of its own for each parametrisation of a test, the same in every run.

    What hypothesis derives from the source of the function that it calls is the same for all.
    """
    return hypothesis.seed(zlib.crc32(" ".join(map(str, case)).encode()))


def random_prompt(model: DiffusionLM, length: int, seed: int = 0) -> Tensor:
    """Prompt ids int64 [length] without the mask token."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    ids = torch.randint(0, model.vocab_size - 1, (length,), generator=generator)
    return ids + (ids >= model.mask_token_id)


def decode(
    model: DiffusionLM,
    prompt: Tensor,
    settings: DecodingSettings,
    drafter: Drafter | None = None,
    seed: int = 0,
    sequence: int = 0,
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
) -> Task:
    """Decode one prompt to the end; plainly without a drafter."""
    task = make_task(model, prompt, settings, drafter, seed, sequence, edges)
    for _ in run(model, [task]):
        pass
    return task


def collected(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Tasks of which `generate` and `spiffy-decode` make an output from here on."""
    module = sys.modules["spiffy.runtime.generate"]  # the package exports a function of that name
    collect, tasks = module.collect, []

    def noting(task: Task, trace: bool = False) -> Any:
        tasks.append(task)
        return collect(task, trace)

    monkeypatch.setattr(module, "collect", noting)
    return tasks


def states(task: Task) -> list[list[int]]:
    """Token ids of the whole sequence after every denoising step."""
    return [cursor.ids.tolist() for cursor in task.path]


def fold(rows: Iterable[Sequence[int]]) -> list[list[int]]:
    """Drop states that repeat the one before."""
    folded: list[list[int]] = []
    for row in rows:
        if not folded or folded[-1] != list(row):
            folded.append(list(row))
    return folded


@dataclass
class Oracle:
    """Drafts the next `depth` states of a decode whose future is known.

    Unless `obeys_room` is off, it keeps to the room given, as `Drafter` asks.
    """

    task: Task
    depth: int
    obeys_room: bool = True
    token_ranks = 1
    asks_rejected = True

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        mask = self.task.model.mask_token_id
        future = [
            ids
            for ids in (cursor.ids for cursor in self.task.path[root.step :][: self.depth])
            if not self.obeys_room or int((ids[candidates.positions] != mask).sum()) <= room
        ]
        return torch.stack(future) if future else root.ids.new_empty((0, len(root.ids)))


def fail_while_decoding(
    monkeypatch: pytest.MonkeyPatch,
    model: DiffusionLM,
    prompt: Any,
    error: Exception,
    at: int = 1,
    **how: Any,
) -> None:
    """Decodes of this prompt fail after so many steps."""
    step, doomed = loop.denoising_step, given_ids(model.encode(prompt, **how), model.vocab_size)

    def failing(task: Task, cursor: Cursor, *args: Any) -> Cursor:
        if cursor.step == at and torch.equal(task.prompt, doomed):
            raise error
        return step(task, cursor, *args)

    monkeypatch.setattr(loop, "denoising_step", failing)
