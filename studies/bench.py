"""Calibrate and benchmark the tiny models: `make bench` fills README.md.

With prompts of GSM8K, `make bench GSM8K=FILE`, docs/results.md too. Runs the commands that a user
would run, one after the other, and puts together what they measured. Run it on an idle machine:
counts repeat anywhere but for those of `auto`, times do not.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fresh import forgetting_costs
from pages import add_into, at_least, expect, fill, start

from spiffy.bench.tables import markdown
from spiffy.schemas.bench import Bench, Result


@dataclass(frozen=True)
class Case:
    """One run of spiffy-bench.

    Attributes
    ----------
    budgets
        Numbers of drafts.
    samples, repeats
        Prompts, and decodes of each by each method.
    """

    model: str
    cache: str
    policy: str
    dataset: str
    budgets: str = "1,2,4,8,16,32"
    samples: int = 12
    repeats: int = 3

    @property
    def name(self) -> str:
        """Folder of the run."""
        return "-".join((self.model, self.cache, self.policy, Path(self.dataset).stem))


FEW = {"budgets": "1,8,32", "samples": 8, "repeats": 2}


def cases(gsm8k: str | None) -> list[Case]:
    """What is measured; without a file of GSM8K that is left out."""
    found = []
    for policy in ("static", "threshold"):
        found.append(Case("tiny-sdar", "block", policy, "synthetic"))
        found.append(Case("tiny-llada2", "block", policy, "synthetic", samples=8, repeats=2))
        for model in ("tiny-llada", "tiny-dream"):
            found.append(Case(model, "dual", policy, "synthetic", samples=8, repeats=2))
        found.append(
            Case("tiny-llada", "none", policy, "synthetic", "1,8,32", samples=8, repeats=1)
        )
    for dataset in (gsm8k, "humaneval"):
        if dataset is not None:
            found.append(Case("tiny-sdar", "block", "static", dataset, **FEW))  # type: ignore[arg-type]
            found.append(Case("tiny-llada", "dual", "static", dataset, **FEW))  # type: ignore[arg-type]
    return found


def run(*words: str) -> None:
    """Run one of the project's commands; where answers differ, its tables say so."""
    print("$", shlex.join(words), flush=True)
    program = Path(sys.executable).with_name(words[0])
    code = subprocess.run([program, *words[1:]], check=False).returncode
    if code and not (code == 1 and words[0] == "spiffy-bench"):
        raise SystemExit(f"{words[0]} ended with exit code {code}")


def measure(case: Case, out: Path, gen_length: int) -> Bench:
    """Calibrate our graph and the paper's, and decode held-out prompts in every way."""
    folder = out / case.name
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {"expected-steps": folder / "graph.json", "paper": folder / "paper.json"}
    for objective, path in graphs.items():
        run(
            "spiffy-calibrate",
            *("--model", case.model, "--cache", case.cache, "--policy", case.policy),
            *("--dataset", case.dataset, "--gen-length", str(gen_length)),
            *("--objective", objective, "--out", str(path)),
        )
    with forgetting_costs():
        run(
            "spiffy-bench",
            *("--graph", str(graphs["expected-steps"]), "--paper", str(graphs["paper"])),
            *("--dataset", case.dataset, "--samples", str(case.samples)),
            *("--repeats", str(case.repeats), "--budgets", case.budgets, "--out", str(folder)),
        )
    return Bench.load(folder / "bench.json")


def threads(number: int | None) -> str:
    """How many, in words."""
    return "a GPU" if number is None else f"{number} thread" + "s" * (number != 1)


def machines(benches: Sequence[Bench]) -> str:
    """What the runs ran on, how often, in a few words; which lines, where they are not alike."""
    found: dict[str, list[int]] = {}
    for line, bench in enumerate(benches, start=1):
        ran, data = bench.machine, bench.data
        facts = (
            f"{data.samples} prompts, {data.repeats} repeat{'s' * (data.repeats != 1)}",
            f"up to {bench.decoding.gen_length} tokens",
            ran.device,
            threads(ran.threads),
            ran.dtype,
            f"torch {ran.versions['torch']}",
            f"commit {(ran.git_revision or 'unknown')[:7]}",
        )
        found.setdefault(", ".join(facts), []).append(line)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"lines {', '.join(map(str, at))}: {facts}" for facts, at in found.items())


def same(bench: Bench, case: Case, gen_length: int) -> bool:
    """Whether an earlier run is of what is asked for."""
    data = bench.data
    return (bench.decoding.gen_length, data.samples + data.left_out, data.repeats) == (
        gen_length,
        case.samples,
        case.repeats,
    )


def describe(bench: Bench) -> str:
    """Which run a table is of."""
    data, machine = bench.data, bench.machine
    return (
        f"### {bench.model.id}, cache {bench.decoding.cache}, {bench.decoding.policy}, "
        f"{data.dataset}\n\n"
        f"{data.samples} prompts not calibrated on, {data.repeats} repeats, up to "
        f"{bench.decoding.gen_length} tokens; {machine.device}, "
        f"{threads(machine.threads)}, {machine.dtype}, torch {machine.versions['torch']}."
    )


def shown(bench: Bench) -> Bench:
    """Without the budgets in between, which the report's plots show."""
    kept = [r for r in bench.results if r.budget in (None, 1, 8, 32) or r.kind == "auto"]
    return bench.model_copy(update={"results": tuple(kept)})


def best(bench: Bench, kind: str, budget: int) -> Result | None:
    """The result of a kind at a budget, if it was measured."""
    return next((r for r in bench.results if (r.kind, r.budget) == (kind, budget)), None)


def headline(benches: Sequence[Bench]) -> str:
    """The README's table: one line per run."""
    lines = [
        "| model | cache | policy | NFE plain | 8 drafts | 32 drafts | positions at 8, 32 "
        "| speed with `auto`, median prompt | tokens identical |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for bench in benches:
        plain = bench.result(bench.baseline)
        eight, many = (best(bench, "model", n) or best(bench, "graph", n) for n in (8, 32))
        auto = next((result for result in bench.results if result.kind == "auto"), None)
        if eight is None or many is None or auto is None:
            continue
        differing = sum(result.differing for result in bench.results)
        ratio = auto.speedup
        lines.append(
            f"| {bench.model.id} | {bench.decoding.cache} | {bench.decoding.policy} | {plain.nfe} "
            f"| {eight.nfe} ({plain.nfe / eight.nfe:.2f}x fewer) "
            f"| {many.nfe} ({plain.nfe / many.nfe:.2f}x fewer) "
            f"| {eight.positions_computed / plain.positions_computed:.2f}x, "
            f"{many.positions_computed / plain.positions_computed:.2f}x "
            f"| {ratio.value:.2f}x ({ratio.low:.2f}-{ratio.high:.2f}) "
            f"| {'yes' if not differing else f'no ({differing} differ)'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every case, print the tables, and put them into Markdown files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the runs")
    parser.add_argument("--gen-length", type=at_least(1), default=64)
    parser.add_argument("--gsm8k", help="JSONL file with GSM8K's train or test split")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--reuse", action="store_true", help="take the runs that are there")
    add_into(parser)
    args = parser.parse_args()
    if args.into and args.only:
        parser.error("--only: pages hold all cases, leave out --into")
    # docs/results.md has what GSM8K's prompts gave, too: without them it stays as it is.
    keys = ("bench", "headline") if args.gsm8k else ("headline",)
    expect(parser, args.into, *keys)
    if args.gsm8k and not Path(args.gsm8k).is_file():
        parser.error(f"--gsm8k {args.gsm8k} is no file")
    if not any(args.only in case.name for case in cases(args.gsm8k)):
        parser.error(f"--only {args.only}: no case has this in its name")
    benches: list[Bench] = []
    for case in cases(args.gsm8k):
        if args.only in case.name:
            done = args.out / case.name / "bench.json"
            found = Bench.load(done) if args.reuse and done.is_file() else None
            if found is not None and not same(found, case, args.gen_length):
                print(f"{done}: of another length or number of prompts, measured anew", flush=True)
                found = None
            benches.append(found or measure(case, args.out, args.gen_length))
            print(f"\n{describe(benches[-1])}\n\n{markdown(shown(benches[-1]))}", flush=True)
    command = "`make bench`" if not args.gsm8k else "`make bench GSM8K=FILE`"
    tables = "\n\n".join(f"{describe(b)}\n\n{markdown(shown(b))}" for b in benches)
    synthetic = [bench for bench in benches if bench.data.dataset == "synthetic"]
    note = (
        f"{command}: generated word problems that neither training nor calibration saw; `auto` "
        f"keeps over repeats what it has learned; {machines(synthetic)}"
    )
    blocks = {"bench": f"{command}\n\n{tables}", "headline": f"{note}\n\n{headline(synthetic)}"}
    for block in blocks.values():
        print(f"\n{block}")
    for key in keys:
        fill(args.into, key, blocks[key])


if __name__ == "__main__":
    start(main)
