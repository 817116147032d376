"""Evaluate tiny models by lm-evaluation-harness with and without drafts (docs/integrations.md).

Part of `make results`; it takes 6 minutes on one CPU core. The harness's own command scores
generated word problems that neither training nor calibration saw; counts are those in its results.
What `auto` chooses, and so its counts, is this machine's. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from losslessness import versions
from pages import add_into, at_least, command, expect, fill, start
from rich.progress import track

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import problems
from spiffy.runtime import decoding_settings, load_model

MODELS = (("tiny-llada", "dual"), ("tiny-dream", "dual"), ("tiny-sdar", "block"))
WAYS = ("plain", "auto", "8")
LENGTH = 64
TASK = """
task: problems
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: {length}}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (-?[0-9]+)"}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def write_task(folder: Path, samples: int) -> Path:
    """A task over test problems, as the harness reads them."""
    rows = [
        {"question": problem.question, "answer": problem.answer.rpartition("#### ")[2]}
        for problem in islice(problems("test"), samples)
    ]
    data = folder / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = folder / "problems.yaml"
    task.write_text(TASK.format(data=data, cache=folder / "cache", length=LENGTH), encoding="utf-8")
    return task


def write_graph(folder: Path, name: str, cache: str, samples: int) -> Path:
    """A graph for the model, calibrated here."""
    model, prompts = load_model(name, device="cpu"), load_prompts("synthetic", samples)
    settings = decoding_settings(model, gen_length=LENGTH, cache=cache)
    traces = record(model, prepare(model, prompts, settings), 4)
    path = folder / f"{name}.json"
    build_graph(model, prompts, settings, traces, 16).save(path)
    return path


def evaluate(task: Path, model_args: str, out: Path, more: Sequence[str]) -> dict[str, Any]:
    """Results of the harness's command."""
    command = [sys.executable, "-m", "spiffy.cli.lm_eval", "--model", "spiffy", "--device", "cpu"]
    command += ["--tasks", str(task), "--apply_chat_template", "--model_args", model_args]
    done = subprocess.run(
        [*command, "--output_path", str(out), *more], capture_output=True, text=True, check=False
    )
    paths = [*out.glob("*/results_*.json")]
    differs = done.returncode == 1 and paths  # an answer, and the table says so
    if done.returncode and not differs:
        raise SystemExit(done.stderr)
    (path,) = paths
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def line(name: str, cache: str, way: str, content: dict[str, Any]) -> str:
    """A row of the table."""
    score = content["results"]["problems"]
    value, error = (score[f"exact_match{kind},strict-match"] for kind in ("", "_stderr"))
    counts = content["config"]["spiffy"]["tasks"]["problems"]
    checked = counts.get("verified")
    identical = "-" if checked is None else f"{checked['identical']} of {checked['answers']}"
    return (
        f"| {name} | {cache} | {way} | {value:.3f} ± {error:.3f} | {counts['nfe']} "
        f"| {counts['positions_computed']} | {counts['steps_per_forward']:.2f} | {identical} |"
    )


def main() -> None:
    """Print the table, or put it into Markdown files between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=at_least(2), default=40, help="test problems")
    parser.add_argument("--calibrate", type=at_least(1), default=20, help="calibration problems")
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, "harness")
    lines = [
        "| model | cache | drafts | exact_match | NFE | positions | steps a forward | identical |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = write_task(folder, args.samples)
        runs = [(name, cache, way) for name, cache in MODELS for way in WAYS]
        for name, cache, way in track(runs, description="evaluating"):
            model_args, more = f"pretrained={name},cache={cache}", []
            if way != "plain":
                graph = folder / f"{name}.json"
                if not graph.exists():
                    write_graph(folder, name, cache, args.calibrate)
                model_args += f",graph={graph},budget={way}"
                more = ["--verify-share", "0.1"]
            content = evaluate(task, model_args, folder / f"{name}-{way}", more)
            lines.append(line(name, cache, way, content))
            print(lines[-1], flush=True)
    harness = content["lm_eval_version"]
    note = f"`{command(args)}` (generated problems; lm-evaluation-harness {harness}; {versions()})"
    block = "\n".join([note, "", *lines])
    print(f"\n{block}")
    fill(args.into, "harness", block)


if __name__ == "__main__":
    start(main)
