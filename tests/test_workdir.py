"""Work directories: nothing lost, nothing half-written read, the same bytes however it went.

Longer than other files, because everything that can stop a recording is tried on one run.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Call, decode, parity_model, random_prompt
from safetensors.numpy import save

from spiffy.calib import frames, store
from spiffy.calib.audit import audit
from spiffy.calib.pipeline import groups, prepare, record
from spiffy.calib.prompts import PromptSet
from spiffy.calib.record import Recorder, Trace
from spiffy.calib.store import About, Stored, TraceFile, scan
from spiffy.calib.workdir import WorkDir, join, manifest_of
from spiffy.cli import calibrate, calibration_runs
from spiffy.runtime import decoding_settings, load_model
from spiffy.runtime.budget import predict
from spiffy.runtime.decode import Task, denoise, driver
from spiffy.runtime.decode.loop import Decoding
from spiffy.runtime.models.slots import Slots
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.workdir import Manifest

SETTINGS = ("--model", "tiny-sdar", "--gen-length", "16", "--budget", "4", "--device", "cpu")
ABOUT = About(0, "", 7, 9, "run")
Calibrate = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "predict", lambda *_: None)  # its tables are not asked for here
    monkeypatch.setattr(predict, "auto_profile", lambda *_: None)  # nor are times


@pytest.fixture
def run(call: Call) -> Calibrate:
    """Run `spiffy-calibrate` in this process."""
    return lambda *arguments: call("calibrate", *arguments)[::2]


def prompts_file(path: Path, numbers: range | list[int]) -> Path:
    lines = [f"Tom has {k} apples. He buys {k + 1} more. How many now?" for k in numbers]
    path.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    """Traces without a cache (many candidates), with SDAR's, by threshold, and with edits."""
    found = []
    for name, cache, policy in (
        ("llada-a", "none", "static"),
        ("sdar-a", "block", "static"),
        ("dream-a", "dual", "threshold"),
        ("llada21-a", "block", "joint"),
    ):
        model = parity_model(name)
        settings = decoding_settings(
            model,
            gen_length=24,
            block_length=8,
            cache=cache,
            policy=policy,
            threshold=0.3,
            edit_threshold=0.3,
        )
        found.append(Trace.of(decode(model, random_prompt(model, 9), settings, Recorder())))
    assert any(cursor.post_steps for cursor in found[-1].path)
    return found


def assert_same(ours: Trace, theirs: Trace) -> None:
    assert len(ours.path) == len(theirs.path)
    for a, b in zip(ours.path, theirs.path, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert Cursor(b.ids, a.block, a.block_step, a.step, a.finished, a.post_steps) == b
    for left, right in zip(ours.roots, theirs.roots, strict=True):
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            assert left.room == right.room
            for name in ("positions", "tokens", "log_p", "fresh"):
                a, b = getattr(left.candidates, name), getattr(right.candidates, name)
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
    assert ours.chains == theirs.chains


def test_a_trace_comes_back_bit_for_bit(traces: list[Trace]) -> None:
    for trace in traces:
        assert_same(store.decode(store.encode(trace, ABOUT)), trace)


def written(path: Path, traces: list[Trace]) -> bytes:
    file = TraceFile(path)
    for k, trace in enumerate(traces):
        file.append(store.encode(trace, About(k, "", 1, 1, "run")))
    file.sync()
    file.close()
    return path.read_bytes()


def test_a_torn_tail_is_dropped_wherever_it_was_torn(tmp_path: Path, traces: list[Trace]) -> None:
    path = tmp_path / "traces-0000.bin"
    whole = written(path, traces)
    ends = [place.offset + place.length for place in scan(path).places]
    assert ends[-1] == len(whole)
    cuts = [*range(ends[1], ends[1] + 60), *random.Random(0).sample(range(len(whole)), 30)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        file = TraceFile(path)
        kept = [end for end in ends if end <= cut]
        assert file.dropped == cut - (kept[-1] if kept else 0)
        assert [place.about.prompt for place in scan(path).places] == list(range(len(kept)))
        file.append(store.encode(traces[2], ABOUT))  # goes on behind what is good
        file.close()
        assert len(scan(path).places) == len(kept) + 1
        assert_same(Stored(scan(path).places)[-1], traces[2])


def test_a_damaged_record_is_passed_over_and_those_behind_it_are_not(
    tmp_path: Path, traces: list[Trace]
) -> None:
    path = tmp_path / "traces-0000.bin"
    whole = written(path, traces)
    middle = scan(path).places[1]
    draw = random.Random(1)
    for _ in range(40):
        at = draw.randrange(middle.offset - 48, middle.offset + middle.length)
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
        )
        found = scan(path)
        others = [k for k in range(len(traces)) if k != 1]
        assert [place.about.prompt for place in found.places] == others
        assert (found.damaged, found.end) == (1, len(whole))


def test_a_record_that_changes_after_it_was_found_is_not_used(
    tmp_path: Path, traces: list[Trace]
) -> None:
    path = tmp_path / "traces-0000.bin"
    whole = written(path, traces)
    stored = Stored(scan(path).places)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SpiffyError, match="changed while in use"):
        list(stored)


@pytest.mark.parametrize("cause", ["monkeypatch", "limit"])
def test_a_full_disk_keeps_the_traces_before(
    tmp_path: Path, traces: list[Trace], monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    path = tmp_path / "traces-0000.bin"
    whole = written(path, traces[:2])
    file = TraceFile(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if cause == "limit":  # the record's first 100 bytes fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, before[1]))
    else:
        original = os.pwrite

        def full(descriptor: int, data: memoryview, at: int) -> int:
            if at > len(whole):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(descriptor, data[:100], at)

        monkeypatch.setattr(os, "pwrite", full)
    try:
        with pytest.raises(SpiffyError, match=r"cannot be written \(.*\): traces .* are safe"):
            file.append(store.encode(traces[2], ABOUT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    assert path.read_bytes() == whole
    file.append(store.encode(traces[2], ABOUT))  # there is room again
    file.close()
    assert len(scan(path).places) == 3


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "traces-0000.bin"
    receive, send = os.pipe()
    owner = os.fork()
    if owner == 0:
        TraceFile(path)
        os.write(send, b"open")
        time.sleep(60)
        os._exit(0)
    assert os.read(receive, 4) == b"open"
    try:
        with pytest.raises(SpiffyError, match="another process is recording there"):
            TraceFile(path)
    finally:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
    TraceFile(path).close()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each part of `forked_runs.py`; "" for nothing."""
    command = [sys.executable, "forked_runs.py", str(tmp_path_factory.mktemp("forked"))]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_killed_at_any_moment_it_ends_in_the_same_bytes(wrong: dict[str, str]) -> None:
    """A small version of studies/kill.py: in a record, in a sync, before each of both renames."""
    assert wrong["killed"] == ""


def test_the_artifact_is_the_same_with_a_work_directory_and_when_it_goes_on(
    run: Calibrate, tmp_path: Path
) -> None:
    data = ("--dataset", prompts_file(tmp_path / "p.jsonl", range(5)), "--batch-size", 2)
    work = ("--workdir", tmp_path / "work")
    plain, ours, again = (tmp_path / name for name in ("plain.json", "ours.json", "again.json"))
    assert run(*SETTINGS, *data, "--out", plain)[0] == 0
    assert run(*SETTINGS, *data, *work, "--out", ours)[0] == 0
    assert ours.read_bytes() == plain.read_bytes()
    # The second group's last record is torn: it is recorded again, the others are not.
    path = tmp_path / "work" / "traces-0000.bin"
    third, fourth = scan(path).places[2:4]
    path.write_bytes(path.read_bytes()[: fourth.offset + 10])
    code, log = run(*SETTINGS, *data, *work, "--out", again)
    assert code == 0
    assert "dropped an unfinished record" in log
    assert "2 of 5 prompts are recorded already" in log
    assert scan(path).places[2] == third
    assert again.read_bytes() == plain.read_bytes()
    # Budget and objective come after recording: nothing is decoded, nothing is refused.
    size = path.stat().st_size
    changed = (*SETTINGS, "--budget", "3", "--objective", "paper")
    assert run(*changed, *data, *work, "--out", again)[0] == 0
    assert path.stat().st_size == size


def test_other_settings_are_refused_by_name(run: Calibrate, tmp_path: Path) -> None:
    data = ("--dataset", prompts_file(tmp_path / "p.jsonl", range(2)))
    base = (*SETTINGS, "--workdir", tmp_path / "work", "--out", tmp_path / "out.json")
    assert run(*base, *data)[0] == 0
    before = (tmp_path / "work" / "traces-0000.bin").read_bytes()
    other = prompts_file(tmp_path / "q.jsonl", range(3))
    for name in ("more", "others"):
        (tmp_path / name).mkdir()
    more = prompts_file(tmp_path / "more" / "p.jsonl", range(3))
    others = prompts_file(tmp_path / "others" / "p.jsonl", [0, 5])
    for setting, *arguments in (
        ("2 prompts drawn, not 3 (--samples)", "--dataset", more),
        ("with other prompts (--dataset, --field, --seed)", "--dataset", others),
        ("system none, not be brief (--system)", *data, "--system", "be brief"),
        ("decoding.gen_length 16, not 8 (--gen-length)", *data, "--gen-length", 8),
        ("batch_size 8, not 4 (--batch-size)", *data, "--batch-size", 4),
        ("decoding.policy", *data, "--policy", "threshold"),
        ("--threshold is read by --policy threshold or joint", *data, "--threshold", 0.5),
        ("--max-post-steps is read by --policy joint", *data, "--max-post-steps", 2),
        ("seed 0, not 1", "--dataset", "synthetic", "--seed", 1),
        ("edges.fold True, not False", *data, "--edges", "complete,first"),
        ("dtype float32, not float64", *data, "--dtype", "float64"),
        ("dataset p.jsonl, not q.jsonl", "--dataset", other),
        ("model.family sdar, not dream", *data, *("--model", "tiny-dream", "--block-length", 16)),
    ):
        code, log = run(*base, *arguments)
        assert code == 2
        errors = [line for line in log.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert setting in errors[0]
    assert (tmp_path / "work" / "traces-0000.bin").read_bytes() == before


@pytest.mark.parametrize("budget", [20, 130])  # more than there are nodes, and than a row is for
def test_a_graph_of_any_size_is_summed_up(run: Calibrate, tmp_path: Path, budget: int) -> None:
    data = ("--dataset", prompts_file(tmp_path / "p.jsonl", range(2)))
    settings = ("--model", "tiny-sdar", "--gen-length", 8, "--device", "cpu")
    out = tmp_path / "graph.json"
    code, log = run(*settings, *data, "--budget", budget, "--out", out)
    assert (code, out.is_file()) == (0, True)
    assert f"{DraftGraph.load(out).budget} nodes from" in log


@pytest.mark.parametrize(
    ("options", "why"),
    [((), "too few states were recorded"), (("--policy", "sequential"), "there is none for seq")],
)
def test_it_is_said_why_there_is_no_acceptance_model(
    options: tuple[str, ...], why: str, run: Calibrate, tmp_path: Path
) -> None:
    data = ("--dataset", prompts_file(tmp_path / "p.jsonl", range(2)))
    code, log = run(*SETTINGS, "--gen-length", 4, *options, *data, "--out", tmp_path / "a.json")
    assert (code, f"no acceptance model, the graph alone drafts: {why}" in log) == (0, True), log


def test_other_weights_of_the_same_configuration_are_told_apart() -> None:
    model = parity_model("llada-a", "float64")
    prompts = PromptSet("x", ("-",))
    settings = decoding_settings(model, gen_length=8, block_length=8)
    ours = manifest_of(model, prompts, settings, 1, 1)
    assert ours == manifest_of(model, prompts, settings, 1, 1)
    assert not {"raw", "system"} & ours.content().keys()  # as before there were such options
    for other, difference in (
        (replace(prompts, raw=True), "raw"),
        (replace(prompts, system="S"), "S"),
    ):
        theirs = manifest_of(model, other, settings, 1, 1)
        assert difference in str(ours.difference(theirs))
        assert ours.digest() != theirs.digest()
        assert Manifest.model_validate_json(json.dumps(theirs.content())) == theirs
    # What is None may be left out of what is written: it differs from either side.
    sub = settings.model_copy(update={"sub_block_length": 4})
    theirs = manifest_of(model, prompts, sub, 1, 1)
    assert ours.difference(theirs) == "decoding.sub_block_length none, not 4 (--sub-block-length)"
    assert theirs.difference(ours) == "decoding.sub_block_length 4, not none (--sub-block-length)"
    weight = next(model.module.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.001)
    try:
        assert "weights" in str(ours.difference(manifest_of(model, prompts, settings, 1, 1)))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_unusable_work_directories_are_refused_in_one_line(
    run: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = (*SETTINGS, "--samples", 1, "--out", tmp_path / "out.json", "--workdir")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text('{"format": "spiffy.workdir", "version": 9}')
    (tmp_path / "endless").mkdir()
    (tmp_path / "endless" / "manifest.json").write_text('{"seed": 1e999}')
    for name, message in (
        ("full", "not empty and no work directory"),
        ("file", "cannot be a work directory"),
        ("old", "version: "),
        ("old", "(made by another version, or damaged: record again into another folder)"),
        ("endless", "manifest.json: holds a number that is not finite"),
    ):
        code, log = run(*base, tmp_path / name)
        assert code == 2
        assert message in log
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    original = os.open

    def read_only(path: object, flags: int, *mode: int, **options: int) -> int:
        if flags & os.O_CREAT and "traces" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(path, flags, *mode, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    code, log = run(*base, tmp_path / "readonly")
    assert (code, "Read-only file system" in log) == (2, True)
    assert not (tmp_path / "out.json").exists()


def work_of(folder: Path, texts: tuple[str, ...] = ("abc", "abd")) -> tuple[list[Any], Manifest]:
    """Tasks of two prompts and the manifest to record them with."""
    model = load_model("tiny-sdar", device="cpu")
    settings = decoding_settings(model, gen_length=8, block_length=8)
    prompts = PromptSet("x", texts)
    tasks = prepare(model, prompts, settings)
    return tasks, manifest_of(model, prompts, settings, len(tasks), 1)


_FOREIGN = {
    "fewer fields": '{"prompt": 0}',
    "no object": "[]",
    "not JSON": "{",
    "nothing": None,
}


@pytest.mark.parametrize("kind", [*_FOREIGN, "no safetensors", "other arrays"])
def test_whole_records_of_another_version_are_refused_in_one_line(
    tmp_path: Path, kind: str
) -> None:
    _, manifest = work_of(tmp_path)
    WorkDir(tmp_path / "work", manifest).__exit__()
    about = _FOREIGN.get(kind, json.dumps(asdict(replace(ABOUT, run=manifest.digest()))))
    arrays = {"a": np.zeros(1)}
    payload = save(arrays, {"about": about}) if about is not None else save(arrays, {"b": ""})
    file = TraceFile(tmp_path / "work" / "traces-0000.bin")
    file.append(b"abc" if kind == "no safetensors" else payload)
    file.close()
    before = file.path.read_bytes()
    message = "traces-0000.bin: the record at byte 48 was written by another version: record again"
    if kind == "other arrays":
        stored = Stored(scan(file.path).places)
        with pytest.raises(SpiffyError, match=message):
            stored[0]
        return
    for _ in range(2):  # the lock is let go
        with pytest.raises(SpiffyError, match=message):
            WorkDir(tmp_path / "work", manifest)
    with pytest.raises(SpiffyError, match=message):
        join([tmp_path / "work"])
    assert file.path.read_bytes() == before


def test_a_prompt_that_is_encoded_otherwise_now_is_refused(tmp_path: Path) -> None:
    """Equal texts, other ids: a template that writes the date, another transformers."""
    tasks, manifest = work_of(tmp_path)
    later, _ = work_of(tmp_path, ("abc", "abe"))
    with WorkDir(tmp_path / "work", manifest) as work:
        work.record(tasks[0].model, work.missing(tasks)[:1])
    with WorkDir(tmp_path / "work", manifest) as work:
        assert work.missing(later) == [later[1:]]  # what is not recorded yet can be any
        work.record(later[1].model, work.missing(later))
    with WorkDir(tmp_path / "work", manifest) as work:
        assert work.missing(later) == []
        with pytest.raises(SpiffyError, match="prompt 1 had other token ids when it was recorded"):
            work.missing(tasks)


def test_a_file_is_read_once_where_nobody_else_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, manifest = work_of(tmp_path)
    scans: list[Path] = []
    scan_all = frames.scan_records

    def counted(path: Path, about: Any) -> Any:
        scans.append(path)
        return scan_all(path, about)

    monkeypatch.setattr(store, "scan_records", counted)
    monkeypatch.setattr(frames, "scan_records", counted)
    with WorkDir(tmp_path / "work", manifest) as work:
        work.record(tasks[0].model, work.missing(tasks))
        kept = work.traces()
    assert len(scans) == 1
    again, _ = work_of(tmp_path)
    with WorkDir(tmp_path / "work", manifest) as work:
        assert work.missing(again) == []
        found = work.traces()
    assert len(scans) == 2
    for ours, theirs in zip(found.prompts, kept.prompts, strict=True):
        assert_same(ours, theirs)
    # What another rank has recorded meanwhile is found.
    with WorkDir(tmp_path / "two", manifest) as first:
        third, _ = work_of(tmp_path)
        with WorkDir(tmp_path / "two", manifest, rank=1) as second:
            second.record(third[1].model, second.missing(third)[1:])
        first.record(third[0].model, first.missing(third)[:1])
        assert len(first.traces().prompts) == 2


@pytest.mark.parametrize(
    ("sent", "recorded"),
    [
        ([signal.SIGINT], 2),
        ([signal.SIGTERM], 2),
        ([signal.SIGTERM, signal.SIGTERM], 2),  # sent to all of a group, and passed on
        ([signal.SIGTERM, signal.SIGINT], 0),
    ],
)
def test_ctrl_c_finishes_the_prompts_in_hand_and_a_second_one_does_not(
    run: Calibrate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sent: list[signal.Signals],
    recorded: int,
) -> None:
    """And so does SIGTERM, which a scheduler sends at its time limit."""
    base = (*SETTINGS, "--samples", 4, "--batch-size", 2, "--workdir", tmp_path / "work")
    append = TraceFile.append

    def interrupted(self: TraceFile, payload: bytes) -> None:
        monkeypatch.setattr(TraceFile, "append", append)
        for number in sent:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        append(self, payload)

    monkeypatch.setattr(TraceFile, "append", interrupted)
    code, log = run(*base, "--out", tmp_path / "out.json")
    assert code == 130
    assert "Ctrl-C again stops at once" in log
    assert "the same command goes on" in log
    assert len(scan(tmp_path / "work" / "traces-0000.bin").places) == recorded
    assert not (tmp_path / "out.json").exists()
    assert run(*base, "--out", tmp_path / "out.json")[0] == 0


def test_recording_holds_one_trace_at_a_time(tmp_path: Path) -> None:
    model = parity_model("sdar-a")
    settings = decoding_settings(model, gen_length=8, block_length=8, stop_at_eos=False)
    ids = [random_prompt(model, 4 + k).tolist() for k in range(4)]
    tasks = prepare_ids(model, ids, settings)
    manifest = manifest_of(model, PromptSet("x", ("-",) * 4), settings, 4, 2)
    with WorkDir(tmp_path / "work", manifest) as work:
        work.record(model, work.missing(tasks))
        assert all(task.path == [] and task.drafter is None for task in tasks)
        stored = work.traces()
    kept = record(model, prepare_ids(model, ids, settings), 2)
    assert (stored.nfe, stored.positions_computed) == (kept.nfe, kept.positions_computed)
    assert isinstance(stored.prompts, Stored)
    for ours, theirs in zip(stored.growing, kept.growing, strict=True):
        assert_same(ours, theirs)


def prepare_ids(model, ids, settings):  # type: ignore[no-untyped-def]
    return prepare(model, PromptSet("x", [torch.tensor(row) for row in ids]), settings)


def test_groups_depend_on_nothing_but_order_and_size() -> None:
    assert [list(group) for group in groups(list("abcde"), 2)] == [["a", "b"], ["c", "d"], ["e"]]  # type: ignore[arg-type]


def but_command(path: Path) -> dict[str, Any]:
    """An artifact without the command line that made it, and without what only a model can tell."""
    content: dict[str, Any] = json.loads(path.read_bytes())
    assert content["provenance"].pop("command")
    content.pop("measured_steps")
    return content


def test_shards_join_to_what_one_run_writes(run: Calibrate, tmp_path: Path) -> None:
    data = ("--dataset", prompts_file(tmp_path / "p.jsonl", range(6)), "--batch-size", 2)
    whole = tmp_path / "whole.json"
    assert run(*SETTINGS, *data, "--out", whole)[0] == 0
    folders = [tmp_path / f"shard-{k}" for k in range(2)]
    for k, folder in enumerate(folders):
        out = ("--out", tmp_path / "none.json")
        code, log = run(*SETTINGS, *data, "--workdir", folder, "--shard", f"{k}/2", *out)
        assert code == 0
        assert f"recorded shard {k}/2" in log
    assert not (tmp_path / "none.json").exists()
    joined = tmp_path / "joined.json"
    for order in (folders, folders[::-1]):
        assert run("merge", *order, "--budget", 4, "--out", joined)[0] == 0
        assert but_command(joined) == but_command(whole)
    code, log = run("merge", folders[1], "--out", joined)
    assert code == 2
    assert "of 6 prompts are not recorded" in log
    twice = shutil.copytree(folders[0], tmp_path / "twice")
    code, log = run("merge", *folders, twice, "--budget", 4, "--out", joined)
    assert "were there more than once" in log
    assert but_command(joined) == but_command(whole)


@dataclass
class Failing:
    """Decodes of which some fail after a forward; counts those begun."""

    sequences: frozenset[int]
    begun: int = 0

    def __call__(self, task: Task, kv: Slots | None = None) -> Decoding:
        self.begun += 1
        decoding = denoise(task, kv)
        if task.sequence not in self.sequences:
            return decoding
        return self._failing(decoding)

    def _failing(self, decoding: Decoding) -> Decoding:
        yield next(decoding)
        raise SpiffyError("it computed NaN")


def test_prompts_that_fail_are_left_out_and_not_tried_again(
    run: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those that do not fit into memory: hours of others must not end with them."""
    data = ("--dataset", prompts_file(tmp_path / "p.jsonl", range(7)), "--batch-size", 2)
    failing = Failing(frozenset({0, 3}))
    monkeypatch.setattr(driver, "denoise", failing)
    whole, ours, joined = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    code, log = run(*SETTINGS, *data, "--out", whole)
    assert code == 0, log
    said = "2 of 7 prompts failed while they were decoded, and are left out"
    assert f"{said}; the first of them: it computed NaN" in log
    record = json.loads(whole.read_text())["calibration"]
    assert (record["samples"], record["held_out_samples"], record["prompts"]) == (4, 1, 7)
    work = (*SETTINGS, *data, "--workdir", tmp_path / "work", "--out", ours)
    failing.begun = 0
    assert run(*work)[0] == 0
    once = failing.begun
    assert ours.read_bytes() == whole.read_bytes()
    code, log = run(*work)
    assert (code, failing.begun - 2 * once) == (0, -7)  # what is measured, and nothing else
    assert said in log
    assert "NaN" not in log
    assert ours.read_bytes() == whole.read_bytes()
    folders = [tmp_path / f"shard-{k}" for k in range(2)]
    for k, folder in enumerate(folders):
        code, log = run(*SETTINGS, *data, "--workdir", folder, "--shard", f"{k}/2")
        assert (code, "1 of 4 prompts" in log, "1 of 3 prompts" in log) == (0, k == 0, k == 1)
    code, log = run("merge", *folders, "--budget", 4, "--out", joined)
    assert "2 prompts failed when they were decoded, and are left out" in log
    assert but_command(joined) == but_command(whole)


def test_where_all_or_many_in_a_row_fail_recording_ends_and_keeps_none_of_them(
    run: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the model's fault then, or the machine's, and another time they may come to an end."""
    failing = Failing(frozenset(range(99)))
    monkeypatch.setattr(driver, "denoise", failing)
    many = ("--dataset", prompts_file(tmp_path / "many.jsonl", range(21)), "--batch-size", 3)
    few = ("--dataset", prompts_file(tmp_path / "few.jsonl", range(2)), "--batch-size", 3)
    out = ("--out", tmp_path / "out.json")
    for data, begun in ((many, 18), (few, 2)):
        for work in ((), ("--workdir", tmp_path / f"work-{begun}")):
            failing.begun = 0
            code, log = run(*SETTINGS, *data, *work, *out)
            assert (code, failing.begun) == (2, begun)
            assert log.splitlines()[-1] == "error: it computed NaN"
    work = ("--workdir", tmp_path / "work-18")
    failing.sequences = frozenset({0, *range(3, 99)})
    assert run(*SETTINGS, *many, *work, *out)[0] == 2  # after three, of which two were decoded
    assert len(scan(tmp_path / "work-18" / "traces-0000.bin").places) == 3
    failing.sequences = frozenset()
    code, log = run(*SETTINGS, *many, *work, *out)
    assert (code, "1 of 21 prompts failed" in log) == (0, True)


def test_failures_end_first_and_are_no_row_where_others_of_their_group_are_decoded(
    run: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "denoise", Failing(frozenset(range(17))))
    data = ("--dataset", prompts_file(tmp_path / "p.jsonl", range(19)), "--batch-size", 19)
    code, log = run(*SETTINGS, *data, "--out", tmp_path / "out.json")
    assert (code, "17 of 19 prompts failed" in log) == (0, True), log


def test_a_shard_of_which_all_prompts_fail_is_recorded(
    run: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "denoise", Failing(frozenset({0, 1})))
    data = ("--dataset", prompts_file(tmp_path / "p.jsonl", range(4)), "--batch-size", 2)
    folders = [tmp_path / f"shard-{k}" for k in range(2)]
    for k, folder in enumerate(folders):
        code, log = run(*SETTINGS, *data, "--workdir", folder, "--shard", f"{k}/2")
        assert (code, "2 of 2 prompts failed" in log) == (0, k == 0), log
    code, log = run("merge", *folders, "--out", tmp_path / "out.json")
    assert (code, "2 prompts failed when they were decoded" in log) == (0, True)


def test_joining_does_not_depend_on_how_prompts_were_split(run: Calibrate, tmp_path: Path) -> None:
    results = []
    for name, split in (("a", ([0, 1, 2], [3, 4, 5])), ("b", ([5, 3], [2, 4, 0, 1, 3]))):
        folders = []
        for k, numbers in enumerate(split):
            folder = tmp_path / f"{name}{k}"
            data = prompts_file(tmp_path / f"{name}{k}.jsonl", list(numbers))
            arguments = ("--dataset", data, "--batch-size", 1, "--workdir", folder)
            assert run(*SETTINGS, *arguments, "--out", tmp_path / "one.json")[0] == 0
            folders.append(folder)
        for order in (folders, folders[::-1]):
            out = tmp_path / "joined.json"
            code, log = run("merge", *order, "--budget", 4, "--out", out)
            assert code == 0
            assert ("1 prompts were there more than once" in log) == (name == "b")
            results.append(out.read_bytes())
    assert len(set(results)) == 1
    assert json.loads(results[0])["calibration"]["samples"] == 5
    # The digest of several sets is not one that a set drawn again could have.
    found = audit(DraftGraph.load(tmp_path / "joined.json"), None, str(tmp_path / "a0.jsonl"))
    assert not found.wrong
    assert "data: joined from several sets of prompts" in found.unchecked


def test_a_repository_may_move_on_meanwhile(tmp_path: Path) -> None:
    model = load_model("tiny-sdar", device="cpu")
    settings = decoding_settings(model, gen_length=8, block_length=8)
    prompts = PromptSet("x", ("abc", "abd"))
    tasks = prepare(model, prompts, settings)
    begun = manifest_of(model, prompts, settings, 1, len(tasks))
    moved_on = begun.model_copy(
        update={"model": begun.model.model_copy(update={"revision": "0" * 40})}
    )
    for folder, manifest, part in (
        ("a", begun, tasks[:1]),
        ("a", moved_on, tasks[1:]),
        ("b", moved_on, prepare(model, prompts, settings)),
    ):
        with WorkDir(tmp_path / folder, manifest) as workdir:
            workdir.record(model, groups(part, 1))
    with WorkDir(tmp_path / "a", moved_on) as workdir:
        assert workdir.manifest == begun  # as it was recorded first
        assert not workdir.missing(tasks)
    assert join([tmp_path / "a", tmp_path / "b"]).repeated == 2


def test_it_may_move_on_between_what_several_ranks_record(tmp_path: Path) -> None:
    model = load_model("tiny-sdar", device="cpu")
    settings, prompts = decoding_settings(model, gen_length=8), PromptSet("x", ("abc", "abd"))
    tasks = prepare(model, prompts, settings)
    with WorkDir(tmp_path / "w", manifest_of(model, prompts, settings, 2, 8)) as work:
        work.record(model, work.missing(tasks))
    first = SimpleNamespace(rank=0, world=2, sharing=lambda make: make())
    moved_on = model.replaced(revision="0" * 40)
    traces = calibration_runs._record_in_workdir(
        calibration_runs.Recording(), tmp_path / "w", moved_on, prompts, tasks, first
    )
    assert traces is not None
    assert len(traces.prompts) == 2


def test_joined_sets_of_the_hub_keep_their_names(tmp_path: Path) -> None:
    folders = []
    for k, name in enumerate(("owner/name", "gsm8k", "p.jsonl", "q.csv")):
        tasks, manifest = work_of(tmp_path, (f"abc{k}",))
        manifest = manifest.model_copy(update={"dataset": name})
        folders.append(tmp_path / str(k))
        with WorkDir(folders[-1], manifest) as work:
            work.record(tasks[0].model, work.missing(tasks))
    assert join(folders).origin.dataset == "merged: gsm8k+jsonl+owner/name"


def test_directories_of_other_settings_are_not_joined(tmp_path: Path) -> None:
    model = parity_model("sdar-a")
    for name, length in (("a", 8), ("b", 16)):
        settings = decoding_settings(model, gen_length=length, block_length=8)
        manifest = manifest_of(model, PromptSet("x", ("-",)), settings, 1, 2)
        WorkDir(tmp_path / name, manifest).__exit__()
    with pytest.raises(SpiffyError, match=r"b: recorded with decoding.gen_length 16, not 8"):
        join([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(SpiffyError, match="not a work directory"):
        join([tmp_path])
    assert isinstance(manifest, Manifest)


def test_two_ranks_write_what_one_writes(wrong: dict[str, str]) -> None:
    assert wrong["two_ranks"] == ""


def test_a_dead_rank_is_named(wrong: dict[str, str]) -> None:
    assert wrong["dead_rank"] == ""


def test_ranks_without_a_work_directory_are_refused(
    run: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", tmp_path / "out.json")
    code, log = run(*SETTINGS, *out, "--shard", "2/2")
    assert (code, "from 0 to N - 1" in log) == (2, True)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, log = run(*SETTINGS, *out)
    assert (code, "give --workdir" in log) == (2, True)


def test_an_empty_system_message_is_one() -> None:
    assert Manifest.model_construct(raw=False, system="").content()["system"] == ""
    assert "system" not in Manifest.model_construct(raw=False, system=None).content()
