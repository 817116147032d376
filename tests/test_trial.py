"""`spiffy-try`: calibrates and measures, for the policy that a model is served with and static."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import PARITY, Call, chain_graph
from own_policies import Factor

from spiffy.calib import prompts
from spiffy.cli import trial
from spiffy.runtime.models import ALIASES
from spiffy.runtime.step import own_policy
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.bench import Bench

SMALL = ("--calibrate", 6, "--samples", 2, "--gen-length", 16, "--budgets", "2,64")


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Its commands run in this process; returns the words of each."""
    run: list[list[str]] = []

    def here(command: str, *words: str) -> tuple[int, bool]:
        run.append([command, *words])
        module = importlib.import_module(f"spiffy.cli.{command.removeprefix('spiffy-')}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", run[-1])
            try:
                module.main()
            except SystemExit as stop:
                return int(stop.code or 0), False
        return 0, False

    monkeypatch.setattr(trial, "run_apart", here)
    return run


def test_it_calibrates_measures_and_says_it_again(
    call: Call, run_here: list[list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "made" / "anew"
    asked = ("trial", "--model", "tiny-sdar", "--policies", "static", *SMALL, "--out", out)
    code, printed, said = call(*asked)
    assert code == 0, said
    assert [words[0] for words in run_here] == ["spiffy-calibrate", "spiffy-bench"]
    (line,) = printed.splitlines()[-1:]
    assert line.startswith("tiny-sdar: static, cache block")
    folder = out / "static"
    graph, bench = DraftGraph.load(folder / "graph.json"), Bench.load(folder / "bench.json")
    assert graph.decoding == bench.decoding
    assert (graph.decoding.gen_length, bench.data.samples) == (16, 2)
    assert graph.calibration.dataset == bench.data.dataset == "synthetic"
    assert {result.budget for result in bench.results if result.kind == "graph"} == {2}
    assert ("model" in {result.kind for result in bench.results}) == bool(graph.acceptance)
    with zipfile.ZipFile(out / "results.zip") as packed:
        names = {*packed.namelist()}
        assert packed.read("static/bench.json") == (folder / "bench.json").read_bytes()
    assert {"options.json", "machine.txt", "static/graph.json", "static/rows.jsonl"} <= names
    assert not any("work" in name for name in names)

    run_here.clear()
    code, again, said = call(*asked)
    assert (code, run_here) == (0, [])
    assert again.splitlines() == [line]
    assert said.count("done before: spiffy-") == 2

    (out / "options.json").write_bytes(b"\xff")  # damaged, or by hand
    assert call(*asked)[0] == 2
    (out / "options.json").unlink()
    assert call(*asked)[0] == 0
    code, _, said = call(*asked, "--samples", 3)
    assert (code, run_here) == (2, [])
    assert "holds a trial with other options" in said

    results = [r.model_copy(update={"differing": int(r.compared > 0)}) for r in bench.results]
    bench.model_copy(update={"results": tuple(results)}).save(folder / "bench.json")
    code, printed, said = call(*asked)  # as the benchmark does; all is written all the same
    assert code == 1
    assert "static, cache block" in printed
    assert "results.zip" in said


def test_a_folder_is_measured_where_it_is(
    call: Call, run_here: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A graph knows what a folder is called; here there is another one of that name."""
    shutil.copytree(ALIASES["tiny-sdar"], tmp_path / "elsewhere" / "mine")
    (tmp_path / "here" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    place = ("--model", tmp_path / "elsewhere" / "mine", "--dataset", "synthetic")
    few = ("--policies", "static", *SMALL, "--budgets", 2, "--out", "out")
    code, printed, said = call("trial", *place, *few)
    assert code == 0, said
    assert printed.splitlines()[-1].startswith("mine: static, cache block")
    assert [words[0] for words in run_here] == ["spiffy-calibrate", "spiffy-bench"]


def test_what_was_found_is_said_before_the_next_policy_fails(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def calibrate(_: object, name: str, *__: object) -> None:
        if name == "static":
            raise SpiffyError("no more")

    monkeypatch.setattr(trial._Trial, "calibrate", calibrate)
    monkeypatch.setattr(trial._Trial, "measure", lambda *_: None)
    monkeypatch.setattr(trial._Trial, "bench", lambda _, name: name)
    monkeypatch.setattr(trial, "_verdict", lambda name: f"{name} pays")
    asked = ("trial", "--model", "tiny-sdar", "--dataset", "synthetic", *SMALL)
    code, printed, said = call(*asked, "--out", tmp_path / "out")
    assert (code, printed) == (2, "served pays\n")
    assert said.endswith("error: no more\n")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny-sdar", "--policy threshold --threshold 0.9"),
        ("tiny-llada", "--cache dual --policy threshold --threshold 0.9"),
        ("tiny-llada2", "--policy threshold --threshold 0.95"),
        (
            str(PARITY / "fastdllm2-a"),
            "--policy threshold --threshold 0.9",
        ),
    ],
)
def test_settings_are_those_that_a_family_is_served_with(
    model: str, options: str, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As docs/settings.md has them; interrupted, it goes on with what was not done."""
    run: list[tuple[str, ...]] = []
    codes = iter((130, 2))
    load = prompts.load_prompts  # the hub's are not at hand
    monkeypatch.setattr(prompts, "load_prompts", lambda _, *n, **by: load("synthetic", *n, **by))

    def ended(*command: str) -> tuple[int, bool]:
        run.append(command)
        return next(codes), False

    monkeypatch.setattr(trial, "run_apart", ended)
    asked = ("trial", "--model", model, "--out", tmp_path)
    code, _, said = call(*asked)
    assert code == 130
    assert "goes on from here" in said
    ((command, *words),) = run
    assert command == "spiffy-calibrate"
    assert options in " ".join(words)
    dataset = "synthetic" if model.startswith("tiny-") else "gsm8k"
    assert f"--dataset {dataset} --samples 50" in " ".join(words)
    assert call(*asked)[0] == 2
    assert run[0] == run[1]


def test_both_policies_are_measured_with_what_their_graphs_have(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three nodes and no acceptance model; it ends where a command does not end well.

    A command that fails with 1, without having written anything, has not ended well.
    """
    monkeypatch.setattr(trial, "run_apart", lambda *_: (1, False))
    code, _, said = call("trial", "--model", "tiny-sdar", "--gen-length", 64, "--out", tmp_path)
    assert (code, "spiffy-calibrate ended with exit code 1" in said) == (2, True)
    # Nothing was recorded: other options are welcome.
    run: list[str] = []

    def ended(*command: str) -> tuple[int, bool]:
        run.append(" ".join(command))
        if command[0] == "spiffy-calibrate":
            policy = command[command.index("--policy") + 1]
            graph = chain_graph("tiny-sdar", policy=policy)
            graph.save(Path(command[command.index("--out") + 1]))
        return 2 if len(run) == 4 else 0, False

    monkeypatch.setattr(trial, "run_apart", ended)
    monkeypatch.setattr(trial._Trial, "bench", lambda *_: None)
    monkeypatch.setattr(trial, "_verdict", lambda _: "")
    code, _, said = call("trial", "--model", "tiny-sdar", "--out", tmp_path)
    assert code == 2
    assert said.splitlines()[-1] == (
        "error: spiffy-bench ended with exit code 2, for the reason above"
    )
    assert [words.split()[0] for words in run] == ["spiffy-calibrate", "spiffy-bench"] * 2
    for bench, name in zip(run[1::2], ("served", "static"), strict=True):
        assert f"--graph {tmp_path / name / 'graph.json'}" in bench
        assert "--budgets 3 --methods plain,chain,graph,auto,perfect" in bench
    assert "--policy static" in run[2]


@pytest.mark.parametrize(
    ("texts", "options", "shared"),
    [
        ([f"What is {k}?" for k in range(7)], ("--calibrate", 6, "--samples", 2), 1),
        (["What?"] * 20, ("--calibrate", 4, "--samples", 3), 3),
    ],
)
def test_prompts_that_both_commands_would_use_are_refused_before_hours_of_calibration(
    texts: list[str],
    options: tuple[object, ...],
    shared: int,
    call: Call,
    run_here: list[list[str]],
    tmp_path: Path,
) -> None:
    """Too few for both, or one text many times: the benchmark would refuse them in the end."""
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    asked = ("trial", "--model", "tiny-sdar", "--dataset", file, "--out", tmp_path / "new")
    code, _, said = call(*asked, *options)
    assert (code, run_here) == (2, [])
    assert f"{shared} of the {options[-1]} prompts to measure on are among" in said
    assert "give a smaller --calibrate" in said
    assert not (tmp_path / "new").exists()


def test_a_refused_trial_makes_no_folder(call: Call, tmp_path: Path) -> None:
    (tmp_path / "static" / "work").mkdir(parents=True)
    (tmp_path / "options.json").write_text("others\n")
    code, _, said = call("trial", "--model", "tiny-sdar", "--out", tmp_path)
    assert (code, "other options" in said) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["options.json", "static"]


def test_a_policy_of_ones_own_is_named_to_both_commands(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which import it; a graph does not."""
    run: list[str] = []

    def ended(*command: str) -> tuple[int, bool]:
        run.append(" ".join(command))
        if command[0] == "spiffy-calibrate":
            graph = chain_graph("tiny-sdar")
            settings = graph.decoding.model_copy(update={"policy": "mine:rule"})
            graph.model_copy(update={"decoding": settings}).save(tmp_path / "mine-rule/graph.json")
            return 0, False
        return 2, False

    monkeypatch.setattr(trial, "run_apart", ended)
    monkeypatch.setattr(own_policy, "_registered", {"mine:rule": Factor(1.0)})
    asked = ("trial", "--model", "tiny-sdar", "--policies", "mine:rule", "--out", tmp_path)
    assert call(*asked)[0] == 2
    assert len(run) == 2
    assert all("--policy mine:rule" in command for command in run)


def test_a_command_is_waited_for_when_it_is_told_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SIGTERM is passed on; Ctrl-C, which reaches all of a terminal's processes, is not."""
    child = tmp_path / "child.py"
    child.write_text(
        "import os, pathlib, signal, sys\n"
        "def stop(number, frame):\n"
        "    sys.exit(10 + number)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    os.kill(os.getppid(), number)\n"
        "signal.pause()\n"
    )
    popen = subprocess.Popen
    asked: list[list[str]] = []

    def started(command: list[str]) -> subprocess.Popen[bytes]:
        asked.append(command)
        return popen([sys.executable, str(child)])

    monkeypatch.setattr(subprocess, "Popen", started)
    handler = signal.getsignal(signal.SIGINT)
    assert trial.run_apart("spiffy-bench", "--out", "x") == (10 + signal.SIGTERM, True)
    assert asked == [[sys.executable, "-P", "-m", "spiffy.cli.bench", "--out", "x"]]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_command_is_told_to_stop_that_was_only_being_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    popen = subprocess.Popen

    def started(_: object) -> subprocess.Popen[bytes]:
        os.kill(os.getpid(), signal.SIGTERM)
        return popen([sys.executable, "-c", "import time; time.sleep(60)"])

    monkeypatch.setattr(subprocess, "Popen", started)
    assert trial.run_apart("spiffy-bench") == (-signal.SIGTERM, True)


@pytest.mark.parametrize("command", ["spiffy-calibrate", "spiffy-bench"])
def test_its_commands_are_there(command: str) -> None:
    assert trial.run_apart(command, "--version") == (0, False)


@pytest.mark.parametrize(
    ("code", "told", "ends", "problem"),
    [
        (-signal.SIGKILL, False, 2, "spiffy-calibrate was ended by SIGKILL, which nothing here"),
        (-signal.SIGSEGV, False, 2, "spiffy-calibrate was ended by SIGSEGV"),
        (-signal.SIGTERM, True, 130, "interrupted: the same command goes on"),
        (0, True, 130, "interrupted: the same command goes on"),  # it had just ended
    ],
)
def test_a_command_that_is_ended_by_a_signal_is_told_apart_from_one_that_fails(
    code: int,
    told: bool,
    ends: int,
    problem: str,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run: list[object] = []
    monkeypatch.setattr(trial, "run_apart", lambda *words: run.append(words) or (code, told))
    assert call("trial", "--model", "tiny-sdar", "--out", tmp_path)[::2][0] == ends
    said = call("trial", "--model", "tiny-sdar", "--policies", "static", "--out", tmp_path)[2]
    assert problem in said
    assert (tmp_path / "static" / "calibrated").exists() == (code == 0)
    assert len(run) == 2


@pytest.mark.parametrize("name", ["llada2.1-mini", "some/LLaDA2.1-flash-tuned"])
def test_llada2_1_is_served_with_edits(name: str) -> None:
    assert trial.served_with("llada2", name)[1] == "joint"
    assert trial.served_with("llada2", "llada2-mini")[1] == "threshold"


@pytest.mark.parametrize(
    ("folder", "policy"),
    [("LLaDA2.1-mini", "joint"), ("llada2.1-and-others/LLaDA2.0-mini", "threshold")],
)
def test_a_folder_goes_by_its_own_name(
    folder: str, policy: str, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether or not one is in it, and whatever it is under."""
    shutil.copytree(ALIASES["tiny-llada2"], tmp_path / folder)
    run: list[tuple[str, ...]] = []
    monkeypatch.setattr(trial, "run_apart", lambda *words: run.append(words) or (130, False))
    asked = ("--policies", "served", "--dataset", "synthetic", "--out", tmp_path / "out")
    for place in (".", tmp_path / folder):
        monkeypatch.chdir(tmp_path / folder)
        assert call("trial", "--model", place, *asked)[0] == 130
        assert run[-1][run[-1].index("--policy") + 1] == policy


@pytest.mark.parametrize(
    ("folder", "link"), [("LLaDA2.1-mini", "mine"), ("checkpoint-0412", "LLaDA2.1-mini")]
)
def test_a_link_to_a_folder_may_have_its_name(
    folder: str, link: str, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(ALIASES["tiny-llada2"], tmp_path / folder)
    (tmp_path / link).symlink_to(folder)
    run: list[tuple[str, ...]] = []
    monkeypatch.setattr(trial, "run_apart", lambda *words: run.append(words) or (130, False))
    asked = ("--policies", "served", "--dataset", "synthetic", "--out", tmp_path / "out")
    assert call("trial", "--model", tmp_path / link, *asked)[0] == 130
    assert run[-1][run[-1].index("--policy") + 1] == "joint"


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (("--policies", "served,fast"), "'fast' is not served, static or module:object"),
        (("--policies", "served,no_such_module:rule"), "no_such_module cannot be imported"),
        (("--budgets", "4,x"), "--budgets 4,x: give numbers of drafts"),
        (("--cache", "disk"), "--cache disk"),
        (("--gen-length", "0"), "--gen-length 0"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_loaded(
    wrong: tuple[str, str], problem: str, call: Call, tmp_path: Path
) -> None:
    code, _, said = call("trial", "--model", "tiny-sdar", *wrong, "--out", tmp_path / "new")
    assert code == 2
    assert problem in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "new").exists()
