"""`spiffy-try`: from a model's name to what drafts gain on this machine, in one command."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zipfile import ZIP_DEFLATED, ZipFile

import typer

from spiffy.calib.signals import on_stop
from spiffy.cli.common import INTERRUPTED, doing, log, run_app
from spiffy.cli.options import (
    Compile,
    Device,
    Dtype,
    Quantize,
    Revision,
    Threads,
    VersionOption,
    decoding_option,
    drafting_option,
    model_option,
    output_option,
    prompt_option,
    spread,
)
from spiffy.cli.streams import write
from spiffy.cli.threads import read_threads
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.decoding import check_setting, is_own_policy
from spiffy.schemas.io import write_atomically
from spiffy.schemas.records import MAX_NODES

if TYPE_CHECKING:
    from spiffy.schemas.bench import Bench

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_OPTIONS = "options.json"
_MACHINE = "machine.txt"
#: Of each policy's folder, what others can read the results from.
_KEPT = ("graph.json", "bench.json", "rows.jsonl", "table.md", "report.html")

_STATIC = ("--policy", "static")
_METHODS = ("plain", "chain", "graph", "model", "auto", "perfect")


@dataclass(frozen=True)
class _Model:
    """The model to try."""

    model: Annotated[
        str, model_option(help="Alias (sdar-1.7b, llada-8b, ...), hub id, or checkpoint folder.")
    ]
    revision: Revision = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Quantize = None
    compile: Compile = False
    threads: Threads = "auto"

    @property
    def ships(self) -> bool:
        """Whether it is one of the tiny models."""
        from spiffy.runtime.models import ALIASES

        return Path(ALIASES.get(self.model, "")).is_absolute()

    @property
    def folder(self) -> list[str]:
        """What the benchmark is told of a folder: the graph knows its name, not where it is.

        Any other model it takes from the graph, which has the commit, too.
        """
        from spiffy.runtime.models import ALIASES

        is_folder = self.model not in ALIASES and Path(self.model).is_dir()
        return ["--model", self.model] if is_folder else []

    @property
    def words(self) -> list[str]:
        """What both commands are told of it."""
        found = ["--device", self.device, "--dtype", self.dtype, "--threads", self.threads]
        found += [] if self.quantize is None else ["--quantize", self.quantize]
        return [*found, "--compile"] if self.compile else found


@dataclass(frozen=True)
class _Prompts:
    """The prompts to try it on."""

    dataset: Annotated[
        str | None,
        prompt_option(
            help="As for spiffy-calibrate. Default: gsm8k, for the tiny models synthetic.",
        ),
    ] = None
    calibrate: Annotated[int, prompt_option(min=2, help="Prompts to calibrate on.")] = 50
    samples: Annotated[int, prompt_option(min=1, help="Other prompts, to measure on.")] = 8


@dataclass(frozen=True)
class _Decoding:
    """How it decodes."""

    policies: Annotated[
        str,
        decoding_option(
            help="served: the policy that the model is served with, threshold for most. static: "
            "one token per step, the reference for quality. module:object: one of your own. With "
            "commas between them."
        ),
    ] = "served,static"
    gen_length: Annotated[int, decoding_option(help="Positions of an answer.")] = 128
    block_length: Annotated[
        int | None, decoding_option(help="Positions decoded together. Default: the model's.")
    ] = None
    cache: Annotated[
        str | None,
        decoding_option(help="Default: dual where the family has it, else its first one."),
    ] = None

    def check(self) -> None:
        """Refuse what is wrong before anything is loaded."""
        for word in self.words:
            if word not in ("served", "static") and not is_own_policy(word):
                problem = f"{word!r} is not served, static or module:object"
                raise SpiffyError(f"--policies {self.policies}: {problem}")
            if is_own_policy(word):
                from spiffy.runtime.step.own_policy import import_policy

                import_policy(word)
        for name in ("gen_length", "block_length", "cache"):
            if (value := getattr(self, name)) is not None:
                check_setting(name, value)

    @property
    def words(self) -> list[str]:
        """The policies, each once."""
        return list(dict.fromkeys(word.strip() for word in self.policies.split(",")))


@dataclass(frozen=True)
class _Trial:
    """All that decides what is measured, and where it goes."""

    model: _Model
    prompts: _Prompts
    decoding: _Decoding
    budgets: tuple[int, ...]
    folder: Path

    @property
    def names(self) -> list[str]:
        """The folder of each policy."""
        return [word.replace(":", "-") for word in self.decoding.words]

    @property
    def dataset(self) -> str:
        """Where prompts come from."""
        return self.prompts.dataset or ("synthetic" if self.model.ships else "gsm8k")

    def begin(self) -> None:
        """Make the folder and note the options, or refuse one that holds what others measured.

        Raises
        ------
        SpiffyError
            If it cannot be written to, or was made with other options, or prompts to calibrate on
            would be measured on.
        """
        path, model = self.folder / _OPTIONS, asdict(self.model)
        begun = any(self.folder.glob("*/work"))
        if not begun:
            self._check_prompts()
        if Path(self.model.model).is_dir():  # the same name elsewhere is another one
            model["model"] = str(Path(self.model.model).resolve())
        decoding = asdict(self.decoding)
        del decoding["policies"]  # each has a folder of its own
        groups = model, asdict(self.prompts), decoding
        text = json.dumps([*groups, self.budgets], indent=1) + "\n"
        try:
            if begun and path.exists() and path.read_bytes() != text.encode():
                raise SpiffyError(
                    f"{self.folder} holds a trial with other options ({path}): give another --out, "
                    "or remove it"
                )
            for name in self.names:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--out {self.folder}: cannot be written to ({error.strerror})"
            raise SpiffyError(problem) from None
        write_atomically(path, text)

    def _check_prompts(self) -> None:
        """Draw what both commands will draw: the second refuses prompts that the first had."""
        from spiffy.calib.prompts import load_prompts, prompt_digest

        first = load_prompts(self.dataset, self.prompts.calibrate)
        second = load_prompts(self.dataset, self.prompts.samples, split="test")
        known = {*first.digests}
        if shared := sum(prompt_digest(text) in known for text in second.texts):
            every = load_prompts(self.dataset)
            raise SpiffyError(
                f"--dataset {self.dataset}: {shared} of the {len(second.texts)} prompts to measure "
                f"on are among the {len(first.texts)} to calibrate on ({len(every.texts)} prompts "
                f"are there, {len(every.digests)} of them different): give a smaller --calibrate "
                "or --samples, or another --dataset"
            )

    def calibrate(self, name: str, settings: Sequence[str]) -> None:
        """Calibrate for a policy."""
        place, folder = ["--model", self.model.model], self.folder / name
        if self.model.revision is not None:
            place += ["--revision", self.model.revision]
        if self.decoding.block_length is not None:
            place += ["--block-length", str(self.decoding.block_length)]
        self._run(
            "spiffy-calibrate",
            *(*place, *self.model.words, *settings),
            *("--gen-length", str(self.decoding.gen_length), "--dataset", self.dataset),
            *("--samples", str(self.prompts.calibrate), "--workdir", str(folder / "work")),
            *("--out", str(folder / "graph.json")),
            done=folder / "calibrated",
        )

    def measure(self, name: str) -> None:
        """Measure the graph that was calibrated for a policy: all that it has."""
        folder = self.folder / name
        graph = DraftGraph.load(folder / "graph.json")
        methods = [m for m in _METHODS if m != "model" or graph.acceptance is not None]
        budgets = [n for n in self.budgets if n <= graph.budget] or [graph.budget]
        before = _written(folder / "bench.json")
        # A graph names its policy, and who uses it imports that.
        own = ("--policy", graph.decoding.policy) if graph.decoding.own_policy else ()
        self._run(
            "spiffy-bench",
            *("--graph", str(folder / "graph.json"), *self.model.folder, *self.model.words, *own),
            *("--dataset", self.dataset, "--samples", str(self.prompts.samples)),
            *("--repeats", "1", "--budgets", ",".join(map(str, budgets))),
            *("--methods", ",".join(methods), "--out", str(folder)),
            done=folder / "measured",
            differs=lambda: self._differs(name, before),
        )

    def _differs(self, name: str, before: int | None) -> bool:
        """Whether the benchmark has ended since, by telling of answers that differ."""
        if _written(self.folder / name / "bench.json") == before:
            return False
        bench = self.bench(name)
        return not bench.data.stopped and any(result.differing for result in bench.results)

    def _run(self, *words: str, done: Path, differs: Callable[[], bool] = lambda: False) -> None:
        """Run a command, unless the file `done` says that it has ended well.

        Exit code 1 is that of answers that differ, and of a crash: `differs` tells which.

        Raises
        ------
        SpiffyError
            If it does not end well. Answers that differ are a result.
        """
        command = shlex.join(words)
        if done.exists():
            log.print(f"done before: {command}", soft_wrap=True)
            return
        log.print(f"$ {command}", soft_wrap=True)
        code, told = run_apart(*words)
        if ended := code == 0 or (code == 1 and differs()):
            done.touch()
        if told or code == INTERRUPTED:
            log.print("interrupted: the same command goes on from here")
            raise typer.Exit(INTERRUPTED)
        if code < 0:
            raise SpiffyError(f"{words[0]} was ended by {_signal(-code)}")
        if not ended:
            raise SpiffyError(f"{words[0]} ended with exit code {code}, for the reason above")

    def bench(self, name: str) -> Bench:
        """What was measured for a policy."""
        from spiffy.schemas.bench import Bench

        return Bench.load(self.folder / name / "bench.json")

    def pack(self) -> Path:
        """Put together what others can read the results from."""
        files = [self.folder / _OPTIONS, self.folder / _MACHINE]
        files += [self.folder / name / file for name in self.names for file in _KEPT]
        path, content = self.folder / "results.zip", BytesIO()
        with ZipFile(content, "w", ZIP_DEFLATED) as packed:
            for file in files:
                if file.exists():
                    packed.write(file, file.relative_to(self.folder))
        write_atomically(path, content.getvalue())
        return path


def _written(path: Path) -> int | None:
    """When a file was written, in nanoseconds."""
    return path.stat().st_mtime_ns if path.exists() else None


def _signal(number: int) -> str:
    """What a signal is called."""
    if number == signal.SIGKILL:
        return "SIGKILL, which nothing here sends: the system does where memory is short"
    found = {each.value: each.name for each in signal.Signals}
    return found.get(number, f"signal {number}")


def run_apart(command: str, *words: str) -> tuple[int, bool]:
    """Run a command in a process of its own: the next one finds all memory free.

    It is waited for however it is interrupted: it finishes what is in hand. A terminal's Ctrl-C
    reaches it too; SIGTERM is passed on. Returns its exit code, and whether this process was told
    to stop meanwhile.
    """
    module = f"spiffy.cli.{command.removeprefix('spiffy-')}"
    told: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        if number == signal.SIGTERM:
            for process in running:
                process.send_signal(number)

    with on_stop(pass_on), subprocess.Popen([sys.executable, "-P", "-m", module, *words]) as child:
        running.append(child)
        if signal.SIGTERM in told:  # while it was started
            child.send_signal(signal.SIGTERM)
        code = child.wait()
    return code, bool(told)


@app.command()
@spread
def try_model(
    model: _Model,
    prompts: _Prompts,
    decoding: _Decoding,
    budgets: Annotated[
        str, drafting_option(help="Numbers of drafts to measure beside auto.")
    ] = "4,8,16,32",
    out: Annotated[
        Path | None, output_option(help="Folder to write. Default: spiffy-try/<alias>.")
    ] = None,
    version: VersionOption = False,
) -> None:
    """Try drafts on a model: calibrate, benchmark, and say whether they pay on this machine.

    For each of two baselines, the policy that the model is served with and static unmasking, it
    runs spiffy-calibrate and spiffy-bench, with their output, and prints both commands. All answers
    are compared with plain decoding's, token for token; exit code 1 if one differs. Ctrl-C is safe:
    the same command goes on where it stopped; a benchmark begins anew.

    Example: spiffy-try --model sdar-1.7b
    """
    decoding.check()
    read_threads(model.threads)
    place = Path(model.model)
    name = place.resolve().name if place.is_dir() else model.model.rsplit("/", 1)[-1]
    folder = out or Path("spiffy-try") / (name.lower() or "model")
    trial = _Trial(model, prompts, decoding, _numbers(budgets), folder)
    with doing("looking up the model"):
        cache, served = _chosen(model, decoding)
    trial.begin()
    with doing("describing the machine"):
        write_atomically(folder / _MACHINE, _machine())
    policies = {"served": served, "static": _STATIC}
    found: list[Bench] = []
    for word, name in zip(decoding.words, trial.names, strict=True):
        for bench in found[-1:]:  # now, too: what follows may take hours, and fail
            write(f"{_verdict(bench)}\n")
        trial.calibrate(name, (*cache, *policies.get(word, ("--policy", word))))
        trial.measure(name)
        found.append(trial.bench(name))
    for bench in found:
        write(f"{_verdict(bench)}\n")
    log.print(
        f"wrote {trial.pack()}: machine, graphs and results, with a prompt and all "
        "answers (docs/gpu.md: what to send back)",
        soft_wrap=True,
    )
    if any(result.differing for bench in found if bench.decoding.exact for result in bench.results):
        raise typer.Exit(1)


def _numbers(budgets: str) -> tuple[int, ...]:
    found = [word.strip() for word in budgets.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_NODES for word in found):
        raise SpiffyError(f"--budgets {budgets}: give numbers of drafts with commas between them")
    return tuple(sorted({int(word) for word in found}))


def _chosen(model: _Model, decoding: _Decoding) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options for the cache, and for the policy that the model is served with."""
    from spiffy.runtime import load_model
    from spiffy.runtime.models import ALIASES
    from spiffy.runtime.models.source import Source

    # Config and tokenizer say what family it is; weights are loaded by the commands.
    family = load_model(model.model, revision=model.revision, device="meta").family
    cache = decoding.cache or ("dual" if "dual" in family.caches else None)
    # Without the folders that it is under, and also of the folder that one is in.
    names = (Source(ALIASES.get(model.model, model.model)).own_name, Path(model.model).name)
    return () if cache is None else ("--cache", cache), served_with(family.name, *names)


def served_with(family: str, *names: str) -> tuple[str, ...]:
    """Options for the policy that a model of a family is served with (docs/settings.md).

    Nothing but its name tells LLaDA2.1 from LLaDA2.0: the checkpoint's, or a link's to it.
    """
    if family != "llada2":
        return ("--policy", "threshold", "--threshold", "0.9")
    if not any("llada2.1" in name.lower() for name in names):
        return ("--policy", "threshold", "--threshold", "0.95")
    return ("--policy", "joint", "--threshold", "0.7", "--edit-threshold", "0.5")


def _machine() -> str:
    """What times depend on."""
    from torch.utils import collect_env

    return f"{collect_env.get_pretty_env_info()}\n"  # type: ignore[no-untyped-call]


def _verdict(bench: Bench) -> str:
    """What a benchmark says, in words."""
    from spiffy.bench.tables import describe, headline

    return f"{describe(bench)}. {headline(bench).sentence}"


def main() -> None:
    """Entry point of `spiffy-try`."""
    run_app(app)


if __name__ == "__main__":
    main()
