"""The server answers real clients with plain decoding's tokens, and outlives what they do."""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h11
import openai
import pytest
import torch
from helpers import of_another_model

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.cli import serve as command
from spiffy.integrations.serve import app as serving
from spiffy.integrations.serve import events, listen, warm_up
from spiffy.integrations.serve.app import Access, build
from spiffy.integrations.serve.engine import (
    BusyError,
    Done,
    Engine,
    Event,
    Failed,
    Job,
    Limits,
    StoppedError,
)
from spiffy.integrations.serve.listen import BoundedProtocol, Server, Sockets, address_of, bind
from spiffy.runtime import ALIASES, DiffusionLM, decoding_settings, generate, load_model
from spiffy.runtime.budget.auto import AutoBudget
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.generate import Output
from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.errors import PolicyError

QUESTION = "Lily has 9 old pens and buys 2 new pens. How many pens are there now?"
PROMPTS = [QUESTION, *load_prompts("synthetic", 4, split="test").texts]
LENGTH = 32
SECONDS = 30  # after which something is stuck


@cache
def model() -> DiffusionLM:
    return load_model("tiny-sdar", device="cpu", dtype="float32")


@cache
def settings() -> DecodingSettings:
    return decoding_settings(model(), gen_length=LENGTH)


@cache
def graph() -> DraftGraph:
    prompts = load_prompts("synthetic", 4)
    traces = record(model(), prepare(model(), prompts, settings()))
    return build_graph(model(), prompts, settings(), traces, budget=8)


@cache
def plainly(prompt: str = QUESTION, **options: Any) -> Output:
    """Plain decoding, alone."""
    return generate(model(), prompt, **{"gen_length": LENGTH, **options})


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---------------------------------------------------------------- the engine, without HTTP


@contextmanager
def running(**limits: Any) -> Iterator[Engine]:
    engine = Engine(model(), settings(), graph(), budget=4, limits=Limits(**limits))
    engine.start()
    yield engine
    engine.stop()


def submit(engine: Engine, prompt: str = QUESTION, **options: Any) -> tuple[Job, Callable[[], Any]]:
    """A job, and what gives its last event."""
    events: queue.Queue[Event] = queue.Queue()
    job = Job(engine.task(prompt, **options), events.put)
    engine.submit([job])
    return job, lambda: events.get(timeout=SECONDS)


def test_answers_that_share_forwards_are_those_of_plain_decoding_alone() -> None:
    with running(batch=4) as engine:
        ends = [submit(engine, prompt)[1] for prompt in PROMPTS]
        for prompt, end in zip(PROMPTS, ends, strict=True):
            done = end()
            assert isinstance(done, Done)
            assert (done.ids, done.text) == (plainly(prompt).token_ids, plainly(prompt).text)
        shared = engine.metrics.registry.get_sample_value("spiffy_forwards_total")
        alone = engine.metrics.registry.get_sample_value("spiffy_nfe_total")
        assert shared is not None
        assert alone is not None
        assert shared < alone


def test_an_answer_has_its_own_length_and_temperature() -> None:
    with running() as engine:
        for length in (1, 5, 8, 19):
            done = submit(engine, max_tokens=length)[1]()
            assert done.ids == plainly(gen_length=length).token_ids
            assert (len(done.ids), done.reason) == (length, "length")
        filters = {"top_k": 3, "top_p": 0.9}
        done = submit(engine, temperature=2.0, filters=filters, seed=3)[1]()
        assert done.ids == plainly(temperature=2.0, **filters, seed=3).token_ids
        done = submit(engine, filters=filters)[1]()
        assert done.ids == plainly().token_ids
        done = submit(engine, temperature=2.0, seed=3, sequence=0)[1]()
        assert done.ids == plainly(temperature=2.0, seed=3, sequence=0).token_ids
        assert done.ids != plainly().token_ids
        done = submit(engine, stop="=<<")[1]()
        assert (done.text, done.reason) == (plainly(stop="=<<").text, "stop")


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_whole_blocks_are_decoded_and_answers_are_cut(cache: Any) -> None:
    lm = load_model("tiny-llada", device="cpu", dtype="float32")
    engine = Engine(lm, decoding_settings(lm, gen_length=32, block_length=8, cache=cache))
    engine.start()
    done = submit(engine, max_tokens=13)[1]()
    engine.stop()
    whole = generate(lm, QUESTION, gen_length=16, block_length=8, cache=cache)
    assert done.ids == whole.token_ids[:13]
    assert len(done.job.task.path[-1].ids) == len(done.job.task.prompt) + 16


def test_without_a_length_there_is_as_much_room_as_there_is() -> None:
    engine = Engine(model(), settings())
    for prompt in (20, 460, 470, 503):
        task = engine.task([5] * prompt)
        assert task.canvas.length <= 512
        assert task.canvas.length > min(512, prompt + LENGTH) - 8
        assert task.canvas.gen_length <= LENGTH
    with pytest.raises(SpiffyError, match="more than the 512 of tiny-sdar"):
        engine.task([5] * 512)
    with pytest.raises(SpiffyError, match="more than the 512 of tiny-sdar"):
        engine.task("x", max_tokens=513)


def test_temperatures_are_no_reason_to_learn_anew_how_many_drafts_pay() -> None:
    engine = Engine(model(), settings(), graph())
    of = {t: engine.task(QUESTION, temperature=t).adviser for t in (0.0, 0.3, 0.9, None)}
    assert of[0.0] is not None
    assert all(adviser is of[0.0] for adviser in of.values())
    assert engine.task(QUESTION, temperature=0.3).settings.temperature == 0.3
    filtered = engine.task(QUESTION, temperature=0.3, filters={"top_p": 0.9})
    assert (filtered.settings.top_p, filtered.adviser) == (0.9, of[0.0])
    assert engine.task(QUESTION, drafts=False).adviser is None


def test_the_temperature_is_the_servers_unless_a_request_names_one() -> None:
    engine = Engine(model(), settings().model_copy(update={"temperature": 0.7}))
    for asked, expected in ((None, 0.7), (0.0, 0.0), (0.3, 0.3)):
        assert engine.task(QUESTION, temperature=asked).settings.temperature == expected
    engine = Engine(model(), settings().changed(temperature=0.7, top_k=20, top_p=0.9))
    for temperature, filters, sampling in (
        (None, {}, "temperature 0.7, top_k 20, top_p 0.9"),
        (0.0, {"top_p": 0.5}, "temperature 0"),
        (0.3, {"top_k": None, "top_p": 1.0}, "temperature 0.3"),
        (None, {"top_p": 0.5}, "temperature 0.7, top_k 20, top_p 0.5"),
    ):
        task = engine.task(QUESTION, temperature=temperature, filters=filters)
        assert task.settings.sampling == sampling


@pytest.mark.parametrize("watch", [False, True])
def test_no_states_are_kept_of_what_has_been_told(watch: bool) -> None:
    """Those of a long answer take gigabytes."""
    events: queue.Queue[Event] = queue.Queue()
    with running() as engine:
        job = Job(engine.task(QUESTION), events.put, stream=True, watch=watch)
        engine.submit([job])
        while not isinstance(events.get(timeout=SECONDS), Done):
            pass
    assert len(job.task.path) == 1 < job.task.stats.steps


def test_what_is_given_up_leaves_and_what_is_too_much_is_refused() -> None:
    with running(batch=1, waiting=1) as engine:
        first, _ = submit(engine)
        second, end = submit(engine)
        engine._seconds = 3.0  # that one took of late
        with pytest.raises(BusyError) as refused:
            engine.submit([Job(engine.task(QUESTION), print)])
        assert refused.value.seconds == 6  # two are before it
        engine.cancel([first, first])
        assert isinstance(end(), Done)
        engine.cancel([second])  # has ended: no matter
        done = submit(engine)[1]()
        assert isinstance(done, Done)
        assert first.task.stats.steps < plainly().stats.steps
        nfe = sum(job.task.stats.nfe for job in (first, second, done.job))
        wait_until(lambda: engine.metrics.nfe._value.get() == nfe)


def test_what_a_job_takes_begins_when_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(batch=1, waiting=1) as engine:
        with held(monkeypatch) as go_on:
            jobs = [submit(engine) for _ in range(2)]
            wait_until(lambda: engine._scheduler.running != [])
            released = time.monotonic()
            go_on.set()
        assert all(isinstance(end(), Done) for _, end in jobs)
    first, second = (job.joined for job, _ in jobs)
    assert first is not None
    assert second is not None
    assert first < released < second


def test_a_forward_that_fails_is_the_end_of_those_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from spiffy.runtime.decode import driver

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes differ")

    with running(verify_share=1.0) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(driver, "forward", broken)
            failed = submit(engine)[1]()
        assert isinstance(failed, Failed)
        assert str(failed.error) == "shapes differ"
        assert isinstance(submit(engine)[1](), Done)


def test_jobs_that_are_left_when_it_stops_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model(), settings())
    with held(monkeypatch) as go_on:
        _, end = submit(engine)
        engine.start()
        wait_until(lambda: engine._scheduler.running != [])
        threading.Timer(0.1, go_on.set).start()
        engine.stop()
    failed = end()
    assert isinstance(failed, Failed)
    assert str(failed.error) == "the server is stopping"
    assert not engine.alive
    with pytest.raises(StoppedError):
        submit(engine)


def test_text_that_cannot_be_told_is_the_end_of_that_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running() as engine:
        for broken in ("before_stop", "decode"):
            with monkeypatch.context() as patch:

                def fails(*_: Any, **__: Any) -> Any:
                    raise ValueError("no text")

                patch.setattr(model().codec, broken, fails)
                events: queue.Queue[Event] = queue.Queue()
                job = Job(engine.task(QUESTION, stop="#"), events.put, stream=True)
                engine.submit([job])
                failed = events.get(timeout=SECONDS)
            assert isinstance(failed, Failed)
            assert str(failed.error) == "no text"
        assert isinstance(submit(engine)[1](), Done)


def test_a_folder_is_served_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    shutil.copytree(ALIASES["tiny-sdar"], folder)
    lm = load_model(str(folder), device="cpu")
    assert Engine(lm, settings()).name == "my-model"
    monkeypatch.chdir(folder)
    assert Engine(load_model(".", device="cpu"), settings()).name == "my-model"
    assert Engine(model(), settings()).name == "tiny-sdar"
    link, snapshot = tmp_path / "link", tmp_path / "models--some--model" / "snapshots" / "0a1b"
    link.symlink_to(folder)
    shutil.copytree(folder, snapshot)
    for place, name in ((link, "link"), (snapshot, "some/model")):
        assert Engine(load_model(str(place), device="cpu"), settings()).name == name


def test_answers_are_compared_with_plain_decoding_when_idle() -> None:
    with running(verify_share=1.0) as engine:
        verified = engine.metrics.verified
        ends = [submit(engine, prompt, temperature=0.7)[1] for prompt in PROMPTS[:2]]
        for end in ends:
            end()
        wait_until(lambda: verified.labels("same")._value.get() == 2)
        submit(engine, PROMPTS[2], drafts=False)[1]()  # plain already: nothing to compare
        done = submit(engine, PROMPTS[2])[1]
        engine._keep_to_check(done()._replace(ids=[1, 2]))  # what no decode gives
        wait_until(lambda: verified.labels("different")._value.get() == 1)
        wait_until(lambda: verified.labels("same")._value.get() == 3)
        assert verified.labels("failed")._value.get() == 0


def test_of_answers_to_compare_64_wait_and_more_are_skipped() -> None:
    with running() as engine:
        done = submit(engine, max_tokens=4)[1]()
    for _ in range(66):  # none is taken any more
        engine._keep_to_check(done)
    assert engine.metrics.verified.labels("skipped")._value.get() == 2
    assert len(engine._unchecked) == 64


# ---------------------------------------------------------------- before the first request


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[DraftGraph]:
    """Graphs whose costs a warm-up measured; it takes little time."""
    found: list[DraftGraph] = []
    monkeypatch.setattr(warm_up, "auto_profile", lambda _, graph: found.append(graph))
    for name in ("_PLAIN_SECONDS", "_DRAFTING_SECONDS"):
        monkeypatch.setattr(warm_up, name, 0.05)
    monkeypatch.setattr(warm_up, "_LEAST", 8)  # forwards, however slow the machine is
    return found


def test_a_warm_up_decodes_plainly_and_learns_what_drafts_cost(
    measured: list[DraftGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model(), settings(), graph().model_copy())
    ways: list[bool] = []

    def noting(lm: DiffusionLM, tasks: list[Task]) -> Iterator[list[Task]]:
        ways.append(tasks[0].adviser is not None)
        return run(lm, tasks)

    monkeypatch.setattr(warm_up, "run", noting)
    warm_up.warm_up(engine, QUESTION)
    assert ways[:2] == [False, True]
    assert all(ways[1:])
    assert measured == [engine.graph]
    adviser = engine.task(QUESTION).adviser
    assert isinstance(adviser, AutoBudget)  # of the answers to come
    assert sum(each.forwards for each in adviser.shared.by_batch.values()) > 1
    assert engine.metrics.registry.get_sample_value("spiffy_forwards_total") == 0
    engine.start()
    assert submit(engine)[1]().ids == plainly().token_ids
    engine.stop()


@pytest.mark.parametrize(
    ("options", "slow"),
    [({"graph": None}, False), ({"budget": 4}, False), ({}, True)],
    ids=["plain", "fixed", "slow"],
)
def test_costs_are_measured_only_for_auto_and_where_it_is_quick(
    measured: list[DraftGraph],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    slow: bool,
) -> None:
    if slow:
        monkeypatch.setattr(warm_up, "_MEASURABLE_SECONDS", 0.0)
    warm_up.warm_up(Engine(model(), settings(), **{"graph": graph(), **options}), QUESTION)
    assert not measured


def raising(error: Exception) -> Callable[..., Any]:
    def act(*_: Any) -> Any:
        raise error

    return act


def test_a_prompt_that_cannot_be_decoded_is_no_reason_not_to_serve(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up.warm_up(Engine(model(), settings()), "")
    short = Engine(model(), settings())
    monkeypatch.setattr(model(), "hidden_states", raising(torch.OutOfMemoryError("out of memory")))
    warm_up.warm_up(short, QUESTION)
    assert [record.message for record in caplog.records] == [
        "warming up: the prompt is empty: give it at least one word",
        "warming up: a forward without drafts does not fit into memory",
    ]


def test_a_policy_that_fails_keeps_the_server_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every request would fail of it."""
    monkeypatch.setattr(model(), "hidden_states", raising(PolicyError("policy mine:rule: no")))
    with pytest.raises(PolicyError, match="policy mine:rule: no"):
        warm_up.warm_up(Engine(model(), settings()), QUESTION)


# ---------------------------------------------------------------- over HTTP


@dataclass
class Here:
    """A server in a thread."""

    engine: Engine
    address: str
    server: Server

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=SECONDS)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Any, bytes]:
        connection = self.connect()
        sent = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, response.headers, content

    def sample(self, name: str, **labels: str) -> float:
        return self.engine.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def served(engine: Engine, access: Access, sockets: Sockets) -> Iterator[Here]:
    sock = bind("127.0.0.1", 0)
    begun = threading.Event()
    server = Server(build(engine, access), engine, sockets, begun.set)
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
    thread.start()
    assert begun.wait(SECONDS)
    yield Here(engine, address_of(sock), server)
    server.should_exit = True
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert not engine.alive


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    engine = Engine(model(), settings(), graph(), budget=4)
    with served(engine, Access(), Sockets()) as found:
        yield found


@pytest.fixture(scope="module")
def narrow() -> Iterator[Here]:
    """One answer at a time, a key, small bodies, few connections."""
    engine = Engine(model(), settings(), limits=Limits(batch=1, waiting=0))
    with served(engine, Access("sesame", body_bytes=1000), Sockets(connections=16)) as found:
        yield found


def message(text: str = QUESTION) -> Any:
    return [{"role": "user", "content": text}]


def body(**changes: Any) -> bytes:
    return json.dumps({"messages": message(), "max_tokens": LENGTH} | changes).encode()


def test_chat_answers_and_counts(here: Here) -> None:
    answer = here.client().chat.completions.create(
        model="tiny-sdar", messages=message(), max_tokens=LENGTH
    )
    plain = plainly()
    choice = answer.choices[0]
    assert choice.message.content == plain.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(plain.token_ids)
    prompt = len(model().encode(QUESTION))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (
        prompt,
        prompt + len(plain.token_ids),
    )
    assert answer.model_extra is not None
    costs = answer.model_extra["spiffy"]
    assert costs["nfe"] + costs["accepted"] == plain.stats.nfe
    assert 0 < costs["accepted"] <= costs["drafts"]
    assert costs["steps"] == plain.stats.steps


def test_a_stream_comes_block_by_block(here: Here) -> None:
    stream = here.client().chat.completions.create(
        model="tiny-sdar",
        messages=message(),
        max_completion_tokens=LENGTH,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    pieces = [text for text in texts if text]
    assert "".join(pieces) == plainly().text
    assert len(pieces) >= 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(plainly().token_ids)


def test_several_answers_have_noise_of_their_own(here: Here) -> None:
    answer = here.client().chat.completions.create(
        model="tiny-sdar", messages=message(), max_tokens=LENGTH, n=3, temperature=1.0, seed=5
    )
    expected = [plainly(temperature=1.0, seed=5, sequence=k).text for k in range(3)]
    filtered = json.loads(
        here.ask(
            "POST",
            "/v1/chat/completions",
            body(max_tokens=LENGTH, temperature=1.0, seed=5, top_p=0.3, top_k=4),
        )[2]
    )
    assert (
        filtered["choices"][0]["message"]["content"]
        == plainly(temperature=1.0, seed=5, top_p=0.3, top_k=4).text
    )
    assert [choice.message.content for choice in answer.choices] == expected
    unsure = [300, 7, 41, 99, 5]  # behind which nothing is likely
    unseeded = [
        here.client()
        .completions.create(model="tiny-sdar", prompt=unsure, max_tokens=LENGTH, temperature=2.0)
        .choices[0]
        .text
        for _ in range(3)
    ]
    assert len(set(unseeded)) > 1


def test_completions_go_on_with_text_or_ids_as_they_are(here: Here) -> None:
    client, start = here.client(), "Together that is 9+2=<<"
    ids = model().encode(start, raw=True).tolist()
    expected = plainly(start, raw=True, gen_length=12)
    for prompt in (start, [start, start], ids, [ids]):
        answer = client.completions.create(model="tiny-sdar", prompt=prompt, max_tokens=12)
        assert {choice.text for choice in answer.choices} == {expected.text}
        many = len(answer.choices)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == many * len(ids)
    drawn = {"max_tokens": 12, "temperature": 2.0, "seed": 5}
    answer = client.completions.create(model="tiny-sdar", prompt=[start] * 3, **drawn)
    assert [choice.text for choice in answer.choices] == [
        plainly(start, raw=True, gen_length=12, temperature=2.0, seed=5, sequence=k).text
        for k in range(3)
    ]
    stream = client.completions.create(
        model="tiny-sdar", prompt=start, max_tokens=12, stream=True, stop="11"
    )
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == plainly(start, raw=True, gen_length=12, stop="11").text


def test_models_health_metrics_and_a_page(here: Here) -> None:
    assert [card.id for card in here.client().models.list()] == ["tiny-sdar"]
    assert here.client().models.retrieve("tiny-sdar").id == "tiny-sdar"
    assert json.loads(here.ask("GET", "/health")[2]) == {"status": "ok"}
    last = "spiffy_last_forward_timestamp_seconds"
    assert time.time() - 3600 < here.sample(last) <= time.time()
    assert b"spiffy_forwards_total" in here.ask("GET", "/metrics")[2]
    status, headers, page = here.ask("GET", "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert b"/v1/chat/completions" in page


REFUSED = {
    "malformed": (b'{"messages": [', 400, None),
    "not an object": (b"[1]", 400, None),
    "not a number": (b'{"messages": [], "temperature": NaN}', 400, None),
    "invalid UTF-8": (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, None),
    "half a character": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
    "deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None),
    "unknown": (body(colour="red"), 400, "colour"),
    "unknown within": (body(messages=[{**message()[0], "x": 1}]), 400, "messages.0.x"),
    "tools": (body(tools=[{"type": "function"}]), 400, "tools"),
    "logprobs": (body(logprobs=True), 400, "logprobs"),
    "format": (body(response_format={"type": "json_object"}), 400, "response_format"),
    "bias": (body(logit_bias={"5": 1}), 400, "logit_bias"),
    "min_p": (body(min_p=0.1), 400, "min_p"),
    "top_p": (body(top_p=0), 400, "top_p"),
    "top_k": (body(top_k=-2), 400, "top_k"),
    "no messages": (body(messages=[]), 400, "messages"),
    "role": (body(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role"),
    "picture": (
        body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        400,
        "messages.0.content.0.type",
    ),
    "part": (
        body(messages=[{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]),
        400,
        "messages.0.content.0.x",
    ),
    "number": (body(messages=[{"role": "user", "content": 5}]), 400, "messages.0.content"),
    "an empty stop": (body(stop=["a", ""]), 400, "stop.1"),
    "stops": (body(stop=["a"] * 17), 400, "stop"),
    "nothing asked": (body(messages=message(" ")), 400, None),
    "no tokens": (body(max_tokens=0), 400, "max_tokens"),
    "a word": (body(max_tokens="5"), 400, "max_tokens"),
    "hot": (body(temperature=2.5), 400, "temperature"),
    "n": (body(n=0), 400, "n"),
    "empty stop": (body(stop=""), 400, "stop"),
    "too long": (body(max_tokens=100_000), 400, None),
    "another model": (body(model="gpt-4"), 404, "model"),
    "huge": (body(messages=message("a" * 10_000_000)), 413, None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_by_name(here: Here, case: str) -> None:
    content, expected, param = REFUSED[case]
    status, _, answer = here.ask("POST", "/v1/chat/completions", content)
    error = json.loads(answer)["error"]
    assert status == expected
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"].startswith(param)
        assert error["param"].split(".")[0] in error["message"]


def test_what_is_wrong_is_said_by_the_type_that_was_meant(here: Here) -> None:
    for content, expected in (
        (REFUSED["picture"][0], "messages.0.content.0.type: Input should be 'text'"),
        (REFUSED["part"][0], "unknown field: messages.0.content.0.x"),
        (REFUSED["stops"][0], "stop: List should have at most 16 items"),
        (REFUSED["an empty stop"][0], "stop.1: String should have at least 1 character"),
    ):
        answer = json.loads(here.ask("POST", "/v1/chat/completions", content)[2])
        assert answer["error"]["message"].startswith(expected)
    answer = json.loads(here.ask("POST", "/v1/chat/completions", REFUSED["too long"][0])[2])
    assert answer["error"]["code"] == "context_length_exceeded"
    answer = json.loads(here.ask("POST", "/v1/completions", b'{"prompt": [[]]}')[2])
    assert answer["error"]["message"].startswith("prompt.0: List should have at least 1 item")


def test_clients_see_refusals_as_what_they_are(here: Here) -> None:
    client = here.client()
    with pytest.raises(openai.BadRequestError, match="more than the 512") as long:
        client.chat.completions.create(model="tiny-sdar", messages=message("a b " * 400))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny-sdar'"):
        client.chat.completions.create(model="gpt-4", messages=message())
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="tiny-sdar", messages=message(), tools=[tool])
    assert here.ask("POST", "/v1/chat/completions", body(), Content_Type="text/plain")[0] == 415
    assert here.ask("GET", "/v1/chat/completions")[0] == 405
    assert json.loads(here.ask("GET", "/nothing")[2])["error"]["message"]


def test_fields_that_ask_for_nothing_are_taken(here: Here) -> None:
    neutral = body(
        top_p=1,
        top_k=-1,
        tools=None,
        logprobs=False,
        response_format={"type": "text"},
        user="me",
        seed=None,
    )
    assert here.ask("POST", "/v1/chat/completions", neutral)[0] == 200
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None},
        *message(),
    ]
    assert here.ask("POST", "/v1/chat/completions", body(messages=turns))[0] == 200


def test_a_key_is_asked_for_and_bodies_are_bounded(narrow: Here) -> None:
    for key in ("", "sesam", "sesame2", "\u00fc"):
        bearer = f"Bearer {key}".encode().decode("latin-1")
        status, headers, _ = narrow.ask(
            "POST", "/v1/chat/completions", body(), Authorization=bearer
        )
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        narrow.client("wrong").models.list()
    assert narrow.client("sesame").models.list()
    assert narrow.ask("GET", "/v1/models", Authorization="bearer  sesame")[0] == 200
    assert narrow.ask("GET", "/health")[0] == 200
    with pytest.raises(openai.APIStatusError, match="more than 1000 bytes") as refused:
        narrow.client("sesame").chat.completions.create(
            model="tiny-sdar", messages=message("x" * 1000)
        )
    assert refused.value.status_code == 413


def test_more_than_may_wait_is_told_to_come_later(
    narrow: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = narrow.client("sesame")
    with held(monkeypatch) as go_on:
        first = threading.Thread(
            target=client.chat.completions.create,
            kwargs={"model": "tiny-sdar", "messages": message()},
        )
        first.start()
        wait_until(lambda: narrow.sample("spiffy_running") == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="tiny-sdar", messages=message())
        assert int(refused.value.response.headers["retry-after"]) >= 1
        go_on.set()
        first.join(SECONDS)
    with pytest.raises(openai.BadRequestError, match="more than 1 answers"):
        client.chat.completions.create(model="tiny-sdar", messages=message(), n=2)
    assert client.chat.completions.create(model="tiny-sdar", messages=message()).choices


def test_who_has_an_answer_may_ask_again_at_once(narrow: Here) -> None:
    """Where there is room for one: its place is free before it is told."""
    ended: queue.Queue[Event] = queue.Queue()

    def ask_again(event: Event) -> None:
        narrow.engine.submit([Job(narrow.engine.task(QUESTION, max_tokens=4), ended.put)])
        ended.put(event)

    narrow.engine.submit([Job(narrow.engine.task(QUESTION, max_tokens=4), ask_again)])
    for _ in range(2):
        assert isinstance(ended.get(timeout=SECONDS), Done)


def test_more_connections_than_there_may_be_are_turned_away(narrow: Here) -> None:
    host, port = narrow.address.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=SECONDS) for _ in range(16)]

    def asked(path: str) -> tuple[int, Any, bytes]:
        return narrow.ask("GET", path, Authorization="Bearer sesame")

    wait_until(lambda: asked("/v1/models")[0] == 503)
    _, headers, content = asked("/v1/models")
    assert headers["Connection"] == "close"
    assert json.loads(content)["error"]["message"] == "more connections than 16: try again"
    assert narrow.sample("spiffy_requests_total", path="other", status="503") >= 1
    for path in ("/health", "/metrics"):  # the server is well
        status, headers, _ = asked(path)
        assert (status, headers["Connection"]) == (200, "close")
    idle.pop().close()
    wait_until(lambda: asked("/v1/models")[0] == 200)  # the sixteenth
    assert asked("/health")[1]["Connection"] is None
    for connection in idle:
        connection.close()


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Forwards wait until they may go on."""
    go_on, hidden_states = threading.Event(), model().hidden_states

    def waiting(*args: Any) -> Any:
        assert go_on.wait(SECONDS)
        return hidden_states(*args)

    with monkeypatch.context() as patch:
        patch.setattr(model(), "hidden_states", waiting)
        yield go_on
        go_on.set()


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_leave_the_forwards(
    here: Here, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = here.sample("spiffy_cancelled_total")
    answers = here.sample("spiffy_answers_total", result="decoded")
    labels = {"path": "/v1/chat/completions", "status": "499"}
    gone = here.sample("spiffy_requests_total", **labels)
    with held(monkeypatch) as go_on:
        connection = here.connect()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body(stream=stream, n=2), headers)
        wait_until(lambda: len(here.engine._scheduler.running) == 2)
        assert connection.sock is not None
        connection.sock.close()
        connection.close()
        wait_until(lambda: len(here.engine._left) == 2)  # told, though no forward has ended
        go_on.set()
        wait_until(lambda: here.sample("spiffy_running") == 0)
    assert here.sample("spiffy_cancelled_total") == before + 2
    assert here.sample("spiffy_answers_total", result="decoded") == answers
    # A stream that was begun is a 200.
    wait_until(lambda: here.sample("spiffy_requests_total", **labels) == gone + (not stream))


def test_a_model_that_computes_nan_fails_that_request(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, poisoned = model().head, True

    def overflowing(hidden: torch.Tensor) -> torch.Tensor:
        return head(hidden) * (torch.nan if poisoned else 1)

    monkeypatch.setattr(model(), "head", overflowing)
    with pytest.raises(openai.InternalServerError, match="NaN"):
        here.client().chat.completions.create(model="tiny-sdar", messages=message())
    with pytest.raises(openai.APIError, match="NaN"):
        list(
            here.client().chat.completions.create(
                model="tiny-sdar", messages=message(), stream=True
            )
        )
    scans = model().broken_weights.cache_info()  # type: ignore[attr-defined]
    assert (scans.misses, scans.hits) == (1, 1)  # weights do not change
    status, headers, _ = here.ask("POST", "/v1/chat/completions", body())
    assert (status, headers["x-should-retry"]) == (500, "false")  # it would be the same again
    poisoned = False
    answer = here.client().chat.completions.create(model="tiny-sdar", messages=message())
    assert answer.choices[0].message.content == plainly().text


def forwards_of(here: Here, **options: Any) -> list[Any]:
    content = json.dumps({"messages": message(), "max_tokens": LENGTH, **options}).encode()
    status, headers, answer = here.ask("POST", "/spiffy/decode", content)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.decode().split("\n\n")[:-1]]


@pytest.mark.parametrize("drafts", [True, False])
def test_a_decode_can_be_watched_forward_by_forward(here: Here, drafts: bool) -> None:
    start, *forwards, end = forwards_of(here, drafts=drafts)
    plain = plainly()
    assert (start["type"], end["type"]) == ("start", "end")
    assert (end["text"], end["tokens"]) == (plain.text, len(plain.token_ids))
    assert end["plain"] == plain.stats.nfe
    assert len(forwards) == end["nfe"] == plain.stats.nfe - end["accepted"]
    assert sum(len(event["steps"]) for event in forwards) == end["steps"] == plain.stats.steps
    drafted = [draft for event in forwards for draft in event["drafts"]]
    assert sum(draft["accepted"] for draft in drafted) == end["accepted"]
    assert bool(drafted) == drafts
    # What was committed, in order, is the answer.
    committed = {at: text for event in forwards for step in event["steps"] for at, text in step}
    first, stop = start["answer"]
    task = make_task(model(), QUESTION, settings())
    assert (first, stop) == (task.canvas.prompt_length, task.canvas.prompt_length + LENGTH)
    spelled = "".join(committed[at] for at in sorted(committed))
    assert spelled.startswith(plain.text)
    for event in forwards:
        shown = dict(zip(range(*event["span"]), event["tokens"], strict=True))
        assert all(shown.get(at) in (text, None) for at, text in committed.items() if at in shown)


def test_who_reads_nothing_is_cut_off(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "unread_seconds", 0.1)
    connections = here.server.server_state.connections
    before = len(connections)
    lines = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(here.address.rpartition(":")[2])))
        client.settimeout(SECONDS)
        with suppress(ConnectionError):  # cut off
            for _ in range(2000):  # a page each: more than the buffers between us hold
                client.sendall(lines)
        wait_until(lambda: len(connections) <= before)


def test_a_head_that_does_not_come_closes_the_connection(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 0.2)
    host, port = here.address.removeprefix("http://").split(":")
    whole, refused = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /n HTTP/1.1\r\nHost: x\r\n"
    body = b"Content-Length: 100\r\n\r\n{"  # is never read, as there is no such path
    for sent in (b"", whole[:-2], whole + b"GET", refused + body):
        with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
            connection.sendall(sent)
            while connection.recv(1000):  # ends: the server closes it
                pass


@pytest.mark.parametrize(("size", "status"), [(32 * 1024 - 4, b"200"), (32 * 1024 + 1, b"400")])
def test_a_head_may_have_32_kb_and_no_more(here: Here, size: int, status: bytes) -> None:
    host, port = here.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ".ljust(size, b"x"))
        mine = connection.getsockname()

        def is_read() -> bool:
            connections = [*here.server.server_state.connections]
            return [len(c.conn.trailing_data[0]) for c in connections if c.client == mine] == [size]

        if status == b"200":
            wait_until(is_read)
            connection.sendall(b"\r\n\r\n")
        assert connection.makefile("rb").readline().split()[1] == status


@pytest.mark.parametrize(
    ("size", "status"), [(30_000, b"200"), (40_000, b"400"), (200_000, b"400")]
)
def test_a_head_that_comes_at_once_may_not_have_more(here: Here, size: int, status: bytes) -> None:
    host, port = here.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: x\r\nX: ".ljust(size, b"x") + b"\r\n\r\n"
        )
        assert connection.makefile("rb").readline().split()[1] == status


def test_a_connection_whose_body_was_refused_is_idle_when_it_has_come(narrow: Here) -> None:
    connection = narrow.connect()
    connection.putrequest("POST", "/v1/chat/completions")  # without the key
    connection.putheader("Content-Length", "9")
    connection.endheaders()
    assert connection.getresponse().read()
    connection.send(b"too late!")
    mine = connection.sock.getsockname()

    def has_a_limit() -> bool:
        (one,) = (c for c in narrow.server.server_state.connections if c.client == mine)
        assert isinstance(one, BoundedProtocol)
        return one.conn.their_state is h11.IDLE and one.timeout_keep_alive_task is not None

    wait_until(has_a_limit)
    connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_BODY_SECONDS", 0.1)
    connection = here.connect()
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"messages"')
    assert connection.getresponse().status == 408
    connection.close()


def test_a_stream_that_has_nothing_to_say_stays_open(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_QUIET_SECONDS", 0.05)
    with held(monkeypatch) as go_on:
        threading.Timer(0.3, go_on.set).start()
        answer = here.ask("POST", "/v1/chat/completions", body(stream=True))[2]
    assert b": waiting\n\n" in answer
    assert answer.endswith(b"data: [DONE]\n\n")


def test_what_is_left_when_the_time_is_over_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[tuple[int, Any, bytes]] = []
    with (
        held(monkeypatch) as go_on,
        served(Engine(model(), settings()), Access(), Sockets(drain_seconds=0)) as found,
    ):
        client = threading.Thread(
            target=lambda: answers.append(found.ask("POST", "/v1/chat/completions", body()))
        )
        client.start()
        wait_until(lambda: found.sample("spiffy_running") == 1)
        found.server.should_exit = True
        wait_until(lambda: not found.engine.alive)
        go_on.set()
        client.join(SECONDS)
    (status, _, content) = answers[0]
    assert status == 503
    assert json.loads(content)["error"]["message"] == "the server is stopping"


def test_a_server_ends_with_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model(), settings())
    with served(engine, Access(), Sockets()) as found:

        def broken() -> bool:  # after the first forward
            raise ValueError("an error in the engine")

        monkeypatch.setattr(engine, "_take", broken)
        assert found.ask("POST", "/v1/chat/completions", body())[0] == 503
        wait_until(lambda: not engine.alive)
    assert found.server.failed


def test_errors_that_nobody_expected_are_counted(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("an error in this server")

    monkeypatch.setattr(events.Answers, "whole", broken)
    labels = {"path": "/v1/chat/completions", "status": "500"}
    before = here.sample("spiffy_requests_total", **labels)
    status, _, content = here.ask("POST", "/v1/chat/completions", body())
    assert (status, b"see its log" in content) == (500, True)
    wait_until(lambda: here.sample("spiffy_requests_total", **labels) == before + 1)


# ---------------------------------------------------------------- the command


def call(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spiffy-serve", *arguments])
        with pytest.raises(SystemExit) as stop:
            command.main()
    return int(stop.value.code or 0)


def noted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """What something of `listen` is given from here on, and what it gives."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    original = getattr(listen, name)

    def noting(*arguments: Any) -> Any:
        calls.append((arguments, original(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(listen, name, noting)
    return calls


def test_the_command_serves_and_drains_when_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: the signal comes from a thread, while a stream is being read."""
    printed: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(command, "write", printed.put)
    monkeypatch.setenv("SPIFFY_API_KEY", "sesame")
    other = of_another_model(graph())
    other.save(tmp_path / "graph.json")
    warmed: list[tuple[Engine, str, int]] = []

    def warming(engine: Engine, prompt: str) -> None:
        warmed.append((engine, prompt, printed.qsize()))
        assert threading.current_thread() is not threading.main_thread()

    monkeypatch.setattr(warm_up, "warm_up", warming)
    bound, made = noted(monkeypatch, "bind"), noted(monkeypatch, "Server")
    seen: list[Any] = []
    statuses: list[int] = []
    drawn: list[str | None] = []

    def ask() -> None:
        first, curl = printed.get(timeout=SECONDS).splitlines()
        address = first.rpartition(" ")[2]
        try:
            assert f"curl {address}/v1/chat/completions" in curl
            assert "sesame" not in curl
            found = Here(warmed[0][0], address, made[0][1])
            large, key = body(messages=message("x" * 2000)), {"Authorization": "Bearer sesame"}
            for content, headers in ((body(), {}), (large, key)):
                statuses.append(found.ask("POST", "/v1/chat/completions", content, **headers)[0])
            asked = {"model": "tiny-sdar", "messages": message(), "max_tokens": LENGTH}
            chat = found.client("sesame").chat.completions
            drawn.append(chat.create(**asked, temperature=2.0).choices[0].message.content)
            stream = iter(chat.create(**asked, stream=True))
            seen.append(next(stream))
            os.kill(os.getpid(), signal.SIGTERM)
            seen.extend(stream)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    code = call(
        *("--model", "tiny-sdar", "--device", "cpu", "--dtype", "float32", "--threads", "1"),
        *("--graph", str(tmp_path / "graph.json"), "--any-model", "--seed", "5", "--port", "0"),
        *("--max-batch", "2", "--max-waiting", "3", "--verify-share", "0.25"),
        *("--max-body", "1000", "--max-connections", "20", "--drain-seconds", "29"),
        *("--keep-alive", "31"),
    )
    asking.join(SECONDS)
    assert code == 0
    ((engine, *before),) = warmed
    assert before == [QUESTION, 0]  # before the address was printed
    assert (engine.graph, engine.is_auto) == (other, True)
    assert engine.limits == Limits(batch=2, waiting=3, verify_share=0.25)
    (((_, served_by, sockets, _), _),) = made
    assert (served_by, sockets) == (engine, Sockets(20, 29, 31))
    assert bound[0][0] == ("127.0.0.1", 0)
    assert statuses == [401, 413]
    seed = random.Random(5).getrandbits(32)  # the first of those that requests get
    assert drawn == [plainly(temperature=2.0, seed=seed).text] != [plainly().text]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in seen) == plainly().text
    assert seen[-1].choices[0].finish_reason == "stop"


def test_the_command_ends_with_its_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Engine) -> bool:
        raise ValueError("an error in the engine")

    monkeypatch.setattr(Engine, "_take", broken)
    monkeypatch.setattr(warm_up, "warm_up", lambda *_: None)
    monkeypatch.setattr(command, "write", lambda _: None)
    options = ("--model", "tiny-sdar", "--port", "0", "--device", "cpu", "--threads", "1")
    assert call(*options) == 2
    log = capsys.readouterr().err
    assert log == "error: the engine failed, see the log: start the server again\n"


def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = {
            ("--port", port, "--model", "tiny-sdar"): f"cannot listen at 127.0.0.1, port {port}",
            (): "--model NAME",
            ("--model", "tiny-sdar", "--budget", "8"): "give --graph",
            ("--model", "tiny-sdar", "--verify-share", "1"): "give --graph",
            ("--model", "tiny-sdar", "--any-model"): "--any-model takes a graph of another model",
            ("--model", "tiny-sdar", "--api-key", ""): "--api-key",
            ("--model", "tiny-sdar", "--api-key", "sesame\n"): "without a line's end",
            ("--model", "tiny-sdar", "--api-key", " sesame"): "drop the spaces around the key",
        }
        for arguments, expected in cases.items():
            assert call(*arguments) == 2
            log = capsys.readouterr().err
            assert expected in log
            assert len(log.strip().splitlines()) == 1


def test_seeds_are_others_after_every_start_unless_one_is_given() -> None:
    engine = Engine(model(), settings())

    def drawn(seed: int | None) -> int:
        return serving._Desk(engine, Access(), seed)._seeds.getrandbits(32)

    assert drawn(5) == drawn(5) != drawn(6)
    assert len({drawn(None) for _ in range(3)}) > 1


def test_an_empty_key_is_no_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPIFFY_API_KEY", "")
    assert call("--model", "tiny-sdar") == 2
    assert capsys.readouterr().err.startswith("error: SPIFFY_API_KEY is set but empty")


def test_a_port_that_was_taken_while_loading_is_named() -> None:
    engine, announced = Engine(model(), settings()), threading.Event()
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        second = bind("127.0.0.1", port)  # nobody listens there yet
        first.listen()
        with pytest.raises(SpiffyError, match=f"127.0.0.1:{port}: Address already in use"):
            listen.serve(build(engine), engine, second, Sockets(), announced.set)
    assert not announced.is_set()


def test_addresses_are_those_to_open() -> None:
    with bind("0.0.0.0", 0) as sock:
        assert listen.address_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"
    for impossible in ("host.invalid", "127..0.1", "a" * 64):
        with pytest.raises(SpiffyError, match="cannot listen at"):
            bind(impossible, 80)
