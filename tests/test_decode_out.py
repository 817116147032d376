"""`spiffy-decode --out`: one process or several, killed or not, every answer once and in order."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Call, chain_graph, fail_while_decoding, shown, study

from spiffy.calib.answers import Answers
from spiffy.cli import decode
from spiffy.runtime import generate, load_model
from spiffy.runtime.decode import Task, driver
from spiffy.schemas import DraftGraph, SpiffyError

PROMPTS = [f"Tom has {k} apples. He buys 4 more. How many now?" for k in range(1, 6)]
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def graph() -> DraftGraph:
    return chain_graph("tiny-sdar", gen_length=16)


@pytest.fixture
def arguments(graph: DraftGraph, tmp_path: Path) -> list[str]:
    """A command without its --out: two drafts, so that counts are the same on every machine."""
    graph.save(tmp_path / "graph.json")
    lines = [*(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)]
    lines.insert(3, json.dumps({"prompt": "long " * 5000}) + "\n")  # number 3 is left out
    (tmp_path / "p.jsonl").write_text("".join(lines))
    files = ["--graph", str(tmp_path / "graph.json"), "--prompts", str(tmp_path / "p.jsonl")]
    return [*files, "--budget", "2", "--device", "cpu"]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process."""

    call = Call(capfd, monkeypatch)
    return lambda *words: call("decode", *words)[::2]


@pytest.fixture(scope="module")
def expected(graph: DraftGraph) -> list[dict[str, Any]]:
    """What the lines are to be, by `generate`."""
    model, lines = load_model("tiny-sdar", device="cpu"), []
    for index, prompt in zip((0, 1, 2, 4, 5), PROMPTS, strict=True):
        out = generate(model, prompt, graph=graph, budget=2)
        counts = ("nfe", "positions_computed", "steps", "accepted")
        line = {"index": index, "text": out.text, "token_ids": out.token_ids}
        lines.append(line | {name: getattr(out.stats, name) for name in counts})
    assert sum(line["accepted"] for line in lines) > 0
    return lines


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of a file without their times."""
    text = out.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def child(words: list[str], log: Path, **variables: str) -> int:
    """Run the command in a process of its own that has imported everything; its id."""
    forked = os.fork()
    if forked == 0:
        os.environ |= variables
        sys.argv = ["spiffy-decode", *words]
        code = 99
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                decode.console.file, decode.log.file = sys.stdout, sys.stderr
                decode.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    return forked


def ended(forked: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1])


@pytest.mark.parametrize("together", [1, 3])
def test_answers_are_those_of_generate_in_order(
    run: Run, arguments: list[str], expected: list[dict[str, Any]], tmp_path: Path, together: int
) -> None:
    out = tmp_path / "answers.jsonl"
    code, log = run(*arguments, "--out", out, "--batch-size", together)
    assert code == 0, log
    assert read(out) == expected
    tokens, nfe = sum(len(a["token_ids"]) for a in expected), sum(a["nfe"] for a in expected)
    assert f"wrote 5 answers to {out}: {tokens} tokens, {nfe} forwards" in log
    assert "prompt 3 left out" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl",
        "graph.json",
        "p.jsonl",
    ]
    before = out.read_bytes()
    code, log = run(*arguments, "--out", out)
    assert (code, log) == (2, f"error: {out}: is there already: remove it, or give another --out\n")
    assert out.read_bytes() == before


@pytest.mark.parametrize("together", [1, 3])
def test_an_answer_that_fails_is_named_and_left_out(
    run: Run,
    arguments: list[str],
    expected: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    together: int,
) -> None:
    out, model = tmp_path / "answers.jsonl", load_model("tiny-sdar", device="cpu")
    fail_while_decoding(monkeypatch, model, PROMPTS[1], SpiffyError("computed NaN"))
    code, log = run(*arguments, "--out", out, "--batch-size", together)
    assert (code, "prompt 1 left out: computed NaN" in log) == (0, True), log
    assert "wrote 4 answers" in log
    assert read(out) == [line for line in expected if line["index"] != 1]
    code, log = run(*arguments, "--json", "--batch-size", together)
    assert (code, "prompt 1 left out: computed NaN" in log) == (0, True), log


@pytest.mark.parametrize("steps", [1, 15])
def test_a_stream_goes_on_after_an_answer_that_fails(
    arguments: list[str],
    expected: list[dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    """After what came of that one: nothing, or all blocks but the last."""
    model = load_model("tiny-sdar", device="cpu")
    fail_while_decoding(monkeypatch, model, PROMPTS[1], SpiffyError("computed NaN"), steps)
    code, printed, log = Call(capfd, monkeypatch)("decode", *arguments, "--stream")
    assert (code, "prompt 1 left out: computed NaN" in log) == (0, True), log
    first, *lines = printed.splitlines()
    if steps > 1:
        part = lines.pop(0)
        assert part
        assert expected[1]["text"].startswith(part)
        assert part != expected[1]["text"]
    assert [first, *lines] == [line["text"] for line in expected if line["index"] != 1]


@pytest.mark.parametrize("many", [20, 4])
def test_where_memory_is_short_for_all_it_ends_and_tries_them_again(
    run: Run, graph: DraftGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """Somebody else has it, say. Number 1 alone would not fit in any case."""
    graph.save(tmp_path / "graph.json")
    texts = [f"Add {k} and 4{' and 5' * 9 * (k == 1)}." for k in range(many)]
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    files = ["--graph", str(tmp_path / "graph.json"), "--prompts", str(tmp_path / "p.jsonl")]
    out = tmp_path / "answers.jsonl"
    asked = (*files, "--budget", 2, "--device", "cpu", "--gen-length", 8, "--out", out)
    model, forward, denoise, begun = load_model("tiny-sdar"), driver.forward, driver.denoise, 0
    lengths = [len(model.encode([{"role": "user", "content": text}])) for text in texts]
    room = max(length for k, length in enumerate(lengths) if k != 1) + 15
    assert lengths[1] + 8 > room

    def counted(task: Task, kv: Any = None) -> Any:
        nonlocal begun
        begun += 1
        return denoise(task, kv)

    def limited(model: Any, rows: Any, lengths: Any) -> Any:
        if max(lengths) > (room if begun <= 3 else 0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, rows, lengths)

    monkeypatch.setattr(driver, "denoise", counted)
    monkeypatch.setattr(driver, "forward", limited)
    code, log = run(*asked)
    assert (code, "not even the shortest prompt fits into memory now" in log) == (2, True), log
    assert not out.exists()
    monkeypatch.setattr(driver, "denoise", denoise)
    begun = 0
    code, log = run(*asked)
    assert (code, "2 of " in log, "prompt 1 left out: " in log) == (0, True, True), log
    assert [line["index"] for line in read(out)] == [0, *range(2, many)]


def test_where_all_answers_fail_there_is_no_file(
    run: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "answers.jsonl", load_model("tiny-sdar", device="cpu")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPTS[1]}) + "\n")
    fail_while_decoding(monkeypatch, model, PROMPTS[1], SpiffyError("computed NaN"))
    code, log = run(*arguments, "--out", out)
    assert (code, log.splitlines()[-1]) == (
        2,
        "error: none of the 1 prompts could be decoded; the first: computed NaN",
    )
    assert not out.exists()
    assert not (tmp_path / "answers.jsonl.parts").exists()  # nothing to go on with


def test_the_command_of_the_readme_runs(
    run: Run, graph: DraftGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    graph.save("llada.json")
    Path("questions.jsonl").write_text(json.dumps({"question": PROMPTS[0]}) + "\n")
    words = shlex.split(shown("README.md", "torchrun"))
    module = words.index("-m")
    assert words[module + 1] == decode.__name__
    code, log = run(*words[module + 2 :])
    assert code == 0, log
    answer = generate(load_model("tiny-sdar", device="cpu"), PROMPTS[0], gen_length=16)
    assert [line["text"] for line in read(Path("answers.jsonl"))] == [answer.text]


@pytest.mark.parametrize("operation", [7, 14])
def test_killed_at_any_moment_it_goes_on(
    run: Run,
    arguments: list[str],
    expected: list[dict[str, Any]],
    tmp_path: Path,
    operation: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of a record, and before the last rename."""
    out, log = tmp_path / "answers.jsonl", tmp_path / "log"
    die, main = study("kill").die_in_operation, decode.main
    monkeypatch.setattr(decode, "main", lambda: (die(operation), main()))
    assert ended(child([*arguments, "--out", str(out)], log)) == -signal.SIGKILL, log.read_text()
    monkeypatch.undo()
    assert not out.exists()
    # 1, 2: the manifest is synced and renamed; 3, 4, 5, ...: an answer is written, synced; 13, 14:
    # the file is synced and renamed.
    kept = min((operation - 2) // 2, 5)
    decoded: list[int] = []
    append = Answers.append
    monkeypatch.setattr(
        Answers, "append", lambda self, line: (decoded.append(line["index"]), append(self, line))
    )
    code, text = run(*arguments, "--out", out)
    assert code == 0, text
    assert decoded == [0, 1, 2, 4, 5][kept:]
    assert ("dropped an unfinished record" in text) == (operation == 7)
    assert (f"{kept} of 5 answers are there" in text) == (kept > 0)
    assert read(out) == expected
    assert not (tmp_path / "answers.jsonl.parts").exists()


def two_ranks(arguments: list[str], out: Path, folder: Path) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    words = [*arguments, "--out", str(out)]
    return [
        child(words, folder / f"log-{k}", RANK=str(k), LOCAL_RANK=str(k), **where) for k in range(2)
    ]


def test_two_ranks_write_one_file_and_one_of_them_may_die(
    run: Run,
    arguments: list[str],
    expected: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "answers.jsonl"
    codes = [ended(rank) for rank in two_ranks(arguments, out, tmp_path)]
    logs = [(tmp_path / f"log-{k}").read_text() for k in range(2)]
    assert codes == [0, 0], logs
    assert read(out) == expected
    assert "wrote 5 answers" in logs[0]
    assert logs[1] == ""  # only rank 0 talks

    other, append = tmp_path / "other.jsonl", Answers.append

    def dying(self: Answers, line: dict[str, Any]) -> None:
        if line["index"] == 4:  # the fourth of five: the second rank's second
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, line)

    monkeypatch.setattr(Answers, "append", dying)
    codes = [ended(rank) for rank in two_ranks(arguments, other, tmp_path)]
    monkeypatch.undo()
    assert codes == [2, -signal.SIGKILL]
    assert "has ended; what is recorded is safe" in (tmp_path / "log-0").read_text()
    assert not other.exists()
    code, log = run(*arguments, "--out", other)  # one process goes on with what two have begun
    assert code == 0
    assert "4 of 5 answers are there" in log
    assert read(other) == expected


def test_ctrl_c_keeps_the_answer_in_hand(
    run: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, append = tmp_path / "answers.jsonl", Answers.append

    def interrupted(self: Answers, line: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        append(self, line)

    monkeypatch.setattr(Answers, "append", interrupted)
    code, log = run(*arguments, "--out", out)
    assert code == 130
    assert f"the same command goes on from {out}" in log
    monkeypatch.undo()
    code, log = run(*arguments, "--out", out)
    assert (code, "1 of 5 answers are there" in log) == (0, True)


def test_ctrl_c_keeps_all_answers_that_share_forwards(
    run: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, append, asked = tmp_path / "answers.jsonl", Answers.append, []

    def interrupted(self: Answers, line: dict[str, Any]) -> None:
        if not asked:  # a second time would stop at once
            asked.append(line)
            os.kill(os.getpid(), signal.SIGINT)
        append(self, line)

    monkeypatch.setattr(Answers, "append", interrupted)
    assert run(*arguments, "--out", out, "--batch-size", "3")[0] == 130
    monkeypatch.undo()
    code, log = run(*arguments, "--out", out)
    assert (code, "3 of 5 answers are there" in log) == (0, True)


def test_another_input_or_setting_is_refused_and_what_is_there_stays(
    run: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lines = tmp_path / "answers.jsonl", []

    def full(self: Answers, line: object) -> None:
        if lines:
            raise SpiffyError("no room")
        lines.append(line)
        append(self, line)  # type: ignore[arg-type]

    append = Answers.append
    monkeypatch.setattr(Answers, "append", full)
    assert run(*arguments, "--out", out)[0] == 2
    monkeypatch.undo()
    folder = tmp_path / "answers.jsonl.parts"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    prompts = tmp_path / "p.jsonl"
    for words, difference in (
        (("--stop", "x"), "stop [], not ['x']"),
        (("--gen-length", "20"), "decoding.gen_length 16, not 20"),
        (("--seed", "1"), "seed 0, not 1"),
        (("--edges", "none"), "edges.complete True, not False"),
        (("--samples", "3"), "prompts, not 3 (--prompts, --samples)"),
    ):
        code, log = run(*arguments, *words, "--out", out)
        assert (code, log.count("error: ")) == (2, 1)
        assert f"{folder}: recorded with " in log
        assert difference in log
    budget = [word if word != "2" else "3" for word in arguments]
    assert "drafts 2, not 3" in run(*budget, "--out", out)[1]
    prompts.write_text(prompts.read_text().replace("buys 4", "buys 5"))
    assert "other prompts (--prompts, --field" in run(*arguments, "--out", out)[1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not out.exists()


def test_what_does_not_go_with_out_is_refused(
    run: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.jsonl"
    model = ("--model", "tiny-sdar")
    for words, message in (
        ((*arguments, "--out", out, "--json"), "drop --json"),
        ((*arguments, "--out", out, "--verify"), "--verify"),
        ((*model, "--prompt", "x", "--out", out), "give --prompts"),
        ((*arguments, "--out", tmp_path), "is a directory"),
        ((*arguments, "--out", tmp_path / "none" / "a.jsonl"), "does not exist"),
    ):
        code, log = run(*words)
        assert (code, len(log.strip().splitlines())) == (2, 1)
        assert message in log
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, log = run(*arguments)
    assert (code, log) == (2, "error: several ranks: give --out, which they share\n")
    assert not out.exists()
