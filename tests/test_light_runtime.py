"""spiffy.runtime decodes where nothing of calibration is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import PARITY

BLOCKED = (
    *("networkx", "scipy", "datasets", "spiffy.calib", "spiffy.graphs"),
    *("accelerate", "numba", "peft", "torchao"),  # of what users may ask for
)

SCRIPT = """
import importlib, pkgutil, sys

for name in {blocked!r}:
    sys.modules[name] = None  # importing it raises ImportError

import spiffy.runtime
for module in pkgutil.walk_packages(spiffy.runtime.__path__, "spiffy.runtime."):
    if not module.name.startswith("spiffy.runtime.draft.compiled"):  # used where numba is
        importlib.import_module(module.name)

import torch
from spiffy.runtime import load_model
from spiffy.runtime.decode import run
from spiffy.runtime.draft import GraphDrafter
from spiffy.runtime.decode import make_task
from spiffy.schemas import DecodingSettings

torch.set_num_threads(1)
model = load_model({checkpoint!r}, device="cpu")
settings = DecodingSettings.parse(block_length=4, gen_length=8, stop_at_eos=False)
paths = []
for drafter in (None, GraphDrafter([[(0, 0)], [(0, 0), (1, 0)]], model)):
    task = make_task(model, torch.arange(5), settings, drafter)
    for _ in run(model, [task]):
        pass
    paths.append([cursor.ids.tolist() for cursor in task.path])
assert paths[0] == paths[1]
assert all(sys.modules[name] is None for name in {blocked!r})
print("decoded", len(paths[0]), "steps")
"""


def test_every_runtime_module_works_without_calibration_and_its_libraries(tmp_path: Path) -> None:
    script = SCRIPT.format(blocked=BLOCKED, checkpoint=str(PARITY / "llada-a"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "decoded 8 steps\n"


def test_schemas_need_no_torch(tmp_path: Path) -> None:
    """Reading an artifact must not take the seconds that importing torch takes."""
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from spiffy.schemas import DraftGraph, DecodingSettings; DecodingSettings.parse()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
