"""A server to measure, as users start it: a process of its own, asked over HTTP.

    python studies/serving.py 0.3b --model tiny-sdar ...

is `spiffy-serve` of a model grown into a real one's shape (`spiffy.bench.grow`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from spiffy.bench.grow import grow
from spiffy.calib.synthetic import problems
from spiffy.cli import serve
from spiffy.runtime import DiffusionLM
from spiffy.runtime.models.prepack import prepack_if_faster

_START_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """A running `spiffy-serve`."""

    address: str
    pid: int

    def sample(self, name: str, **labels: str) -> float:
        """One number of /metrics; 0 if nothing was counted."""
        text = httpx.get(f"{self.address}/metrics", timeout=60).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def resident_bytes(self) -> int:
        """Memory that the process holds."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(*options: str | Path, shape: str | None = None) -> Iterator[Server]:
    """Start a server at a free port; ask it to stop in the end, and see that it does.

    A model grown into a `shape` takes its small self's graph.

    Raises
    ------
    SystemExit
        If it does not start, or does not end well.
    """
    start = ["-m", "spiffy.cli.serve"] if shape is None else [__file__, shape]
    command = [sys.executable, *start, "--port", "0", *map(str, options)]
    if shape is not None and "--graph" in options:
        command.append("--any-model")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        if "http://" not in first:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        yield Server(first.split()[-1], process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(_START_SECONDS)
    if code:
        raise SystemExit(f"the server ended with exit code {code}")


def questions(count: int) -> list[str]:
    """Generated problems that neither training nor calibration saw."""
    return [problem.question for problem, _ in zip(problems("test"), range(count), strict=False)]


def calibrated(model: str, folder: Path, *options: str) -> Path:
    """A draft graph of a model, made by the command; an earlier one is taken as it is."""
    path = folder / f"{model}{''.join(options)}.json"
    if not path.exists():
        command = [sys.executable, "-m", "spiffy.cli.calibrate", "--model", model, "--out", path]
        subprocess.run([*map(str, command), *options], check=True, stdout=subprocess.DEVNULL)
    return path


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, ceil(round(share * len(ordered), 6)) - 1)]


def _serve_grown(shape: str) -> None:
    """Be `spiffy-serve`, but for the model."""
    import spiffy.runtime

    load = spiffy.runtime.load_model

    def load_grown(*args: Any, **options: Any) -> DiffusionLM:
        grown = grow(load(*args, **options), shape)
        prepack_if_faster(grown)  # as the command does with a large model
        return grown

    spiffy.runtime.load_model = load_grown
    serve.main()


if __name__ == "__main__":
    _serve_grown(sys.argv.pop(1))
