"""What the commands refuse or say so that hours of work are not lost, or watched in silence."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Call, chain_graph, refusal
from rich.console import Console

from spiffy.bench.measure import Measurements
from spiffy.calib.signals import until_interrupted
from spiffy.cli import bench, bench_run, calibrate, calibration_runs, common, lm_eval
from spiffy.cli.options import Unseeded
from spiffy.runtime import generate, load_model
from spiffy.runtime.budget import predict
from spiffy.schemas import DraftGraph, Node, SpiffyError
from spiffy.schemas.io import check_writable


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "graph.json"
    chain_graph("tiny-sdar").save(path)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Names and revisions of the models that are asked for; none is loaded."""
    found: list[tuple[str, str | None]] = []

    def load(name: str, *, revision: str | None, **_: object) -> None:
        found.append((name, revision))
        raise SpiffyError("not loaded")

    monkeypatch.setattr("spiffy.runtime.load_model", load)
    return found


def least(command: str, graph: Path, folder: Path) -> tuple[object, ...]:
    """What a command needs, besides a model."""
    needed: dict[str, tuple[object, ...]] = {
        "calibrate": ("--out", folder / "new.json"),
        "decode": ("--graph", graph, "--prompt", "a"),
        "bench": ("--graph", graph, "--out", folder / "run"),
        "serve": ("--graph", graph, "--port", 0),
    }
    return needed[command]


@pytest.mark.parametrize("command", [("export", "--format", "json"), ("card",)])
def test_a_graph_is_not_replaced_by_what_is_made_of_it(
    command: tuple[str, ...],
    graph: Path,
    call: Call,
) -> None:
    before = graph.read_bytes()
    same = graph.parent / "." / "x" / ".." / graph.name
    (graph.parent / "x").mkdir()
    code, _, log = call("graph", *command, graph, "--out", same)
    assert code == 2
    assert "that is the graph itself" in log
    assert graph.read_bytes() == before


def test_a_graph_that_will_be_replaced_is_named(
    graph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate._Output(out=graph).path_for("tiny-sdar", writes=True) == graph
    assert "is there already, and will be replaced" in capsys.readouterr().err
    other = graph.parent / "other.json"
    assert calibrate._Output(out=other).path_for("tiny-sdar", writes=True) == other
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_names_the_graph_that_will_be_replaced(
    rank: int, graph: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    work = ("--workdir", graph.parent / "work", "--dataset", graph.parent / "none.jsonl")
    code, _, log = call("calibrate", "--model", "tiny-sdar", "--out", graph, *work)
    assert code == 2
    assert "no such file" in log
    assert ("is there already, and will be replaced" in log) == (rank == 0)


def test_nothing_is_written_over_a_work_directory(graph: Path, call: Call, tmp_path: Path) -> None:
    work = tmp_path / "work"
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "one"}\n')
    run = ("--model", "tiny-sdar", "--gen-length", 8, "--workdir", work)
    shard = (*run, "--shard", "0/2", "--batch-size", 1, "--dataset", data)
    code, _, log = call("calibrate", *shard)
    assert code == 0
    assert f"{data.name} holds 3 prompts, fewer than --samples 50: all are taken" in log
    assert "1 of 3 prompts repeat another one, and are not decoded again" in log
    assert "cannot be decoded" not in log
    assert call("calibrate", *shard, "--shard", "1/2")[0] == 0
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    for name in before:
        for command in (("merge", work), (*run, "--dataset", data)):
            code, _, log = call("calibrate", *command, "--out", work / name)
            assert code == 2
            assert f"{work / name}: belongs to a work directory" in log
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
    code, _, log = call("calibrate", "merge", work, "--out", graph)
    assert code == 0
    assert f"{graph} is there already, and will be replaced" in log


def test_much_memory_is_named_before_it_is_taken(
    graph: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("--model", "tiny-sdar", "--gen-length", 8, "--samples", 2, "--out", graph)
    monkeypatch.setattr(calibrate, "predict", lambda *_: None)
    monkeypatch.setattr(predict, "auto_profile", lambda *_: None)
    assert "of memory" not in call("calibrate", *run)[2]
    monkeypatch.setattr(calibration_runs, "_MUCH", 8 * 8 * 8)
    code, _, log = call("calibrate", *run)
    assert code == 0
    assert "the states of 2 prompts take up to" in log
    assert "of memory: with --workdir DIR they lie on disk" in log
    work = ("--workdir", graph.parent / "work")
    assert "of memory" not in call("calibrate", *run, *work)[2]


def test_a_node_is_shown_however_deep_it_lies(graph: Path, call: Call) -> None:
    shallow = DraftGraph.load(graph)
    fills = [tuple((rank, 0) for rank in range(n + 1)) for n in range(300)]
    nodes = [Node(fill=fill, parents=(n,), count=1) for n, fill in enumerate(fills)]
    side = Node(fill=((0, 1),), parents=(0,), count=1)
    deep = shallow.model_copy(update={"nodes": (*nodes, side), "expected_steps": ()})
    deep.save(graph)
    code, printed, _ = call("graph", "show", graph)
    lines = printed.splitlines()
    start = lines.index("root")
    assert code == 0
    assert [line.lstrip("│├└─ ").split(":")[0] for line in lines[start + 1 : start + 302]] == [
        str(number) for number in range(1, 302)
    ]
    assert lines[start + 1].startswith("├── 1: +0.0")
    assert lines[start + 2].startswith("│   └── 2: +1.0")
    assert lines[start + 3].startswith("│       └── 3: +2.0")
    assert lines[start + 301].startswith("└── 301: +0.1")


def test_a_link_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """As root, /dev/stdout would be."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    check_writable(tmp_path / "file")
    with pytest.raises(SpiffyError, match="a link, and would be replaced"):
        check_writable(tmp_path / "link")


def test_progress_is_told_now_and_then_where_no_bar_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, now = io.StringIO(), [0.0]
    monkeypatch.setattr(common, "log", Console(file=written, width=100))
    bar = common.progress_bar()
    bar.get_time = lambda: now[0]
    line = bar.add_task("prompts", total=10)
    for done in range(1, 6):
        now[0] = 25.0 * done
        bar.update(line, completed=done)
    now[0] = 200.0
    bar.advance(line)
    told = written.getvalue().splitlines()
    assert told == [
        "prompts 3/10 after 0:01:15, 0:02:55 left",
        "prompts 6/10 after 0:03:20, 0:02:13 left",
    ]
    terminal = io.StringIO()
    monkeypatch.setattr(common, "log", Console(file=terminal, force_terminal=True))
    bar = common.progress_bar()
    bar.update(bar.add_task("prompts", total=10), completed=3)
    assert "after" not in terminal.getvalue()


def test_answers_of_another_model_are_not_compared_after_all_is_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'spiffy-dllm[lm-eval]'")
    monkeypatch.setattr(
        sys,
        "argv",
        ["spiffy-lm-eval", "--model", "hf", "--tasks", "gsm8k", "--verify-share", "0.1"],
    )
    monkeypatch.setattr(
        "spiffy.integrations.lm_eval.run_harness", lambda: pytest.fail("it evaluates first")
    )
    with pytest.raises(SpiffyError, match="give that"):
        lm_eval._evaluate()


@pytest.mark.parametrize("command", ["calibrate", "decode", "bench", "serve"])
def test_every_command_that_loads_a_model_takes_a_revision(
    command: str,
    graph: Path,
    asked: list[tuple[str, str | None]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for given in ((), ("--revision", "v2")):
        words = ("--model", "org/model", *least(command, graph, tmp_path), *given)
        monkeypatch.setattr(sys, "argv", [f"spiffy-{command}", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            import_module(f"spiffy.cli.{command}").main()
        assert stop.value.code == 2
        assert "not loaded" in capsys.readouterr().err
    assert asked == [("org/model", None), ("org/model", "v2")]


def test_a_revision_is_of_the_graphs_model_if_no_other_is_named(
    graph: Path, call: Call, asked: list[tuple[str, str | None]]
) -> None:
    found = DraftGraph.load(graph)
    model = found.model.model_copy(update={"id": "org/model", "revision": "c" * 40})
    found.model_copy(update={"model": model}).save(graph)
    call("decode", "--graph", graph, "--prompt", "a")
    call("decode", "--graph", graph, "--prompt", "a", "--revision", "v2")
    assert asked == [("org/model", "c" * 40), ("org/model", "v2")]


@pytest.mark.parametrize(
    ("of_graph", "asked", "told"),
    [("gsm8k", "synthetic", True), ("synthetic", "synthetic", False), ("gsm8k", "mine", False)],
)
def test_prompts_of_another_kind_than_the_graphs_are_named(
    of_graph: str, asked: str, told: bool, graph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = DraftGraph.load(graph)
    record = found.calibration.model_copy(update={"dataset": of_graph})
    bench._Prompts(dataset=asked).note_toys(found.model_copy(update={"calibration": record}))
    log = " ".join(capsys.readouterr().err.split())
    assert log.startswith("the prompts are generated word problems") == told
    assert ("calibrated on gsm8k: give --dataset" in log) == told


@pytest.mark.parametrize(
    ("drafter", "graph", "why"),
    [
        (lambda *_: None, False, "drafter of type function has no token_ranks and asks_rejected"),
        (SimpleNamespace(token_ranks=1, asks_rejected=False), False, "has no __call__"),
        (lambda *_: None, True, "give a graph or a drafter of your own, not both"),
    ],
)
def test_what_is_no_drafter_is_refused(drafter: Any, graph: bool, why: str) -> None:
    model = load_model("tiny-sdar", device="cpu")
    with pytest.raises(SpiffyError, match=why):
        generate(model, "a", drafter=drafter, graph=chain_graph("tiny-sdar") if graph else None)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("--policy", "foo"), "--policy foo: choose static, threshold, sequential, "),
        (("--cache", "prefx"), "--cache prefx: choose none, prefix, prefix-shared, dual or block"),
        (("--threshold", "1.5"), "--threshold 1.5: must be less than or equal to 1"),
        (("--top-p", "0"), "--top-p 0.0: must be greater than 0"),
        (("--top-p", "1.5"), "--top-p 1.5: must be less than or equal to 1"),
        (("--top-k", "0"), "--top-k 0: must be greater than or equal to 1"),
        (("--top-k", "5", "--temperature", "0"), "--top-k 5 filters what is drawn: give a --temp"),
        (("--gen-length", "0"), "--gen-length 0: must be greater than or equal to 1"),
        (("--edges", "foo"), "foo"),
    ],
)
@pytest.mark.parametrize("command", ["calibrate", "decode", "bench", "serve"])
def test_what_no_model_can_make_right_is_refused_before_one_is_loaded(
    command: str,
    given: tuple[str, ...],
    why: str,
    graph: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("spiffy.runtime.load_model", load)
    if command == "calibrate":
        given = ("--model", "tiny-sdar", *given)
    words = (*least(command, graph, tmp_path), *given)
    monkeypatch.setattr(sys, "argv", [f"spiffy-{command}", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        import_module(f"spiffy.cli.{command}").main()
    assert stop.value.code == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_what_takes_long_is_named_where_no_terminal_shows_a_spinner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(common, "log", Console(file=io.StringIO(), width=80))
    written = common.log.file
    assert isinstance(written, io.StringIO)
    with common.doing("loading"):
        pass
    assert written.getvalue() == ""
    monkeypatch.setattr(common, "_LONG_SECONDS", 0.0)
    with common.doing("loading") as status:
        while "loading ..." not in written.getvalue():
            time.sleep(0.001)
        status.update("compiling")
        while "compiling ..." not in written.getvalue():
            time.sleep(0.001)


def test_help_breaks_no_line_within_a_paragraph() -> None:
    text = "One line,\nbroken.\n\nAnother one,\n    further in."
    assert common.paragraphs(text) == "One line, broken.\n\nAnother one, further in."


def test_no_prompt_at_all_is_not_called_an_empty_one(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    code, _, log = call("decode", "--model", "tiny-sdar")
    assert (code, "no prompt: give --prompt TEXT" in log) == (2, True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--model", "tiny-lada"), "did you mean tiny-llada or tiny-llada2"),
        (("--model", "tiny-llada", "--revision", "v2"), "tiny-llada ships with the package"),
    ],
)
def test_a_name_that_is_nearly_one_and_a_revision_of_what_has_none(
    options: tuple[str, ...], why: str, call: Call
) -> None:
    code, _, log = call("decode", *options, "--prompt", "a")
    assert (code, why in log) == (2, True)


def test_a_graph_of_another_family_is_refused_with_any_model_too(graph: Path, call: Call) -> None:
    found = ("--graph", graph, "--model", "tiny-llada", "--prompt", "a")
    for given, why in (((), "calibrate one for this model"), (("--any-model",), "same family")):
        code, _, log = call("decode", *found, *given)
        assert (code, why in log, "--any-model" in log) == (2, True, bool(given))


def test_sigterm_ends_a_command_as_ctrl_c_does() -> None:
    """Else the time limit of a scheduler would leave nothing of hours."""
    done: list[str] = []

    def app() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)  # to all of its group, as `timeout` does
            time.sleep(0.01)
            done.append("summed up")
            raise

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another library may have its own
    try:
        with pytest.raises(SystemExit) as stop:
            common.run_app(app)
        after = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (stop.value.code, done) == (common.INTERRUPTED, ["summed up"])
    assert after is signal.SIG_DFL


def test_sigterm_sent_again_after_what_was_in_hand_ended_is_no_other_request() -> None:
    done: list[str] = []

    def app() -> None:
        with until_interrupted(done.append) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done.append("closed")
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop:
            common.run_app(app)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (stop.value.code, done[1:]) == (common.INTERRUPTED, ["closed"])


def test_want_of_memory_is_told_in_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    def app() -> None:
        raise MemoryError("a forward without drafts does not fit")

    with pytest.raises(SystemExit) as stop:
        common.run_app(app)
    told = capsys.readouterr().err
    assert (stop.value.code, "a forward without drafts does not fit; take" in told) == (2, True)
    assert "--budget" not in told


def test_an_earlier_benchmark_is_named_and_several_ranks_are_refused(
    graph: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bench.json").touch()
    words = (*least("bench", graph, tmp_path), "--dataset", tmp_path / "none.jsonl")
    code, _, log = call("bench", *words)
    assert (code, "holds a benchmark already, which will be replaced" in log) == (2, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, _, log = call("bench", *words)
    assert (code, "measure with one process" in log) == (2, True)


def test_a_shard_and_a_plain_decode_refuse_what_they_would_not_read(
    call: Call, tmp_path: Path
) -> None:
    shard = ("--model", "tiny-sdar", "--workdir", tmp_path / "work", "--shard", "0/2")
    for option in (("--report", tmp_path / "a.html"), ("--profile",), ("--predict-for", "x")):
        code, _, log = call("calibrate", *shard, *option)
        assert (code, f"--shard: {option[0]} is about an artifact" in log) == (2, True)
    code, _, log = call("decode", "--model", "tiny-sdar", "--any-model", "--prompt", "a")
    assert (code, "--any-model takes a graph of another model" in log) == (2, True)


def test_a_top_p_of_1_filters_nothing_and_goes_with_any_temperature() -> None:
    Unseeded(temperature=0.0, top_p=1.0).check()
    assert "--top-p 0.9 filters" in refusal(Unseeded(temperature=0.0, top_p=0.9).check)


def test_rows_are_on_disk_as_they_come(tmp_path: Path) -> None:
    """What is killed cannot write them at its end."""
    path = tmp_path / "rows.jsonl.part"
    path.write_text("of an earlier run\n", encoding="utf-8")
    parts = [Measurements((), {}, None)] * 2
    rows_of = iter(['{"prompt": 0}\n', '{"prompt": 1}\n'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_run, "_lines", lambda _: next(rows_of))
        for number, _ in enumerate(bench_run._kept(parts, path)):
            assert path.read_text("utf-8").count("prompt") == number + 1
    assert "earlier" not in path.read_text("utf-8")


def test_rows_are_kept_if_summing_up_fails(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise SpiffyError("the summary failed")

    monkeypatch.setattr(bench, "summed_up", fails)
    words = ("--graph", graph, "--out", tmp_path / "run", "--samples", 1, "--repeats", 1)
    words += ("--methods", "graph", "--budgets", 1, "--warm-up", 0, "--gen-length", 16)
    monkeypatch.setattr(bench, "profile_of", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["spiffy-bench", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    assert "the summary failed" in capsys.readouterr().err
    assert len((tmp_path / "run" / "rows.jsonl").read_text("utf-8").splitlines()) == 2
    assert not (tmp_path / "run" / "rows.jsonl.part").exists()
