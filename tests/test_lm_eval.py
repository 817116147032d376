"""lm-evaluation-harness with drafts: its own command, the same scores, what they took."""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial, partialmethod
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Call,
    chain_graph,
    fail_while_decoding,
    parity_model,
    random_prompt,
    shown,
    study,
)

pytest.importorskip("lm_eval", reason="pip install 'spiffy-dllm[lm-eval]'")

import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM

from spiffy.calib.synthetic import problems
from spiffy.cli import lm_eval as command
from spiffy.integrations.likelihood import is_greedy, log_likelihood
from spiffy.integrations.lm_eval import SpiffyLM, run_harness
from spiffy.integrations.lm_eval.model import _sequence
from spiffy.runtime import generate, load_model
from spiffy.schemas import SpiffyError

#: Two of the shipped word problems, short ones, and what they come to.
PROBLEMS = {
    problem.question: int(problem.answer.rpartition("#### ")[2])
    for problem in islice((p for p in problems("test") if len(p.answer) < 45), 2)
}
FAMILIES = {
    "tiny-llada": {"policy": "threshold", "threshold": 0.8, "cache": "dual"},
    "tiny-dream": {"tokens_per_step": 2, "cache": "dual"},
    "tiny-sdar": {},
}
Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    rows = [{"question": text, "answer": str(number)} for text, number in PROBLEMS.items()]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"data": folder / "data.jsonl", "cache": folder / "cache"}
    text = study("harness").TASK.format(**places, length=32)
    (folder / "problems.yaml").write_text(text)
    return folder / "problems.yaml"


@pytest.fixture
def evaluate(call: Call, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Run `spiffy-lm-eval` in this process."""
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])
    # Seconds each: the harness reads all of its own tasks, and lists the packages installed.
    manager = lm_eval.tasks.TaskManager
    start = partialmethod(manager.__init__, include_defaults=False)
    monkeypatch.setattr(manager, "__init__", start)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)

    return partial(call, "lm-eval")


def given(options: dict[str, object]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the harness wrote: results and samples."""
    (path,) = folder.glob("*/results_*.json")
    (samples,) = folder.glob("*/samples_*.jsonl")
    lines = samples.read_text(encoding="utf-8").splitlines()
    return json.loads(path.read_text(encoding="utf-8")), [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_harness_scores_the_same_with_and_without_a_graph(
    evaluate: Evaluate, task: Path, tmp_path: Path, name: str
) -> None:
    options = FAMILIES[name]
    made = chain_graph(name, 2, gen_length=32, **options)
    made.save(tmp_path / "graph.json")
    model, scores = load_model(name, device="cpu"), {}
    for drafts in (0, 2):
        graph = {"graph": tmp_path / "graph.json", "budget": 2} if drafts else {}
        code, printed, log = evaluate(
            *("--model", "spiffy", "--tasks", task, "--apply_chat_template", "--log_samples"),
            *("--model_args", given({"pretrained": name, **options, **graph})),
            *("--batch_size", 2, "--device", "cpu", "--output_path", tmp_path / str(drafts)),
            *(("--verify-share", "0.5") if drafts else ()),
        )
        assert code == 0, log
        content, samples = results(tmp_path / str(drafts))
        ours = {"graph": made, "budget": 2} if drafts else {}
        outputs = [
            generate(model, text, gen_length=32, stop=["Question:"], **options, **ours)
            for text in PROBLEMS
        ]
        assert [sample["resps"][0][0] for sample in samples] == [out.text for out in outputs]
        right = [
            re.findall(r"#### (-?\d+)", out.text)[:1] == [str(answer)]
            for out, answer in zip(outputs, PROBLEMS.values(), strict=True)
        ]
        scores[drafts] = content["results"]["problems"]["exact_match,strict-match"]
        assert scores[drafts] == sum(right) / len(right) > 0
        counts = content["config"]["spiffy"]["tasks"]["problems"]
        for count in ("nfe", "positions_computed", "steps", "accepted"):
            assert counts[count] == sum(getattr(out.stats, count) for out in outputs)
        assert counts["tokens"] == sum(len(out.token_ids) for out in outputs)
        assert counts["steps_per_forward"] == counts["steps"] / counts["nfe"]
        speed = counts["tokens"] / counts["seconds"]
        assert counts["tokens_per_second"] == pytest.approx(speed, rel=1e-3)  # seconds are rounded
        assert "what decoding took" in printed
        if drafts:
            assert counts["accepted"] > 0
            assert counts["verified"]["answers"] == counts["verified"]["identical"] == 1
            assert counts["verified"]["nfe"] < counts["verified"]["plain_nfe"]
            assert "1 of 1" in printed
    assert scores[0] == scores[2]


def test_the_command_of_the_readme_runs(
    evaluate: Evaluate, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown("README.md", "spiffy-lm-eval").replace("\\\n", "")
    (line,) = [line for line in lines.splitlines() if line.startswith("spiffy-lm-eval")]
    monkeypatch.chdir(tmp_path)
    settings = FAMILIES["tiny-llada"]
    chain_graph("tiny-llada", 2, gen_length=32, **settings).save("llada.json")
    Path("problems.yaml").write_text(task.read_text())
    ours = line.replace("--tasks gsm8k --limit 8", "--tasks problems.yaml")  # without a network
    assert ours != line
    code, printed, log = evaluate(*shlex.split(ours)[1:])
    assert code == 0, log
    (path,) = Path("results").glob("*/results_*.json")
    record = json.loads(path.read_text(encoding="utf-8"))["config"]["spiffy"]
    assert (record["budget"], record["decoding"]["cache"]) == ("auto", "dual")
    assert record["tasks"]["problems"]["verified"]["identical"] == 1
    assert "1 of 1" in printed


def test_an_answer_that_differs_is_reported_and_ends_in_1(
    evaluate: Evaluate, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["spiffy.runtime.generate"]  # the package exports a function of that name
    collect, seen = module.collect, []
    sequences = [_sequence("problems", document, 0, 0) for document in range(2)]

    def corrupted(found, trace=False):  # type: ignore[no-untyped-def]
        output = collect(found, trace)
        if found.drafter is not None:
            seen.append(found.sequence)
            if found.sequence == sequences[1]:
                output.token_ids[0] ^= 1
        return output

    monkeypatch.setattr(module, "collect", corrupted)
    chain_graph("tiny-sdar", 2, gen_length=8).save(tmp_path / "graph.json")
    code, _, log = evaluate(
        *("--model", "spiffy", "--tasks", task, "--log_samples", "--output_path", tmp_path / "out"),
        *("--model_args", f"graph={tmp_path / 'graph.json'},budget=2,gen_length=8"),
        *("--device", "cpu", "--verify-share=1"),
    )
    assert code == 1
    assert "problems: other answers with drafts: documents 1" in log
    counts = results(tmp_path / "out")[0]["config"]["spiffy"]["tasks"]["problems"]
    assert counts["verified"]["differing_doc_ids"] == [1]
    assert (counts["verified"]["answers"], counts["verified"]["identical"]) == (2, 1)
    assert sorted(seen) == sorted(sequences)


# ---------------------------------------------------------------- requests


def request(context: str, number: int = 0, **kwargs: object) -> Instance:
    return Instance("generate_until", {}, (context, kwargs), 0, ("task", number, 1))


@pytest.fixture(scope="module")
def sdar() -> SpiffyLM:
    return SpiffyLM("tiny-sdar", batch_size=3, device="cpu")


PROMPT = "Tom has 3 apples. He buys 4 more. How many apples does Tom have now?"


def test_text_is_continued_as_it_stands(sdar: SpiffyLM) -> None:
    text = f"<|user|>{PROMPT}<|assistant|>"
    (answer,) = sdar.generate_until([request(text, max_gen_toks=24)], disable_tqdm=True)
    assert answer == generate(sdar.loaded.model, text, raw=True, gen_length=24).text
    assert answer == generate(sdar.loaded.model, PROMPT, gen_length=24).text


def test_conversations_are_encoded_as_everywhere(sdar: SpiffyLM) -> None:
    model = sdar.loaded.model
    messages = [
        {"role": "user", "content": "Say <|mask|> or <|endoftext|>."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": PROMPT},
    ]
    context = sdar.apply_chat_template(messages)
    assert isinstance(context, str)
    (answer,) = sdar.generate_until([request(context, max_gen_toks=16)], disable_tqdm=True)
    assert answer == generate(model, messages, gen_length=16).text
    begun = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "That makes"}]
    context = sdar.apply_chat_template(begun, add_generation_prompt=False)
    assert context == f"<|user|>{PROMPT}<|assistant|>That makes"
    (answer,) = sdar.generate_until([request(context, max_gen_toks=16)], disable_tqdm=True)
    assert answer == generate(model, str(context), raw=True, gen_length=16).text


def test_generation_arguments_are_honoured(sdar: SpiffyLM) -> None:
    model = sdar.loaded.model
    texts = [f"{PROMPT} {k}" for k in range(3)]
    whole = [generate(model, text, raw=True, gen_length=20).text for text in texts]
    stop = whole[0][5:8]
    answers = sdar.generate_until(
        [
            request(texts[0], until=[stop, ""], max_gen_toks=20),
            request(texts[1], max_new_tokens=20, do_sample=False, temperature=0.7, top_p=0.5),
            request(texts[2], do_sample=True, temperature=3.0, top_p=1.0, max_gen_toks=20),
        ],
        disable_tqdm=True,
    )
    assert answers[:2] == [whole[0].split(stop)[0], whole[1]]
    noisy = {"temperature": 3.0, "gen_length": 20, "raw": True}
    third = _sequence("task", 0, 0, 2)
    assert answers[2] == generate(model, texts[2], sequence=third, **noisy).text
    assert answers[2] != whole[2]
    filtered = {"top_k": 2, "top_p": 0.9}
    drawn = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 20}
    answers = sdar.generate_until(
        [request(texts[2], **drawn, **filtered), request(texts[2], 1, **drawn, top_k=-1)],
        disable_tqdm=True,
    )
    sdar.loaded.settings = sdar.loaded.settings.changed(temperature=1.0, **filtered)  # a graph's
    assert answers == sdar.generate_until(
        [request(texts[2], **drawn, **filtered), request(texts[2], 1, **drawn)], disable_tqdm=True
    )
    of = [_sequence("task", number, 0, 0) for number in (0, 1)]
    assert answers == [
        generate(model, texts[2], sequence=of[0], **noisy, **filtered).text,
        generate(model, texts[2], sequence=of[1], **noisy).text,
    ]


@pytest.mark.parametrize("kept", [False, True])
def test_an_answer_that_fails_is_named_and_with_a_cache_the_others_are_kept(
    sdar: SpiffyLM, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    doomed, *others = [request(f"{PROMPT} {k}", k, max_gen_toks=8) for k in range(4)]
    error = SpiffyError("computed NaN")
    fail_while_decoding(monkeypatch, sdar.loaded.model, doomed.args[0], error, raw=True)
    cached: dict[str, str] = {}
    hook = CacheHook(None)
    hook.dbdict = cached if kept else None
    monkeypatch.setattr(sdar, "cache_hook", hook)
    with pytest.raises(SpiffyError, match=r"^task, document 0: computed NaN$"):
        sdar.generate_until([doomed, *others], disable_tqdm=True)
    assert len(cached) == 3 * kept


def test_what_is_sampled_depends_on_the_request_not_on_those_beside_it(sdar: SpiffyLM) -> None:
    drawn = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 8}
    first, second = (request(PROMPT, number, **drawn) for number in (0, 1))
    answers = sdar.generate_until([first, first, second, second], disable_tqdm=True)
    assert len({*answers}) == 4  # the harness repeats a request as it is
    assert sdar.generate_until([second], disable_tqdm=True) == [answers[2]]
    other = Instance("generate_until", {}, first.args, 0, ("other", 0, 1))
    again = sdar.generate_until([second, other, first], disable_tqdm=True)
    assert [again[0], again[2]] == [answers[2], answers[0]]
    assert again[1] not in answers


def test_room_is_whole_blocks_and_answers_are_no_longer_than_asked() -> None:
    for options, room in (({}, 32), ({"gen_length": 16}, 16)):
        model = SpiffyLM("tiny-llada", device="cpu", block_length=16, tokens_per_step=4, **options)
        (answer,) = model.generate_until([request(PROMPT, max_gen_toks=20)], disable_tqdm=True)
        same = {"block_length": 16, "tokens_per_step": 4, "gen_length": room, "raw": True}
        full = generate(model.loaded.model, PROMPT, **same)  # type: ignore[arg-type]
        assert answer == model.loaded.model.decode_text(full.token_ids[:20])
        assert model.counts["task"].tokens == min(20, len(full.token_ids))


@pytest.mark.parametrize(
    "kwargs", [{"min_p": 0.1, "do_sample": True, "temperature": 1.0}, {"num_beams": 4}]
)
def test_generation_arguments_that_mean_nothing_here_are_refused(
    sdar: SpiffyLM, kwargs: dict[str, object]
) -> None:
    name = next(iter(kwargs))
    with pytest.raises(SpiffyError, match=rf"task: generation argument {name}=.* means nothing"):
        sdar.generate_until([request(PROMPT, **kwargs)], disable_tqdm=True)


def test_a_prompt_that_is_too_long_is_named_before_anything_is_decoded(sdar: SpiffyLM) -> None:
    requests = [request(PROMPT), request("long " * 2000, 7)]
    before = dict(sdar.counts)
    with pytest.raises(SpiffyError, match="task, document 7: prompt of "):
        sdar.generate_until(requests, disable_tqdm=True)
    assert sdar.counts == before


def test_what_the_harness_has_cached_is_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(f"{PROMPT} {k}", k, max_gen_toks=8) for k in range(3)]
    expected = SpiffyLM("tiny-sdar", device="cpu").generate_until(requests, disable_tqdm=True)
    model = SpiffyLM("tiny-sdar", device="cpu")
    from spiffy.integrations.lm_eval import Counts

    def interrupted(self: Counts, output: object) -> None:
        if self.answers:
            raise KeyboardInterrupt
        self.answers += 1

    with monkeypatch.context() as patch:
        patch.setattr(Counts, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            CachingLM(model, str(tmp_path / "cache.db")).generate_until(requests)
    again = SpiffyLM("tiny-sdar", device="cpu")
    assert CachingLM(again, str(tmp_path / "cache.db")).generate_until(requests) == expected
    assert again.counts["task"].answers == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size auto: give a number"),
        ({"batch_size": 0}, "batch_size 0: give a number"),
        ({"verify_share": 0.1}, "give graph=FILE"),
        ({"verify_share": 2, "graph": "x.json"}, "verify_share 2: give a number from 0 to 1"),
        ({"likelihood_samples": 0}, "likelihood_samples 0: give a number from 1"),
        ({"temperature": 1.0}, "--gen_kwargs"),
        ({"top_p": 0.9}, "--gen_kwargs"),
        ({"system": "x"}, "--system_instruction"),
        ({"trust_remote_code": True}, "no code of a checkpoint is run"),
        ({"any_model": "maybe"}, "any_model 'maybe': give True or False"),
        ({"seed": 1.5}, "seed 1.5: give a whole number"),
        ({"graph": ""}, "a graph of no name"),
        ({"budget": 4}, "budget 4 counts drafts: give a graph"),
        ({"block": 4}, "block: "),
        ({"graph": "none.json"}, "none.json: no such file"),
        ({"pretrained": None}, "name a model, or give a graph"),
        ({"policy": None}, "model argument policy: None is no value of it: drop it"),
        ({"steps_per_block": None}, "model argument steps_per_block: None is no value"),
        ({"budget": None}, "model argument budget: None is no value"),
        ({"blok": None}, "model argument blok: None is no value"),
    ],
)
def test_wrong_model_arguments_are_refused_in_one_line(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpiffyError) as refused:
        SpiffyLM(**{"pretrained": "tiny-sdar", "device": "cpu", **options})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_cache_of_none_is_what_the_harness_takes_for_nothing(tmp_path: Path) -> None:
    """`lm_eval.simple_evaluate(model_args="graph=...,cache=none")` hands None over."""
    chain_graph("tiny-llada", 2, gen_length=32, cache="dual").save(tmp_path / "graph.json")
    words = f"graph={tmp_path / 'graph.json'}"
    absent = "revision=none,adapter=none,quantize=none,device_map=none,gen_length=none"
    for given, cache in ((words, "dual"), (f"{words},cache=none,{absent}", "none")):
        model = SpiffyLM.create_from_arg_string(given, {"device": "cpu", "batch_size": 1})
        assert model.loaded.settings.cache == cache


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpiffyError, match="several ranks: start one process"):
        SpiffyLM("tiny-sdar")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "spiffy", "--tasks", "none"), "lm-evaluation-harness: Tasks not found: none"),
        (("--verify-share", "11", "--tasks", "x"), "--verify-share '11': give a share"),
        (("--tasks", "x", "--verify-share"), "--verify-share '': give a share"),
    ],
)
def test_wrong_commands_end_in_one_line(
    evaluate: Evaluate, arguments: tuple[str, ...], message: str
) -> None:
    code, _, log = evaluate(*arguments)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"{{question}}"', '"{{ 1 / 0 }}"', "ZeroDivisionError: division by zero"),
        ("task: problems", "task: [", "ParserError: while parsing"),
    ],
)
def test_what_a_task_does_wrong_is_one_line(
    evaluate: Evaluate, task: Path, tmp_path: Path, before: str, after: str, said: str
) -> None:
    text = task.read_text()
    assert before in text
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace(before, after))
    code, _, log = evaluate("--model", "dummy", "--tasks", wrong, "--limit", 1)
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert error.startswith(f"error: lm-evaluation-harness: {said}")


def test_faults_of_our_own_code_keep_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours() -> None:
        raise KeyError("a fault")

    monkeypatch.setitem(ours.__globals__, "__name__", "spiffy.somewhere")
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", ours)
    with pytest.raises(KeyError):
        run_harness()


def test_an_interruption_is_no_traceback(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("spiffy.integrations.lm_eval.run_harness", interrupted)
    code, _, log = evaluate("--model", "dummy", "--tasks", "none")
    assert (code, log) == (130, "interrupted: with --use_cache the same command goes on\n")


@pytest.mark.parametrize("way", ["--output_path=", "-o", "--output_path", "--config"])
@pytest.mark.parametrize("name", ["x", "x/results.json"])
def test_a_place_that_results_cannot_be_saved_to_is_refused_before_anything_is_loaded(
    evaluate: Evaluate, tmp_path: Path, way: str, name: str
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / name
    words: list[object] = [way, place]
    if way == "--config":
        (tmp_path / "config.yaml").write_text(f"model: spiffy\noutput_path: {place}\n")
        words = [way, tmp_path / "config.yaml"]
    elif way.endswith("="):
        words = [f"{way}{place}"]
    code, printed, log = evaluate("--model", "spiffy", "--tasks", "absent", *words)
    folder = tmp_path / "file" / "x"
    assert (code, printed) == (2, "")
    assert log == f"error: {folder}: {tmp_path / 'file'} is no folder\n"


def test_results_that_cannot_be_saved_and_answers_that_are_not_verified_are_told(
    evaluate: Evaluate, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "check_folder", lambda _: None)  # it was there at the start
    chain_graph("tiny-sdar", 2, gen_length=8).save(tmp_path / "graph.json")
    words = ["--model", "spiffy", "--tasks", task, "--device", "cpu", "--limit", 1]
    words += ["--model_args", f"graph={tmp_path / 'graph.json'},budget=2,gen_length=8"]
    words += ["--use_cache", tmp_path / "cache"]
    (tmp_path / "file").touch()
    code, printed, log = evaluate(*words, "--output_path", tmp_path / "file" / "x")
    assert (code, "what decoding took" in printed) == (2, True)
    assert "Could not save results aggregated: see --output_path" in log.splitlines()[-1]
    code, _, log = evaluate(*words, "--verify-share", 1)
    assert code == 0
    assert "nothing was verified, as no answer was decoded" in log


def test_what_is_not_saved_is_heard_whatever_the_harness_is_to_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = logging.getLogger("lm_eval.loggers.evaluation_tracker")
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    above, printed = logging.getLogger("lm_eval").level, []
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())  # type: ignore[method-assign]

    def quiet() -> None:  # as with LMEVAL_LOG_LEVEL=ERROR
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        ours.warning("Could not save sample results")
        ours.info("else")
        ours.error("loud")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", quiet)
    logging.getLogger("lm_eval").addHandler(handler)
    try:
        assert run_harness() == ["Could not save sample results"]
    finally:
        logging.getLogger("lm_eval").removeHandler(handler)
        logging.getLogger("lm_eval").setLevel(above)
    assert printed == ["loud"]
    assert (ours.level, ours.filters) == (logging.NOTSET, [])


def test_a_missing_harness_is_named_with_the_line_for_pip(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lm_eval", "lm_eval.model"):
        monkeypatch.delitem(sys.modules, f"spiffy.integrations.{module}")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    code, printed, log = evaluate("--model", "spiffy", "--tasks", "x")
    assert (code, printed) == (2, "")
    assert log == (
        "error: lm-evaluation-harness is not installed: pip install 'spiffy-dllm[lm-eval]'\n"
    )


def test_help_and_version(evaluate: Evaluate) -> None:
    code, printed, _ = evaluate("--help")
    assert code == 0
    assert "--verify-share" in printed
    assert "lm-eval" in printed.split("the harness's own help")[1]
    code, printed, _ = evaluate("--version")
    assert (code, printed.startswith("spiffy-dllm 0.")) == (0, True)


# ---------------------------------------------------------------- likelihoods


def by_the_paper(
    model: Any, context: list[int], continuation: list[int], draws: int, seed: int
) -> torch.Tensor:
    """Algorithm 3 of LLaDA's paper to the letter: float64 [draws], one estimate each."""
    generator = torch.Generator().manual_seed(seed)
    length, found = len(continuation), []
    for _ in range(draws):
        masked = int(torch.randint(1, length + 1, (1,), generator=generator))
        places = torch.randperm(length, generator=generator)[:masked]
        noised = torch.tensor([context + continuation])
        noised[0, len(context) + places] = model.mask_token_id
        p = torch.softmax(model.forward_logits(noised)[0].double(), dim=-1)
        logs = [torch.log(p[len(context) + k, continuation[k]]) for k in places.tolist()]
        found.append(sum(logs) * length / masked)
    return torch.stack(found)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llada-a", "dream-a"])
def test_a_likelihood_is_the_papers_estimate(name: str) -> None:
    model = parity_model(name, "float64")
    context, continuation = random_prompt(model, 4).tolist(), random_prompt(model, 3, 1).tolist()
    literal = by_the_paper(model, context, continuation, 150, 0)
    exact = log_likelihood(model, context, continuation)  # of all 7 sets of positions
    error = float(literal.std()) / math.sqrt(len(literal))
    assert abs(exact - float(literal.mean())) < 4 * error
    assert error < 0.03 * abs(exact)
    # Fewer samples than sets: drawn, and right on average.
    drawn = [log_likelihood(model, context, continuation, 3, 2, seed) for seed in range(40)]
    spread = torch.tensor(drawn, dtype=torch.float64)
    assert spread.std() > 0
    assert abs(exact - float(spread.mean())) < 4 * float(spread.std()) / math.sqrt(40)


def test_the_likelihood_of_one_token_is_its_probability() -> None:
    model = parity_model("llada-a", "float64")
    context = random_prompt(model, 5).tolist()
    ids = torch.tensor([[*context, model.mask_token_id]])
    log_p = model.forward_logits(ids)[0, -1].double().log_softmax(-1)
    assert log_likelihood(model, context, [7]) == pytest.approx(float(log_p[7]))
    log_p[model.mask_token_id] = -math.inf  # never an answer
    best = int(log_p.argmax())
    assert is_greedy(model, context, [best])
    assert not is_greedy(model, context, [best ^ 1])


def test_the_harness_chooses_by_likelihood() -> None:
    model = SpiffyLM("tiny-llada", device="cpu", batch_size=8)
    context = f"<|user|>{PROMPT}<|assistant|>That makes 3+4=<<3+4=7>>"
    requests = [
        Instance("loglikelihood", {}, (context, str(choice)), 0, ("task", 0, 1))
        for choice in range(10)
    ]
    found = model.loglikelihood(requests, disable_tqdm=True)
    assert max(found)[0] == found[7][0] < 0
    assert [greedy for _, greedy in found] == [choice == 7 for choice in range(10)]


def test_a_likelihood_that_does_not_fit_is_named_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SpiffyLM("tiny-llada", device="cpu")
    requests = [
        Instance("loglikelihood", {}, (context, " 7"), 0, ("task", number, 1))
        for number, context in enumerate((PROMPT, "", "long " * 2000))
    ]
    computed: list[object] = []
    monkeypatch.setattr("spiffy.integrations.likelihood.log_likelihood", computed.append)
    said = r"task, document 2: context and continuation of \d+ tokens exceed the \d+ positions"
    with pytest.raises(SpiffyError, match=said):
        model.loglikelihood(requests, disable_tqdm=True)
    assert not computed


def test_likelihoods_that_are_none_are_refused(sdar: SpiffyLM) -> None:
    requests = [Instance("loglikelihood", {}, ("a", " b"), 0, ("task", 0, 1))]
    with pytest.raises(SpiffyError, match=r"block-causal families \(sdar\) are not supported"):
        sdar.loglikelihood(requests, disable_tqdm=True)
    with pytest.raises(SpiffyError, match="likelihoods of whole texts"):
        sdar.loglikelihood_rolling(requests)
