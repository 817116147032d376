"""What the server does not do for those who ask too much, or who went, or on a lost device."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
import torch
from test_serve import (
    QUESTION,
    SECONDS,
    body,
    graph,
    model,
    running,
    served,
    settings,
    submit,
    wait_until,
)

from spiffy.integrations.serve.api import ApiError, ChatRequest, CompletionRequest, parse
from spiffy.integrations.serve.app import Access
from spiffy.integrations.serve.engine import Engine, Failed, Limits, StoppedError
from spiffy.integrations.serve.listen import Sockets
from spiffy.runtime.decode import driver
from spiffy.schemas import SpiffyError


@pytest.mark.parametrize(
    ("kind", "content", "place"),
    [
        (ChatRequest, {"messages": [0] * 300_000}, "messages.0"),
        (ChatRequest, {"messages": [{"role": "user", "content": [0] * 300_000}]}, "messages.0.con"),
        (CompletionRequest, {"prompt": [0, ""] * 150_000}, "prompt."),
        (CompletionRequest, {"prompt": [[""] * 300_000]}, "prompt.0.0"),
    ],
)
def test_the_first_wrong_item_is_enough(kind: Any, content: Any, place: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(kind, json.dumps(content).encode())
    assert refused.value.body["error"]["param"].startswith(place)
    cause = refused.value.__context__
    assert cause is not None
    assert len(cause.errors()) < 10  # type: ignore[attr-defined]


class Slow:
    """Encodes when it is told to; counts."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go_on, self.texts, encode = threading.Event(), list[str](), model().codec.encode

        def held(text: Any, **options: Any) -> list[int]:
            self.texts.append(text)
            assert self.go_on.wait(SECONDS)
            return encode(text, **options)

        patch.setattr(model().codec, "encode", held)


def test_who_would_be_refused_is_so_before_the_prompt_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(model(), settings(), limits=Limits(batch=1, waiting=1))
    with served(engine, Access(), Sockets()) as here:
        slow = Slow(monkeypatch)
        answers: list[int] = []

        def ask() -> None:
            answers.append(here.ask("POST", "/v1/chat/completions", body(n=2))[0])

        first = threading.Thread(target=ask)
        first.start()
        wait_until(lambda: len(slow.texts) == 1)
        status, _, content = here.ask("POST", "/v1/chat/completions", body())
        assert status == 429
        assert json.loads(content)["error"]["code"] == "queue_full"
        slow.go_on.set()
        first.join(SECONDS)
        assert answers == [200]
        assert len(slow.texts) == 1  # for two answers


def test_who_went_is_not_encoded_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model(), settings())
    with served(engine, Access(), Sockets()) as here:
        slow = Slow(monkeypatch)
        host, port = here.address.removeprefix("http://").split(":")
        content = body()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        gone = []
        for _ in range(2):
            gone.append(socket.create_connection((host, int(port))))
            gone[-1].sendall(head.encode() + content)
            wait_until(lambda: len(slow.texts) == 1)
        time.sleep(0.1)  # until the second one waits behind the first
        for connection in gone:
            connection.close()
        path = {"path": "/v1/chat/completions"}
        wait_until(lambda: here.sample("spiffy_requests_total", **path, status="499") == 2)
        slow.go_on.set()
        assert here.ask("POST", "/v1/chat/completions", body())[0] == 200
        assert len(slow.texts) == 2


def test_what_is_being_encoded_counts_though_its_client_went(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(model(), settings(), limits=Limits(batch=1, waiting=0))
    with served(engine, Access(), Sockets()) as here:
        slow = Slow(monkeypatch)
        connection = here.connect()
        path = "/v1/chat/completions"
        connection.request("POST", path, body(), {"Content-Type": "application/json"})
        wait_until(lambda: len(slow.texts) == 1)
        connection.close()
        wait_until(lambda: here.sample("spiffy_requests_total", path=path, status="499") == 1)
        assert here.ask("POST", path, body())[0] == 429
        slow.go_on.set()
        wait_until(lambda: here.ask("POST", path, body())[0] == 200)


def test_a_lost_device_is_the_end_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward would fail, and fast: whoever shares out requests would send all of them."""

    def lost(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine = Engine(model(), settings(), graph(), budget=4)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "forward", lost)
        patch.setattr(torch, "ones", lost)
        engine.start()
        _, end = submit(engine)
        failed = end()
        wait_until(lambda: not engine.alive)
    assert isinstance(failed, Failed)
    with pytest.raises(StoppedError):
        submit(engine)
    engine.stop()


def test_a_failed_answer_keeps_nothing_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_states = model().hidden_states
    monkeypatch.setattr(
        model(), "hidden_states", lambda *args: torch.full_like(hidden_states(*args), torch.nan)
    )
    with running() as engine:
        failed = submit(engine, QUESTION)[1]()
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, SpiffyError)
    trace, frames = failed.error.__traceback__, []
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert not {"step", "denoise", "denoising_step"} & {*frames}
    assert failed.error.__context__ is None
