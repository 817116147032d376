"""How many threads the commands compute with, and threads that decode with one model."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chain_graph
from torch import Tensor

from spiffy.cli import threads as chosen
from spiffy.cli.threads import apart, read_threads, set_threads, usable_cpus, wait_passively
from spiffy.runtime import DiffusionLM, Output, decoding_settings, generate, load_model
from spiffy.runtime.models import attention
from spiffy.schemas import SpiffyError


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("limit", "cpus"),
    [("max 100000", 64), ("200000 100000", 2), ("50000 100000", 1), ("350000 100000", 4)],
)
def test_a_quota_of_control_groups_version_2_counts(tmp_path: Path, limit: str, cpus: int) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/pod/container\n")
    write(tmp_path / "sys/fs/cgroup/pod/cpu.max", f"{limit}\n")  # set for the group above
    assert usable_cpus(tmp_path) == cpus
    write(tmp_path / "proc/self/cgroup", "0::/of/the/host\n")  # a container that sees its own root
    write(tmp_path / "sys/fs/cgroup/cpu.max", f"{limit}\n")
    assert usable_cpus(tmp_path) == cpus


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(("quota", "cpus"), [(-1, 64), (300000, 3)])
def test_a_quota_of_control_groups_version_1_counts(tmp_path: Path, quota: int, cpus: int) -> None:
    write(tmp_path / "proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/docker/x\n")
    for folder in ("cpu,cpuacct/docker/x", "cpu"):
        write(tmp_path / "sys/fs/cgroup" / folder / "cpu.cfs_quota_us", f"{quota}\n")
        write(tmp_path / "sys/fs/cgroup" / folder / "cpu.cfs_period_us", "100000\n")
    assert usable_cpus(tmp_path) == cpus


@pytest.mark.usefixtures("many")
def test_without_control_groups_it_is_the_affinity(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path) == 64
    write(tmp_path / "proc/self/cgroup", "nonsense\n0::/x\n")
    write(tmp_path / "sys/fs/cgroup/x/cpu.max", "what\n")
    assert usable_cpus(tmp_path) == 64


@pytest.mark.parametrize("words", ["0", "-1", "two", "1.5", ""])
def test_what_is_no_number_of_threads_is_refused(words: str) -> None:
    with pytest.raises(SpiffyError, match="--threads"):
        read_threads(words)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """A process that begins with two, and has chosen none yet."""
    before = torch.get_num_threads()
    chosen._initial_threads.cache_clear()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    chosen._initial_threads.cache_clear()


@pytest.mark.usefixtures("two_threads")
def test_small_forwards_get_one_thread_and_a_number_is_taken_as_it_is() -> None:
    model = load_model("tiny-llada", device="cpu")
    set_threads(model, decoding_settings(model, block_length=8, cache="dual"), None)
    assert torch.get_num_threads() == 1
    set_threads(model, decoding_settings(model, cache="none"), read_threads("3"))
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("earlier", [None, 1, 3])
def test_what_was_chosen_earlier_is_not_all_there_is(earlier: int | None) -> None:
    """A process that decodes with a small model first, and then with a large one."""
    model = load_model("tiny-llada", device="cpu")
    set_threads(model, decoding_settings(model, block_length=8, cache="dual"), earlier)
    set_threads(model, decoding_settings(model, cache="none"), None)
    assert torch.get_num_threads() == 2


def test_threads_sleep_soon_unless_somebody_says_how_they_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    monkeypatch.setattr(os, "environ", {})
    wait_passively()
    assert [os.environ[name] for name in names] == ["PASSIVE", "3000", str(usable_cpus())]
    for given in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}):
        monkeypatch.setattr(os, "environ", dict(given))
        wait_passively()
        assert {**os.environ, "OMP_NUM_THREADS": ""} == {**given, "OMP_NUM_THREADS": ""}


def test_what_is_done_apart_has_a_thread_of_its_own_and_says_what_came_of_it() -> None:
    place: ContextVar[str] = ContextVar("place")
    place.set("here")
    assert apart(place.get) == "here"
    assert apart(threading.current_thread) is not threading.main_thread()
    with pytest.raises(SpiffyError, match="in vain"):
        apart(_fail)


def _fail() -> None:
    raise SpiffyError("in vain")


COUNTED = """
import os, sys, time, torch
from spiffy.cli.threads import apart
def threads(): return len(os.listdir("/proc/self/task"))
def compute(): torch.rand(1 << 20).exp()
torch.set_num_threads(2)
before = threads()
apart(compute)
until = time.monotonic() + 30
while threads() > before and time.monotonic() < until:
    time.sleep(0.01)  # threads take a moment to end
between = threads()
compute()
print(between - before, threads() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_what_computes_apart_leaves_no_threads_behind() -> None:
    """As whoever computes in the main thread does."""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", COUNTED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


def interleaved(
    model: DiffusionLM, decodes: Sequence[Callable[[], Output]], patch: pytest.MonkeyPatch
) -> tuple[list[Output], int]:
    """What two threads decode, whose forwards are under way at once, and how often they met.

    The second one's ends before the last layer of the first one's. Where a thread has ended, or
    failed, the other goes on alone.
    """
    both, own, met = threading.Barrier(2), threading.local(), [0, 0]
    module: Any = model.module
    (first, *_, last), hidden_states = module.model.layers, model.hidden_states

    def meet(*numbers: int) -> None:
        if own.number in numbers:
            with suppress(threading.BrokenBarrierError):
                both.wait(timeout=60)
                met[own.number] += 1

    def watched(*inputs: Any) -> Tensor:
        hidden = hidden_states(*inputs)
        meet(1)
        return hidden

    def decode(number: int) -> Output:
        own.number = number
        try:
            return decodes[number]()
        finally:
            both.abort()

    patch.setattr(model, "hidden_states", watched)
    hooks = [
        first.register_forward_pre_hook(lambda *_: meet(0, 1)),
        last.register_forward_pre_hook(lambda *_: meet(0, 1)),
        last.register_forward_pre_hook(lambda *_: meet(0)),  # until the other's forward is over
    ]
    try:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(decode, range(2))), min(met)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("budget", ["auto", 2])
def test_threads_that_decode_with_one_model_keep_to_their_own_forwards(
    budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = load_model("tiny-sdar", device="cpu"), chain_graph("tiny-sdar", gen_length=48)
    texts = ["Tom has 3 apples. He buys 4 more. How many now?", "Lily has 9 pens. How many pens?"]
    plain = [generate(model, text, gen_length=48) for text in texts]
    own = model.module.config._attn_implementation  # type: ignore[union-attr]
    decodes = [partial(generate, model, text, graph=graph, budget=budget) for text in texts]
    outputs, met = interleaved(model, decodes, monkeypatch)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert met > 6  # thrice in a forward
    assert model.module.config._attn_implementation == own  # type: ignore[union-attr]
    assert attention._LENT == {}
