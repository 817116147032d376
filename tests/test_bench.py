"""Methods side by side: bounds, counts, scores, and what a run refuses."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from helpers import decode as decode_with
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import spiffy.bench.measure as bench_measure
from spiffy.bench import watch
from spiffy.bench.compare import compare
from spiffy.bench.measure import Measurements, Row, measure, results, speedup, walkthrough
from spiffy.bench.methods import KINDS, Method, PerfectDrafter, methods, to_step_through
from spiffy.bench.score import passes, program, same_number, score, stated_answer
from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import problems
from spiffy.cli.bench import _Prompts, app
from spiffy.runtime import ALIASES, DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import Task
from spiffy.runtime.draft import confidence_chain
from spiffy.runtime.generate import Output
from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.bench import Bench, Result

PROMPTS = 2


@cache
def sdar() -> DiffusionLM:
    return load_model("tiny-sdar", device="cpu", dtype="float32")


@cache
def graph(objective: str = "expected-steps") -> DraftGraph:
    model = sdar()
    settings = decoding_settings(model, gen_length=32)
    prompts = load_prompts("synthetic", 10)
    traces = record(model, prepare(model, prompts, settings))
    return build_graph(model, prompts, settings, traces, 8, objective=objective)  # type: ignore[arg-type]


@cache
def run() -> tuple[list[Method], Measurements, tuple[Result, ...]]:
    model, artifact = sdar(), graph()
    settings = decoding_settings(model, artifact)
    unseen = list(islice(problems("test"), PROMPTS))
    texts = [problem.question for problem in unseen]
    kinds = [kind for kind in KINDS if kind != "auto"]
    found = methods(model, settings, artifact, kinds, [1, 4], graph("paper"), texts)
    records = [{"answer": problem.answer} for problem in unseen]
    measured = measure(model, found, texts, records, repeats=2, warm_up=0)
    return found, measured, results(found, measured)


def named(name: str) -> Result:
    return next(result for result in run()[2] if result.name == name)


def test_every_method_is_there_once_and_plain_comes_first() -> None:
    found, _, _ = run()
    names = [method.name for method in found]
    assert names[:3] == ["plain static", "plain threshold", "plain static, no edges"]
    expected = [
        f"{kind} {n}"
        for kind in ("freedave", "chain", "paper", "pruned", "graph", "model", "perfect")
        for n in (1, 4)
    ]
    assert names[3:] == expected


def test_freedave_is_held_against_plain_decoding_with_its_own_edges() -> None:
    """Ours folds stores into other forwards: drafts that come true would seem to cost forwards."""
    own, drafted = named("plain static, no edges"), named("freedave 4")
    assert (own.compared, own.differing, own.drafted) == (PROMPTS, 0, 0)
    assert own.nfe > named("plain static").nfe
    assert own.nfe == drafted.nfe + drafted.accepted


def test_what_is_stepped_through_drafts_whatever_the_budgets_are() -> None:
    found = run()[0]
    many = [replace(m, budget=m.budget and 16 * m.budget) for m in found]  # 16 and 64
    auto = Method("auto", "auto", found[0].settings, lambda _: None)
    for methods_, expected in (
        ([*found, auto], ("model", 4)),
        ([*many, auto], ("model", 16)),
        ([found[0], auto], ("auto", None)),
        ([found[0]], ("plain", None)),
    ):
        shown = to_step_through(methods_)
        assert (shown.kind, shown.budget) == expected


def test_methods_take_turns_prompt_by_prompt() -> None:
    found, measured, _ = run()
    n = len(found)
    turns = [measured.rows[k : k + n] for k in range(0, len(measured.rows), n)]
    assert len(turns) == 2 * PROMPTS
    for turn in turns:
        assert {row.method for row in turn} == {method.name for method in found}
        assert len({(row.prompt, row.repeat) for row in turn}) == 1
    assert len({turn[0].method for turn in turns}) > 1  # nobody is always first


def test_no_method_has_seen_a_prompt_before_its_first_counted_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain decoding used to have decoded all of them, and was the only one that was warm."""
    names = ("plain static", "graph 1", "perfect 1")
    few = [method for method in run()[0] if method.name in names]
    decoded: list[int | None] = []

    def decode(task: Task) -> list[watch.Forward]:
        decoded.append(task.sequence)
        return watch.decode(task)

    monkeypatch.setattr(bench_measure, "decode", decode)
    questions = [problem.question for problem in islice(problems("test"), 2)]
    measured = measure(sdar(), few, questions, [{}, {}], repeats=1, warm_up=1)
    assert decoded == [0] * 3 + [0] * 3 + [1] * 3
    assert not any(row.differs for row in measured.rows)
    for seed in range(20):
        order = [method.name for method in bench_measure._turns(few, str(seed))]
        assert sorted(order) == sorted(names)
        assert order.index("plain static") < order.index("perfect 1")


def test_all_drafting_gives_the_tokens_of_plain_decoding() -> None:
    for result in run()[2]:
        if result.name == "plain threshold":
            assert result.compared == 0  # other tokens are to be expected
        else:
            assert (result.compared, result.differing) == (PROMPTS, 0)


def test_counts_are_sums_over_prompts_and_not_over_repeats() -> None:
    model, artifact = sdar(), graph()
    settings = decoding_settings(model, artifact)
    nfe = sum(
        decode_with(model, model.encode(problem.question), settings).stats.nfe
        for problem in islice(problems("test"), PROMPTS)
    )
    assert named("plain static").nfe == nfe


def test_perfect_drafts_all_come_true_and_nothing_takes_fewer_forwards() -> None:
    for budget in (1, 4):
        bound = named(f"perfect {budget}")
        assert bound.accepted == bound.drafted > 0
        others = [result for result in run()[2] if result.budget == budget]
        assert bound.nfe == min(result.nfe for result in others)


def test_perfect_drafts_stay_within_the_budget_and_the_block() -> None:
    model, artifact = sdar(), graph()
    settings = decoding_settings(model, artifact)
    prompt = model.encode(next(problems("test")).question)
    plain = decode_with(model, prompt, settings)
    bound = decode_with(model, prompt, settings, PerfectDrafter(plain.path, 3))
    assert [c.ids.tolist() for c in bound.path] == [c.ids.tolist() for c in plain.path]
    assert bound.stats.drafted <= 3 * bound.stats.nfe


def test_a_chain_adds_the_next_most_confident_token() -> None:
    assert confidence_chain(3) == [[(0, 0)], [(0, 0), (1, 0)], [(0, 0), (1, 0), (2, 0)]]


@pytest.mark.parametrize("name", ["model 4", "graph 4", "perfect 4", "chain 1"])
def test_acceptance_agrees_with_what_decoding_counted(name: str) -> None:
    result = named(name)
    counted = result.acceptance
    assert sum(tally.drafted for tally in counted.by_depth) == result.drafted
    assert sum(tally.accepted for tally in counted.by_depth) == result.accepted
    assert sum(k * n for k, n in enumerate(counted.walk_lengths)) == result.accepted
    fills = sum(depth * tally.drafted for depth, tally in enumerate(counted.by_depth, start=1))
    assert sum(tally.drafted for tally in counted.by_place) == fills
    if not name.startswith("perfect"):  # its tokens may be of any rank
        assert sum(tally.drafted for tally in counted.by_rank) == fills


def test_the_parts_of_the_time_are_within_the_whole() -> None:
    for row in run()[1].rows:
        parts = row.forward_seconds + row.draft_seconds + row.verify_seconds
        assert 0 < parts <= row.seconds
        assert (row.draft_seconds > 0) == ("plain" not in row.method)


def rows_of(seconds: dict[tuple[int, int], float], method: str = "ours") -> list[Row]:
    blank = run()[1].rows[0]
    return [
        replace(blank, method=method, prompt=prompt, repeat=repeat, seconds=value)
        for (prompt, repeat), value in seconds.items()
    ]


def test_speedup_is_the_median_prompt_and_pairs_what_ran_together() -> None:
    # The machine was 10 times slower in the second repeat; that must not count.
    plain = rows_of({(0, 0): 2.0, (0, 1): 20.0, (1, 0): 3.0, (1, 1): 30.0, (2, 0): 8.0, (2, 1): 80})
    ours = rows_of({(0, 0): 1.0, (0, 1): 10.0, (1, 0): 1.0, (1, 1): 10.0, (2, 0): 1.0, (2, 1): 10})
    found = speedup(ours, plain)
    assert found.value == pytest.approx(3.0)
    assert (found.low, found.high) == (pytest.approx(2.0), pytest.approx(8.0))
    many = rows_of({(prompt, 0): 2.0 + prompt for prompt in range(6)})
    found = speedup(rows_of({(prompt, 0): 1.0 for prompt in range(6)}), many)
    assert 2.0 <= found.low < found.value < found.high <= 7.0
    even = speedup(plain, plain)
    assert (even.value, even.low, even.high) == (1.0, 1.0, 1.0)


def test_a_walkthrough_fills_in_the_answer_step_by_step() -> None:
    found, measured, _ = run()
    told = walkthrough(sdar(), found[0], next(problems("test")).question, measured)
    assert told is not None
    assert told.method == "model 4"  # the most drafts that can be looked at
    filled: dict[int, str] = {}
    hops = 0
    for turn in told.turns:
        assert len(turn.steps) == 1 + sum(draft.accepted for draft in turn.drafts)
        for step in turn.steps:
            for position, token in step:
                assert position not in filled
                filled[position] = token
        state = set(filled.items())
        for draft in turn.drafts:
            hops += draft.accepted
            for parent in draft.parents:
                assert parent == 0 or set(turn.drafts[parent - 1].fill) < set(draft.fill)
            if draft.accepted:
                assert set(draft.fill) <= state
    row = next(r for r in measured.rows if (r.method, r.prompt) == ("model 4", 0))
    assert hops == row.accepted
    assert len(told.turns) == row.nfe
    text = "".join(filled[position] for position in sorted(filled))
    assert told.text.strip()
    assert text.startswith(told.text.strip()[:20])


def test_states_of_a_decode_are_not_there_in_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decode takes at its peak is of it alone; kept is what the report steps through."""
    found, questions = run()[0], [problem.question for problem in islice(problems("test"), 2)]
    few = [method for method in found if method.name in ("plain static", "graph 4")]
    seen: list[tuple[int, weakref.ref[watch.Forward]]] = []
    left: list[set[int]] = []

    def decode(task: Task) -> list[watch.Forward]:
        left.append({number for number, forward in seen if forward() is not None})
        forwards = watch.decode(task)
        seen.extend((len(left), weakref.ref(forward)) for forward in forwards)
        return forwards

    monkeypatch.setattr(bench_measure, "decode", decode)
    measured = measure(sdar(), few, questions, [{}, {}], repeats=1, warm_up=0)
    assert len(left) == 2 * 2
    assert measured.seen is not None
    assert measured.seen.method == "graph 4"
    assert all(len(numbers) <= 1 for numbers in left)
    assert len(left[-1]) == 1


def counted(name: str, nfe: Sequence[int], budgets: Sequence[Counter[str]] = ()) -> Result:
    """A result of so many repeats, whose counts of the first prompt are these."""
    found, measured, _ = run()
    base = next(r for r in measured.rows if (r.method, r.prompt) == (found[0].name, 0))
    ours = next(r for r in measured.rows if (r.method, r.prompt) == (name, 0))
    rows = [
        replace(row, repeat=repeat, nfe=forwards, positions_computed=100 * forwards)
        for repeat, forwards in enumerate(nfe)
        for row in (base, ours)
    ]
    tallies = {
        (method, 0, repeat): watch.Tallies(Counter(), Counter(), Counter(), Counter({repeat: 1}))
        for method in (base.method, name)
        for repeat in range(len(nfe))
    }
    few = [method for method in found if method.name in (base.method, name)]
    return results(few, Measurements(tuple(rows), tallies, None))[1]


def test_counts_of_what_learns_are_of_the_repeat_in_the_middle() -> None:
    """Times are medians over repeats: counts of the first one would be of other decodes."""
    result = counted("model 4", [30, 10, 20])
    assert (result.nfe, result.positions_computed) == (20, 2000)
    assert result.acceptance.walk_lengths == (0, 0, 1)
    assert counted("graph 4", [10, 10]).acceptance.walk_lengths == (1,)
    assert counted("model 4", [20, 10]).nfe == 20  # not of that which had learned of the prompts


def test_what_auto_chose_is_a_number_of_drafts_whoever_chose_them() -> None:
    row = replace(run()[1].rows[0], budgets={"plain": 5, "graph 8": 4, "model 8": 4, "model 2": 1})
    assert bench_measure._usual_budget([row]) == 8
    assert bench_measure._usual_budget([replace(row, budgets={"graph 1": 1, "plain": 1})]) == 0
    assert bench_measure._usual_budget([replace(row, budgets={})]) == 0


def test_a_graph_that_does_not_say_what_it_was_calibrated_on_leaves_that_open() -> None:
    texts = list(load_prompts("synthetic", 10).texts)
    record = graph().calibration
    silent = graph().model_copy(
        update={"calibration": record.model_copy(update={"prompt_digests": None})}
    )
    assert _Prompts(allow_calibrated=True).known(texts, graph()) == 10
    assert _Prompts().known(texts, silent) is None


def test_accuracy_is_judged_by_the_reference() -> None:
    assert named("plain static").scored == PROMPTS
    right = Counter(row.correct for row in run()[1].rows if row.method == "plain static")
    assert named("plain static").correct * 2 == right[True]


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [
        ("So it is 3.\n#### 1,200", "1200", True),
        ("#### $18.00", "18", True),
        ("#### 17", "18", False),
        ("In the end 5 remain, so 18", "18", True),  # no marker: the last number
        ("nothing", "18", False),
        ("#### -4", "4", False),
    ],
)
def test_answers_of_gsm8k_are_compared_as_numbers(said: str, expected: str, right: bool) -> None:
    assert same_number(stated_answer(said), expected) is right
    assert score(said, {"answer": f"work\n#### {expected}"}) is right


HUMANEVAL = {
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(f):\n    assert f(2) == 4\n    assert f(0) == 0\n",
    "canonical_solution": "    return 2 * x\n",
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("    return 2 * x\n", True),
        ("```python\ndef double(x):\n    return x + x\n```\nThat doubles.", True),
        ("def double(x):\n    return x + x\n", True),
        ("```python3\ndef double(x):\n    return x + x\n```", True),
        ("```Python\ndef double(x):\n    return x + x\n```\nThat doubles.", True),
        ("It doubles:\n```py\ndef double(x):\n    return x + x", True),
        ("    return 2 * x\n```\nThat doubles.", True),
        ("def double(x):\n    return x + x\n```", True),
        ("    return x\n", False),
        ("That is easy.", False),
        ("    return 2 * x\x00", False),
    ],
)
def test_code_is_right_if_its_tests_pass(text: str, right: bool) -> None:
    assert score(text, HUMANEVAL, execute_code=True) is right


MANY = {
    "prompt": "from typing import List\n\n\ndef one():\n    return 1\n\n\n"
    'def many(x: List[int]) -> int:\n    """How many."""\n',
    "entry_point": "many",
    "test": "def check(f):\n    assert f([2, 3]) == 2 * one()\n",
}
RIGHT = "def many(x: List[int]) -> int:\n    return len(x)\n"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("    return len(x)\n", True),
        (f"```python\n{RIGHT}```", True),
        (f"Here it is.\n{RIGHT}", True),
        ("import math\n\ndef many(x):\n    return math.floor(len(x))\n", True),
        (f"```python\n{RIGHT}\nif __name__ == '__main__':\n    print(many(input()))\n```", True),
        ("```python\ndef many(x):\n    return 5\n\nimport sys\nsys.exit()\n```", False),
    ],
)
def test_code_has_what_its_prompt_brings_along(text: str, right: bool) -> None:
    assert score(text, MANY, execute_code=True) is right


def test_a_record_that_cannot_be_run_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    long = HUMANEVAL | {"test": HUMANEVAL["test"] + "\n# " + 200_000 * "x" + "\n"}
    assert score("    return 2 * x\n", long, execute_code=True) is True  # too long for an argument
    assert score("", HUMANEVAL | {"prompt": [{"role": "user"}]}, execute_code=True) is None

    def run(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr("subprocess.run", run)
    assert score("    return 2 * x\n", HUMANEVAL, execute_code=True) is None


def test_code_is_not_run_unless_that_was_asked_for() -> None:
    assert score("    return 2 * x\n", HUMANEVAL) is None


@pytest.mark.parametrize(
    "source",
    ["while True: pass", "x = bytearray(1 << 33)", "open('f', 'wb').write(bytes(1 << 22))"],
)
def test_code_that_wants_too_much_fails(source: str) -> None:
    assert passes("x = 1")
    assert not passes(source, seconds=2)


def test_code_is_completed_by_its_prompt_only_if_it_lacks_the_function() -> None:
    assert program("    return 1", HUMANEVAL).count("def double") == 1
    assert program("def double(x):\n  return 1", HUMANEVAL).count("def double") == 1


def invoke(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, SpiffyError):  # run_app turns it into one line
        return 2, done.stdout, str(done.exception)
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "graph.json"
    graph().save(path)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without this machine's profile and without a report, which take seconds."""
    for name in ("cli.bench.profile_of", "bench.report.write_report"):
        monkeypatch.setattr(f"spiffy.{name}", lambda *_: None)


def test_the_command_writes_a_run_that_can_be_read_back(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["spiffy-bench", "--out", "r\udce9sultats"])  # not UTF-8
    out = tmp_path / "new" / "run"
    code, text, _ = invoke(
        "--graph", artifact, "--out", out, "--samples", "1", "--repeats", "1", "--budgets", "1,4",
        "--methods", "graph,model,auto", "--device", "cpu", "--warm-up", "0",
    )  # fmt: skip
    assert code == 0
    summary = Bench.load(out / "bench.json")
    assert summary.command == r"spiffy-bench --out 'r\udce9sultats'"
    names = [result.name for result in summary.results]
    assert names == ["plain static", "graph 1", "graph 4", "model 1", "model 4", "auto"]
    assert summary.walkthrough is not None
    assert summary.walkthrough.method == "model 4"
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]
    assert sorted(row["method"] for row in rows) == sorted(names)  # in the order measured
    assert sum(row["nfe"] for row in rows) == sum(result.nfe for result in summary.results)
    assert "model 4" in text
    assert (out / "table.md").read_text("utf-8").strip() in text
    code, text, _ = invoke("--compare", out / "bench.json", out / "bench.json")
    assert code == 0
    assert "model 4" in text
    endless = (out / "bench.json").read_text().replace('"samples":1', '"samples":1e999')
    (out / "endless.json").write_text(endless)
    code, _, error = invoke("--compare", out / "bench.json", out / "endless.json")
    assert (code, "a number that is not finite" in error) == (2, True)


@pytest.mark.usefixtures("quick")
def test_what_was_measured_is_kept_if_ctrl_c_comes_amid_summing_up(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spiffy.cli.bench.profile_of", interrupted)
    code, _, error = invoke(
        "--graph", artifact, "--out", tmp_path, "--samples", "1", "--repeats", "1", "--budgets",
        "1", "--methods", "graph", "--device", "cpu", "--warm-up", "0",
    )  # fmt: skip
    assert code == 130
    assert "stopped early: summed up are 1 of 1 prompts, 1 of 1 repeats" in error
    assert Bench.load(tmp_path / "bench.json").data.samples == 1


@pytest.mark.usefixtures("quick")
def test_what_was_measured_before_ctrl_c_or_an_error_is_summed_up(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = 2  # plain and graph
    once = ways * PROMPTS
    cases = [
        (ways, KeyboardInterrupt(), 130, (1, 1)),  # after the first prompt
        (once, SpiffyError("it broke"), 2, (PROMPTS, 1)),
        (once + ways, KeyboardInterrupt(), 130, (PROMPTS, 1)),  # amid the second repeat
    ]
    for decodes, problem, expected, kept in cases:
        left = iter(range(decodes))

        def decode(task: Task, left: Iterator[int] = left, problem: Any = problem) -> Any:
            if next(left, None) is None:
                raise problem
            return watch.decode(task)

        monkeypatch.setattr(bench_measure, "decode", decode)
        out = tmp_path / f"run-{decodes}"
        code, _, error = invoke(
            "--graph", artifact, "--out", out, "--samples", str(PROMPTS), "--repeats", "2",
            "--budgets", "1", "--methods", "graph", "--device", "cpu", "--warm-up", "0",
        )  # fmt: skip
        assert code == expected
        summary = Bench.load(out / "bench.json")
        assert (summary.data.samples, summary.data.repeats) == kept
        rows = [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]
        assert len(rows) == ways * kept[0] * kept[1]
        assert {row["prompt"] for row in rows} == set(range(kept[0]))
        if expected == 130:
            said = f"{kept[0]} of {PROMPTS} prompts, {kept[1]} of 2 repeats"
            assert f"stopped early: summed up are {said}" in error
        else:
            assert error == "it broke"


def test_methods_asked_for_by_name_are_not_left_out_unsaid(artifact: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.json"
    graph().model_copy(update={"acceptance": None}).save(plain)
    options = ("--out", tmp_path / "run", "--samples", "1", "--device", "cpu", "--budgets", "1")
    code, _, error = invoke("--graph", plain, *options, "--methods", "graph,model")
    assert (code, "no model: the graph has no acceptance model" in error) == (2, True)
    paper = tmp_path / "paper.json"
    graph("paper").save(paper)
    calibrated = load_prompts("synthetic", 10).texts[0]
    (tmp_path / "seen.jsonl").write_text(json.dumps({"question": calibrated}), encoding="utf-8")
    seen = ("--dataset", tmp_path / "seen.jsonl", "--methods", "paper", "--paper", paper)
    silent = plain.with_name("silent.json")  # only the rival says what it was calibrated on
    record = graph().calibration.model_copy(update={"prompt_digests": None})
    graph().model_copy(update={"calibration": record}).save(silent)
    code, _, error = invoke("--graph", silent, *options, *seen)
    assert (code, "the graph of --paper was calibrated on 1 of these 1" in error) == (2, True)
    code, _, error = invoke("--graph", plain, *options, "--methods", "paper", "--paper", artifact)
    assert (code, "grown by --objective expected-steps" in error) == (2, True)
    options = (*options, "--paper", paper)  # it has 8 nodes, and 8 of them are all
    code, _, error = invoke(
        "--graph", artifact, *options[:-3], "8", *options[-2:], "--methods", "pruned"
    )
    assert (code, "no pruned: the graph of --paper has no more" in error) == (2, True)


@pytest.mark.usefixtures("quick")
def test_a_run_states_what_decoded_and_not_what_the_graph_is_of(
    artifact: Path, tmp_path: Path
) -> None:
    """Weights are not in a model's fingerprint: a fine-tuned model's are its own."""
    tuned = shutil.copytree(ALIASES["tiny-sdar"], tmp_path / "tuned")
    (file,) = tuned.glob("*.safetensors")
    weights = load_file(file)
    save_file({name: weight * 1.05 for name, weight in weights.items()}, file, {"format": "pt"})
    benches = []
    for name, model in (("a", "tiny-sdar"), ("b", tuned)):
        code, _, _ = invoke(
            "--graph", artifact, "--out", tmp_path / name, "--samples", "1", "--repeats", "1",
            "--budgets", "1", "--methods", "graph", "--device", "cpu", "--warm-up", "0",
            "--model", model,
        )  # fmt: skip
        assert code == 0
        benches.append(Bench.load(tmp_path / name / "bench.json"))
    ours, theirs = benches
    assert (ours.model.id, ours.graph_model) == ("tiny-sdar", None)
    assert (theirs.model.id, theirs.graph_model) == ("tuned", "tiny-sdar")
    assert ours.model.fingerprint == theirs.model.fingerprint
    assert "counts (NFE, positions, steps) and accuracy cannot be compared: different model" in (
        text := compare(ours, theirs)
    )
    assert "weights (digest)" in text
    named = ours.model_copy(
        update={"model": ours.model.model_copy(update={"id": "copy", "revision": "0" * 40})}
    )
    text = compare(ours, named)  # the same weights by another name
    assert "| model |" in text
    assert "cannot be compared" not in text


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--threshold", "0.8"), "--threshold is read by --policy"),  # by no method that is there
        (("--execute-code",), "no prompt of synthetic has tests to run"),
    ],
)
def test_options_that_nothing_reads_are_refused(
    artifact: Path, tmp_path: Path, words: tuple[str, ...], why: str
) -> None:
    options = ("--samples", "1", "--device", "cpu", "--methods", "graph", "--budgets", "1")
    code, _, error = invoke("--graph", artifact, "--out", tmp_path / "run", *options, *words)
    assert (code, why in error) == (2, True)


def test_papers_graph_is_measured_with_as_many_drafts_as_it_has_nodes() -> None:
    model, few = sdar(), graph("paper")
    few = few.model_copy(update={"nodes": few.nodes[:3]})
    found = methods(model, decoding_settings(model, graph()), graph(), ["paper"], [1, 3, 4], few)
    assert [method.name for method in found[1:]] == ["paper 1", "paper 3"]


def test_a_token_that_differs_in_any_repeat_counts() -> None:
    found, measured, _ = run()
    name = found[-1].name
    rows = tuple(
        replace(row, differs=True) if (row.method, row.prompt, row.repeat) == (name, 1, 1) else row
        for row in measured.rows
    )
    assert (
        next(r for r in results(found, replace(measured, rows=rows)) if r.name == name).differing
        == 1
    )


@pytest.mark.usefixtures("quick")
def test_a_drafted_token_that_differs_is_counted_and_ends_in_1(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, out = bench_measure.collect, tmp_path / "run"

    def corrupted(task: Task) -> Output:
        output = collect(task)
        if task.drafter is not None and task.sequence == 1:
            output.token_ids[0] ^= 1
        return output

    monkeypatch.setattr(bench_measure, "collect", corrupted)
    code, text, log = invoke(
        "--graph", artifact, "--out", out, "--samples", str(PROMPTS), "--repeats", "1",
        "--budgets", "1", "--methods", "graph", "--device", "cpu", "--warm-up", "0",
        "--gen-length", "16",
    )  # fmt: skip
    assert code == 1
    assert "tokens differ, in float32" in log
    found = {r.name: (r.compared, r.differing) for r in Bench.load(out / "bench.json").results}
    assert found == {"plain static": (2, 0), "graph 1": (2, 1)}
    assert "no: 1 of 2 (50%)" in text
    assert (out / "table.md").read_text("utf-8").strip() in text
    assert len((out / "rows.jsonl").read_text("utf-8").splitlines()) == len(found) * PROMPTS


def test_a_run_that_measured_nothing_writes_nothing(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(task: Task) -> Any:
        raise SpiffyError("it broke")

    monkeypatch.setattr(bench_measure, "decode", decode)
    code, _, error = invoke(
        "--graph", artifact, "--out", tmp_path / "run", "--samples", "1", "--budgets", "1",
        "--methods", "graph", "--device", "cpu",
    )  # fmt: skip
    assert (code, error) == (2, "it broke")
    assert not [*(tmp_path / "run").iterdir()]


@pytest.mark.usefixtures("quick")
def test_prompts_that_were_calibrated_on_are_refused(artifact: Path, tmp_path: Path) -> None:
    seen = load_prompts("synthetic", 10).texts
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": text}) + "\n" for text in seen[:2]]
    data.write_text("".join([*lines, "{broken\n"]), encoding="utf-8")
    options = (
        "--graph", artifact, "--out", tmp_path / "run", "--dataset", data, "--samples", "2",
        "--skip-bad", "--repeats", "1", "--budgets", "1", "--methods", "graph", "--device", "cpu",
    )  # fmt: skip
    code, _, error = invoke(*options)
    assert code == 2
    assert "calibrated on 2 of these 2 prompts" in error
    code, _, _ = invoke(*options, "--allow-calibrated")
    assert code == 0
    assert Bench.load(tmp_path / "run" / "bench.json").data.calibrated_on == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--methods", "graph,magic"], "'magic'"),
        (["--budgets", "9"], "'9'"),
        (["--budgets", "x"], "'x'"),
        (["--repeats", "0"], "--repeats 0"),
        (["--warm-up", "-1"], "--warm-up -1"),
        (["--methods", "paper,model"], "paper needs --paper FILE"),
        (["--methods", "order"], "order needs --order FILE"),
        (["--methods", "model", "--paper", "p.json"], "--methods has no paper or pruned"),
    ],
)
def test_bad_options_are_refused(
    artifact: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    code, _, error = invoke("--graph", artifact, "--out", tmp_path / "run", *options)
    assert code == 2
    assert reason in error
    assert not (tmp_path / "run").exists()


def test_an_order_network_that_is_not_there_is_refused(artifact: Path, tmp_path: Path) -> None:
    missing = tmp_path / "order.safetensors"
    code, _, error = invoke("--graph", artifact, "--out", tmp_path / "run", "--order", missing)
    assert code == 2
    assert f"{missing}: cannot be read" in error.replace("\n", " ")


def test_a_folder_that_cannot_be_made_is_refused(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, error = invoke("--graph", artifact, "--out", tmp_path / "file" / "run")
    assert code == 2
    assert "cannot be written" in error


@pytest.mark.parametrize("name", ["bench.json", "rows.jsonl", "table.md", "report.html"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    artifact: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    code, _, error = invoke("--graph", artifact, "--out", tmp_path)
    assert (code, "is a directory, expected a file name" in error) == (2, True)


def test_a_summary_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(SpiffyError, match="not a benchmark summary"):
        Bench.load(path)
    path.write_text('{"format":"spiffy.bench","version":"2.0"}', encoding="utf-8")
    with pytest.raises(SpiffyError, match=r"version 2\.0"):
        Bench.load(path)


def test_other_settings_are_not_compared_token_by_token() -> None:
    found, _, _ = run()
    other = next(method for method in found if method.name == "plain threshold")
    assert isinstance(other.settings, DecodingSettings)
    assert other.settings != found[0].settings
