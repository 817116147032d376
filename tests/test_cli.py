"""The commands as users call them: results, exit codes, one-line errors, nothing half-written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import PARITY, Call, collected, of_another_model
from torch import Tensor

from spiffy.calib import pipeline
from spiffy.cli import calibrate, calibration_tables
from spiffy.cli.decode_runs import Runs
from spiffy.runtime.budget import timed
from spiffy.schemas import DraftGraph, SpiffyError

TINY = "tiny-llada"
QUICK = ("--gen-length", "32", "--samples", "5", "--budget", "4")
# Where it does not matter what is in the graph: too few states for an acceptance model.
SMALL = ("--gen-length", "16", "--block-length", "8", "--samples", "3", "--budget", "4")
PROMPT = "Tom has 3 apples. He buys 4 more. How many apples does Tom have now?"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "graph.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["spiffy-calibrate", "--model", TINY, *QUICK, "--out", str(path)]
        )
        with pytest.raises(SystemExit) as ended:
            calibrate.main()
    assert not ended.value.code
    return path


def test_calibrate_writes_an_artifact_and_reports_held_out_steps(
    call: Call, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "graph.json"
    code, printed, log = call("calibrate", "--model", TINY, *QUICK, "--out", out)
    assert code == 0
    assert "held-out" in printed
    assert f"wrote {out}" in log
    assert out.read_bytes() == artifact.read_bytes()  # of the same command
    papers = tmp_path / "paper.json"
    assert (
        call("calibrate", "--model", TINY, *SMALL, "--objective", "paper", "--out", papers)[0] == 0
    )
    assert json.loads(papers.read_text())["calibration"]["objective"] == "paper"


def test_more_than_can_be_held_is_refused_or_left_out(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_tables, "_MOST_COMPARED", 3)
    out = tmp_path / "graph.json"
    code, printed, log = call("calibrate", "--model", TINY, *SMALL, "--out", out)
    assert code == 0
    assert "paper" not in printed
    assert re.search(r"paper objective: left out, \d+ distinct chains", log)
    monkeypatch.setattr(pipeline, "MAX_PROMPTS", 1)
    code, _, log = call("calibrate", "--model", TINY, *SMALL, "--out", tmp_path / "none.json")
    assert code == 2
    assert "more than an artifact can name (1)" in log
    assert not (tmp_path / "none.json").exists()


def test_a_local_checkpoint_gets_its_artifact_beside_it(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shipped = Path(sys.modules["spiffy.runtime"].__path__[0]) / "checkpoints" / TINY
    for file in shipped.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert call("calibrate", "--model", folder, *SMALL)[0] == 0
    assert (folder / "draft_graph.json").is_file()


def test_an_alias_is_no_folder_that_is_called_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / TINY).mkdir()
    monkeypatch.chdir(tmp_path)
    assert calibrate._beside(TINY) == Path(f"{TINY}.json")
    assert calibrate._beside(f"./{TINY}") == Path(TINY, "draft_graph.json")


def test_what_took_hours_is_written_before_it_is_measured(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise SpiffyError("drafts changed a token")

    monkeypatch.setattr("spiffy.calib.measure.measure_steps", fails)
    out = tmp_path / "graph.json"
    code, _, log = call("calibrate", "--model", TINY, *SMALL, "--out", out)
    assert code == 1  # as where a token differs: the input was good, and the graph is written
    assert f"wrote {out}, to be written again" in log
    assert f"error: drafts changed a token; {out} holds the whole graph, without measured" in log
    assert DraftGraph.load(out).measured_steps == {}


def test_decode_prints_the_answer_and_counts(call: Call, artifact: Path) -> None:
    code, answer, log = call("decode", "--graph", artifact, "--prompt", PROMPT)
    assert code == 0
    assert answer.strip()
    assert "steps per forward" in log
    assert "budget auto: " in log  # which nobody asked for
    code, plain, _ = call("decode", "--graph", artifact, "--prompt", PROMPT, "--no-speculation")
    assert (code, plain) == (0, answer)
    code, streamed, _ = call("decode", "--graph", artifact, "--prompt", PROMPT, "--stream")
    assert (code, streamed.strip()) == (0, answer.strip())


def test_of_an_answer_no_states_are_kept_but_the_last(
    call: Call, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = collected(monkeypatch)
    assert call("decode", "--graph", artifact, "--prompt", PROMPT)[0] == 0
    (task,) = tasks
    assert len(task.path) == 1 < task.stats.steps


def test_a_graph_of_another_model_is_taken_on_demand(
    call: Call, artifact: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    of_another_model(DraftGraph.load(artifact)).save(other)
    arguments = ("decode", "--graph", other, "--prompt", PROMPT, "--json")
    code, printed, log = call(*arguments, "--budget", 4)
    assert (code, printed) == (2, "")
    assert "fingerprint of config and tokenizer m1-other, this model has" in log
    assert len(log.strip().splitlines()) == 1
    code, printed, _ = call(*arguments, "--budget", 4, "--any-model")
    assert code == 0
    plain = json.loads(call(*arguments, "--no-speculation", "--any-model")[1])
    drafted = json.loads(printed)
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["nfe"] < plain["nfe"]


def test_a_cache_that_is_not_exact_is_named_so_wherever_it_drafts(
    call: Call, artifact: Path, tmp_path: Path
) -> None:
    stored, path = DraftGraph.load(artifact), tmp_path / "shared.json"
    shared = stored.decoding.model_copy(update={"cache": "prefix-shared"})
    stored.model_copy(update={"decoding": shared, "exact": False}).save(path)
    assert "cache prefix-shared (near-lossless)" in call("graph", "show", path)[1]
    decoding = ("decode", "--graph", path, "--prompt", PROMPT, "--gen-length", 16)
    decoding = (*decoding, "--block-length", 8)
    for options, times in (
        ((), 1),
        (("--verify",), 1),
        (("--no-speculation",), 0),
        (("--cache", "prefix"), 0),
    ):
        log = call(*decoding, *options)[2]
        assert log.count("cache prefix-shared is near-lossless") == times


def test_prompts_that_share_forwards_are_answered_in_order_or_as_they_finish(
    call: Call, artifact: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"{PROMPT} {'And then?' * k}" for k in (4, 0, 2)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    command = ("decode", "--graph", artifact, "--prompts", prompts, "--stop", "\n")
    code, alone, log = call(*command)
    assert (code, len(alone.splitlines())) == (0, 3)
    assert "shared" not in log
    code, together, log = call(*command, "--batch-size", 3)
    assert (code, together) == (0, alone)
    assert "forwards that up to 3 prompts shared" in log
    code, lines, _ = call(*command, "--batch-size", 2, "--json")
    assert code == 0
    answers = {answer["index"]: answer["text"] for answer in map(json.loads, lines.splitlines())}
    assert [answers[index] for index in range(3)] == alone.splitlines()
    for other in ("--stream", "--verify"):
        code, printed, log = call(*command, "--batch-size", 2, other)
        assert (code, printed) == (2, "")
        assert log.startswith("error: --batch-size decodes prompts together")


def test_json_has_one_object_per_prompt(call: Call, artifact: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{PROMPT} {k}"}) + "\n" for k in range(3)))
    code, printed, _ = call("decode", "--graph", artifact, "--prompts", prompts, "--json")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert code == 0
    assert len(rows) == 3
    for row in rows:
        assert set(row) == {
            *(
                "index",
                "text",
                "token_ids",
                "nfe",
                "positions_computed",
                "steps",
                "accepted",
                "seconds",
            ),
        }
        assert row["nfe"] == row["steps"] - row["accepted"]
    assert [row["index"] for row in rows] == [0, 1, 2]


def test_verify_compares_with_plain_decoding(
    call: Call, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")  # of no terminal: the table is whole all the same
    decode, decoded = Runs.decode, list[tuple[int, str, int]]()

    def noting(runs: Runs, prompt: tuple[int, Tensor], name: str) -> None:
        decode(runs, prompt, name)
        decoded.append((prompt[0], name, id(runs.ways[name].drafter)))

    monkeypatch.setattr(Runs, "decode", noting)
    arguments = ("--prompts", "synthetic", "--samples", 2, "--verify", "--budget", "1,8")
    code, printed, _ = call("decode", "--graph", artifact, *arguments)
    assert code == 0
    names = [
        "plain",
        "1 drafts",
        "8 drafts",
    ]  # each is warm when it counts, and has learned nothing
    assert [way[:2] for way in decoded] == [(n, name) for n in (0, 0, 1) for name in names]
    assert decoded[2] != decoded[5]
    assert "8 drafts" in printed  # more than the graph holds: its acceptance model chooses them
    assert "tokens identical" in printed
    assert "NFE" in printed
    assert "positions computed" in printed
    assert "\u2026" not in printed


def test_raw_prompts_are_templated_already(call: Call) -> None:
    decoding = ("decode", "--model", TINY, "--gen-length", 32)
    code, answer, log = call(*decoding, "--prompt", PROMPT)
    assert (code, "spells" in log) == (0, False)
    templated = f"<|user|>{PROMPT}<|assistant|>"
    assert call(*decoding, "--prompt", templated, "--raw")[:2] == (0, answer)
    code, other, log = call(*decoding, "--prompt", templated)
    assert (code, other == answer) == (0, False)
    assert "the prompt spells special tokens, such as <|user|>, which are taken as text" in log


def test_conversations_fields_and_stop_strings(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": PROMPT}
    rows = [{"chat": [system, user]}, {"chat": [{"from": "human", "value": PROMPT}]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    decoding = ("decode", "--model", TINY, "--gen-length", 32)
    code, printed, _ = call(*decoding, "--prompts", path, "--field", "chat", "--json")
    assert code == 0
    first, second = map(json.loads, printed.splitlines())
    assert first["positions_computed"] > second["positions_computed"]  # of a longer prompt
    code, printed, _ = call(*decoding, "--prompt", PROMPT, "--system", "S", "--json")
    assert json.loads(printed) | {"seconds": 0} == first | {"seconds": 0}
    without = second["text"]
    stops = ("--stop", "no such text", "--stop", "=<<")
    cut = without.split("=<<")[0]
    assert cut != without
    assert call(*decoding, "--prompt", PROMPT, *stops)[1] == cut + "\n"
    assert call(*decoding, "--prompt", PROMPT, *stops, "--stream")[1] == cut + "\n"


def test_verify_compares_answers_that_stop(call: Call, artifact: Path) -> None:
    arguments = ("--prompt", PROMPT, "--block-length", 8, "--verify", "--budget", 4, "--json")
    code, whole, _ = call("decode", "--graph", artifact, *arguments)
    assert code == 0
    code, stopped, log = call("decode", "--graph", artifact, *arguments, "--stop", "+4")
    assert code == 0
    assert "yes" in log
    texts = [json.loads(printed)["text"] for printed in (whole, stopped)]
    assert texts[1] == texts[0].split("+4")[0] != texts[0]
    code, _, log = call("decode", "--graph", artifact, *arguments, "--stop", texts[0][0])
    assert (code, "yes" in log) == (0, True)  # of no tokens at all


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        ("float32", "a tie in floating point can do that, though seldom. Repeat with --dtype "
                    "float64"),
        ("bfloat16", "near-ties can do that, as another batch size can: the shape of a forward "
                     "decides. Repeat with --dtype float32"),
    ],
)  # fmt: skip
def test_verify_notices_a_differing_token(
    dtype: str, told: str, call: Call, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["spiffy.runtime.generate"]  # the package exports a function of that name
    collect = module.collect

    def corrupted(task, trace=False):  # type: ignore[no-untyped-def]
        output = collect(task, trace)
        if task.drafter is not None or task.adviser is not None:
            output.token_ids[0] ^= 1
        return output

    monkeypatch.setattr(module, "collect", corrupted)
    command = ("decode", "--graph", artifact, "--prompt", PROMPT, "--verify", "--dtype", dtype)
    code, printed, log = call(*command)
    assert code == 1
    assert "no (1 prompts differ)" in printed
    assert f"tokens differ, in {dtype}: {told}" in " ".join(log.split())


def test_edges_change_the_cost_of_decoding_and_not_the_answer(call: Call, artifact: Path) -> None:
    def decoded(edges: str, *arguments: object) -> dict[str, Any]:
        arguments = (*arguments, "--prompt", PROMPT, "--json", "--edges", edges)
        code, printed, _ = call("decode", *arguments)
        assert code == 0
        row: dict[str, Any] = json.loads(printed)
        return row

    sdar = ("--model", "tiny-sdar", "--gen-length", 32)
    stored, folded = decoded("none", *sdar), decoded("fold", *sdar)
    assert stored["token_ids"] == folded["token_ids"]
    assert stored["nfe"] > folded["nfe"] == folded["steps"]
    assert decoded("complete, first", *sdar)["nfe"] == stored["nfe"]  # nothing is drafted
    graph = ("--graph", artifact, "--block-length", 8, "--budget", 4)
    within, across = decoded("none", *graph), decoded("all", *graph)
    assert within["token_ids"] == across["token_ids"]
    assert within["nfe"] > across["nfe"]


def test_a_graph_can_be_calibrated_for_some_edges(call: Call, tmp_path: Path) -> None:
    roots = {}
    for edges in ("all", "none"):
        out = tmp_path / f"{edges}.json"
        arguments = (*SMALL, "--edges", edges, "--out", out)
        assert call("calibrate", "--model", TINY, *arguments)[0] == 0
        roots[edges] = json.loads(out.read_text())["calibration"]["roots"]
    # A block's first forward has no drafts, nor has one before a block's last step.
    assert roots["none"] < roots["all"]


def test_auto_budget_decodes_with_and_without_an_acceptance_model(
    call: Call, artifact: Path, tmp_path: Path
) -> None:
    stored = DraftGraph.load(artifact)
    assert stored.acceptance is not None
    static = tmp_path / "static.json"
    stored.model_copy(update={"acceptance": None}).save(static)
    for path in (artifact, static):
        arguments = ("--graph", path, "--prompt", PROMPT, "--budget", "auto")
        code, printed, log = call("decode", *arguments, "--verify")
        assert code == 0
        assert "tokens identical" in printed
        assert "budget auto: " in log
        assert "other settings" not in log
    arguments = ("--graph", artifact, "--prompt", PROMPT)
    plain = call("decode", *arguments, "--no-speculation")[1]
    assert call("decode", *arguments, "--budget", "auto", "--remeasure")[:2] == (0, plain)
    assert call("decode", *arguments, "--budget", "2", "--remeasure")[0] == 2


def test_decoding_with_other_settings_than_the_graphs_says_so(call: Call, artifact: Path) -> None:
    arguments = ("--graph", artifact, "--prompt", PROMPT, "--block-length", 16, "--budget")
    for budget in ("2", "auto"):
        code, _, log = call("decode", *arguments, budget)
        assert code == 0
        assert "block_length 16 (32)" in log.replace("\n", " ")


def test_calibrate_predicts_and_stores_costs_outside_the_digest(
    call: Call, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "graph.json", tmp_path / "graph.html"
    arguments = (*QUICK, "--profile", "--out", out, "--report", page)
    code, printed, log = call("calibrate", "--model", TINY, *arguments)
    assert code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert f"wrote {page}" in log
    assert "this machine" in printed
    assert "roofline" not in printed  # it says nothing of models this small
    assert "predictions" in log
    small = ("--model", TINY, *SMALL, "--out", tmp_path / "small.json", "--predict-for")
    monkeypatch.setattr(timed, "_HOPELESS", 0.0)  # this machine times a single draft
    code, printed, log = call("calibrate", *small, "llada-8b")
    assert code == 0
    (row,) = (line for line in printed.splitlines() if "llada-8b on H100 SXM" in line)
    assert "roofline" in row
    assert int(re.split(" *[│┃|] *", row)[4]) > 1
    code, _, log = call("calibrate", *small, "x")
    assert code == 2
    assert "choose one of 0.3b" in log
    assert "llada2-mini" in log
    ours, plain = DraftGraph.load(out), DraftGraph.load(artifact)
    assert ours.digest() == plain.digest()
    assert not plain.cost_profiles
    (profile,) = ours.cost_profiles
    assert profile.points[0].drafts == 0
    assert (profile.cache, profile.block_length, profile.policy) == ("none", 32, "static")
    assert set(profile.turns) == {"graph", "model"}


def test_graph_commands_describe_an_artifact(call: Call, artifact: Path) -> None:
    code, printed, _ = call("graph", "show", artifact)
    assert code == 0
    assert "root" in printed
    assert "+0.0" in printed
    assert call("graph", "validate", artifact)[0] == 0
    code, printed, _ = call("graph", "schema")
    shipped = Path(__file__).parent.parent / "docs" / "draft-graph.schema.json"
    assert printed == shipped.read_text()


@pytest.mark.parametrize("command", ["calibrate", "decode", "graph"])
def test_help_and_version(call: Call, command: str) -> None:
    assert call(command, "--help")[0] == 0
    code, printed, _ = call(command, "--version")
    assert code == 0
    assert printed.startswith("spiffy-dllm 0.")


def test_list_models_names_hub_ids(call: Call) -> None:
    code, printed, _ = call("calibrate", "--list-models")
    assert code == 0
    models = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert models["tiny-llada"] == "ships with the package"
    assert {
        "GSAI-ML/LLaDA-8B-Base",
        "GSAI-ML/LLaDA-8B-Instruct",
        "GSAI-ML/LLaDA-1.5",
        "Dream-org/Dream-v0-Base-7B",
        "Dream-org/Dream-v0-Instruct-7B",
        "apple/DiffuCoder-7B-cpGRPO",
        "Dream-org/Dream-Coder-v0-Instruct-7B",
        "JetLM/SDAR-1.7B-Chat",
        "JetLM/SDAR-4B-Chat",
        "JetLM/SDAR-8B-Chat",
        "JetLM/SDAR-8B-Chat-b32",
        "JetLM/SDAR-30B-A3B-Chat",
        "Gen-Verse/TraDo-4B-Instruct",
        "Gen-Verse/TraDo-8B-Instruct",
    } <= set(models.values())


BAD_CALIBRATE = {
    "unknown model": (["--model", "nope"], "unknown model 'nope'"),
    "hub id without network": (["--model", "no/such-model"], "pass the directory"),
    "missing dataset": (["--model", TINY, "--dataset", "no.jsonl"], "no such file"),
    "budget": (["--model", TINY, "--budget", "0"], "--budget 0"),
    "samples": (["--model", TINY, "--samples", "0"], "samples 0"),
    "block length": (
        ["--model", TINY, "--gen-length", "64", "--block-length", "24"],
        "block_length 24 does not divide gen_length 64",
    ),
    "policy": (["--model", TINY, "--policy", "greedy"], "policy"),
    "cache": (["--model", TINY, "--cache", "block"], "llada has no cache 'block'"),
    "too long": (["--model", TINY, "--gen-length", "4096"], "exceeds the"),
    "device": (["--model", TINY, "--device", "abacus"], "unknown device 'abacus'"),
    "dtype": (["--model", TINY, "--dtype", "int3"], "unknown dtype 'int3'"),
    "report": (["--model", TINY, "--report", "no/such/page.html"], "folder no/such does not exist"),
    "edges": (["--model", TINY, "--edges", "all,fold"], "'all' does not belong there"),
}


@pytest.mark.parametrize("case", BAD_CALIBRATE)
def test_bad_calibrate_input_is_one_line_and_writes_nothing(
    call: Call, tmp_path: Path, case: str
) -> None:
    arguments, message = BAD_CALIBRATE[case]
    out = tmp_path / "graph.json"
    code, printed, log = call("calibrate", *arguments, "--out", out)
    assert code == 2
    assert printed == ""
    assert log.startswith("error: ")
    assert message in log
    assert len(log.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["missing/graph.json", "."])
def test_unwritable_output_fails_before_the_work(call: Call, tmp_path: Path, out: str) -> None:
    code, _, log = call("calibrate", "--model", TINY, "--out", tmp_path / out)
    assert code == 2
    assert "does not exist" in log or "is a directory" in log
    assert "decoding prompts" not in log


BAD_DECODE = {
    "no model": (["--prompt", "x"], "give --graph FILE.json, or --model"),
    "missing graph": (["--graph", "none.json", "--prompt", "x"], "no such file"),
    "empty prompt": (["--graph", "GRAPH", "--prompt", " "], "prompt is empty"),
    "missing prompts": (["--graph", "GRAPH", "--prompts", "none.jsonl"], "no such file"),
    "budget 0": (["--graph", "GRAPH", "--prompt", "x", "--budget", "0"], "budget 0"),
    "budget -1": (["--graph", "GRAPH", "--prompt", "x", "--budget", "-1"], "budget -1"),
    "budget word": (["--graph", "GRAPH", "--prompt", "x", "--budget", "all"], "--budget 'all'"),
    "two budgets": (["--graph", "GRAPH", "--prompt", "x", "--budget", "1,2"], "need --verify"),
    "other model": (
        ["--graph", "GRAPH", "--model", str(PARITY / "llada-a"), "--prompt", "x"],
        "calibrated for tiny-llada: vocabulary size",
    ),
    "other family": (
        ["--graph", "GRAPH", "--model", str(PARITY / "dream-a"), "--prompt", "x"],
        "calibrated for tiny-llada: family llada",
    ),
    "block length": (
        ["--graph", "GRAPH", "--prompt", "x", "--block-length", "7"],
        "block_length 7 does not divide",
    ),
    "edges": (["--graph", "GRAPH", "--prompt", "x", "--edges", "fold,frist"], "'frist' does not"),
    "no edges": (["--graph", "GRAPH", "--prompt", "x", "--edges", ""], "give all, none, or a list"),
    "raw system": (["--model", TINY, "--prompt", "x", "--raw", "--system", "y"], "--raw takes"),
    "field": (["--model", TINY, "--prompt", "x", "--field", "y"], "--field names a field of"),
    "stop": (["--model", TINY, "--prompt", "x", "--stop", ""], "every stop string must be text"),
    "half a character": (
        ["--model", TINY, "--prompt", "x", "--stop", "\udce9"],
        "every stop string must be text",
    ),
    "json stream": (["--graph", "GRAPH", "--prompt", "x", "--json", "--stream"], "drop --json"),
    "nothing to verify": (["--model", TINY, "--prompt", "x", "--verify"], "give --graph"),
}


@pytest.mark.parametrize("case", BAD_DECODE)
def test_bad_decode_input_is_one_line(call: Call, artifact: Path, case: str) -> None:
    arguments, message = BAD_DECODE[case]
    code, printed, log = call("decode", *(artifact if a == "GRAPH" else a for a in arguments))
    assert code == 2
    assert printed == ""
    assert message in log
    assert len(log.strip().splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "spiffy.draft-graph"}'])
def test_malformed_artifacts_are_refused(call: Call, tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    code, _, log = call("decode", "--graph", path, "--prompt", "x")
    assert code == 2
    assert log.startswith(f"error: {path}")
    assert len(log.strip().splitlines()) == 1


def test_a_newer_artifact_asks_for_an_upgrade(call: Call, tmp_path: Path, artifact: Path) -> None:
    content = json.loads(artifact.read_text()) | {"version": "2.0"}
    path = tmp_path / "newer.json"
    path.write_text(json.dumps(content))
    code, _, log = call("decode", "--graph", path, "--prompt", "x")
    assert code == 2
    assert "newer than this program reads" in log


def test_the_readmes_python_example_runs(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    example = readme.split("```python\n")[1].split("```")[0]
    (tmp_path / "llada.json").write_bytes(artifact.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})  # it asserts that no token changed
