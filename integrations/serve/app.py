"""The HTTP side: routes, keys, bodies, and what becomes of an engine's events."""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from time import time
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from spiffy.integrations.serve import events
from spiffy.integrations.serve.api import (
    ApiError,
    Asked,
    ChatRequest,
    CompletionRequest,
    WatchRequest,
    parse,
)
from spiffy.integrations.serve.engine import (
    BusyError,
    Done,
    Engine,
    Event,
    Failed,
    Job,
    Seen,
    StoppedError,
    Text,
    TooLongError,
)
from spiffy.integrations.serve.metrics import GONE, Counted
from spiffy.integrations.serve.page import page
from spiffy.integrations.serve.watching import beginning
from spiffy.runtime.decode import Task
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import is_out_of_memory

_LOG = logging.getLogger("spiffy")

_BODY_SECONDS = 30.0
_DISCARDED = 64 << 20  # bytes of a body that is too large, before it is refused unread
_QUIET_SECONDS = 15.0  # after which a stream says that it is still there


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much at once.

    Attributes
    ----------
    key
        That requests have to bring; None: none.
    body_bytes
        Most of a request's body.
    """

    key: str | None = None
    body_bytes: int = 1 << 20


def build(
    engine: Engine,
    access: Access = Access(),
    seed: int = 0,
) -> FastAPI:
    """The application; it starts the engine, and stops it in the end.

    Parameters
    ----------
    seed
        From which the seeds of requests that name none are drawn.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)
            desk.close()

    desk = _Desk(engine, access, seed)
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Counted, metrics=engine.metrics)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused_by_starlette)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    app.include_router(_open_routes(engine))
    app.include_router(_asking_routes(desk), dependencies=[Depends(_key_check(access.key))])
    return app


def _open_routes(engine: Engine) -> APIRouter:
    """What needs no key."""
    router = APIRouter()

    text, headers = page()

    @router.get("/", response_class=HTMLResponse)
    async def root() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    @router.get("/health")
    async def health() -> JSONResponse:
        status = "ok" if engine.alive else "stopped"
        return JSONResponse({"status": status}, 200 if engine.alive else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.exposition(), media_type="text/plain; version=0.0.4")

    return router


def _asking_routes(desk: _Desk) -> APIRouter:
    router = APIRouter()
    card = {
        "id": desk.engine.name,
        "object": "model",
        "created": int(time()),
        "owned_by": "spiffy",
    }

    @router.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        desk.check_model(name)
        return JSONResponse(card)

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await desk.read(request, ChatRequest)
        messages = [message.as_template() for message in asked.messages]
        return await desk.answer(request, asked, "chat", [messages])

    @router.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = await desk.read(request, CompletionRequest)
        return await desk.answer(request, asked, "text", asked.prompts)

    @router.post("/spiffy/decode")
    async def decode(request: Request) -> Response:
        return await desk.show(request, await desk.read(request, WatchRequest))

    return router


def _key_check(key: str | None) -> Callable[[Request], Coroutine[Any, Any, None]]:
    wanted = None if key is None else f"Bearer {key}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        # In constant time: how long it takes must not tell how much of a key is right.
        if wanted is not None and not hmac.compare_digest(given, wanted):
            raise ApiError(
                401,
                "this server wants its API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                kind="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


class _Desk:
    """Takes requests in, and gives answers out."""

    def __init__(self, engine: Engine, access: Access, seed: int) -> None:
        self.engine, self.access = engine, access
        # Prompts are encoded beside the forwards, one after the other: tokenizers need not be safe.
        self._encoder = ThreadPoolExecutor(1, "spiffy-encoder")
        self._encoding = 0  # answers whose prompts wait for it, or are at it
        self._seeds = random.Random(seed)

    def close(self) -> None:
        self._encoder.shutdown(cancel_futures=True)

    def check_model(self, name: str | None) -> None:
        served = self.engine.name
        if name not in (None, served):
            raise ApiError(
                404,
                f"model {name!r} is not here: this server has {served!r}",
                param="model",
                code="model_not_found",
            )

    async def read(self, request: Request, kind: type[Asked]) -> Asked:
        """The body of a request."""
        declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if declared != "application/json":  # which pages of other sites cannot send unasked
            raise ApiError(415, "give the body as JSON: Content-Type: application/json")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._body(request)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {_BODY_SECONDS:.0f} s") from None
        asked = parse(kind, body)
        self.check_model(asked.model)
        return asked

    async def _body(self, request: Request) -> bytes:
        most, parts, length = self.access.body_bytes, [], 0
        async for part in request.stream():
            length += len(part)
            if length <= most:
                parts.append(part)
            elif length > _DISCARDED:  # a client that is still sending would not see the refusal
                break
        if length > most:
            raise ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
        return b"".join(parts)

    async def _tasks(
        self, request: Request, prompts: Sequence[Any], n: int, **options: Any
    ) -> list[Task]:
        """Tasks, n for each prompt; with temperature, each has noise of its own."""

        def prepare() -> list[Task]:
            tasks = []
            for at, prompt in enumerate(prompts):
                for sequence in range(at * n, (at + 1) * n):
                    tasks.append(self.engine.task(prompt, sequence=sequence, **options))
                    prompt = tasks[-1].prompt  # encoded once
            return tasks

        if options["seed"] is None:
            options["seed"] = self._seeds.getrandbits(32)
        number = len(prompts) * n
        self._take(partial(self.engine.check_room, number + self._encoding))
        self._encoding += number
        try:
            encoding = asyncio.get_running_loop().run_in_executor(self._encoder, prepare)
            return await _unless_gone(request, encoding)
        except TooLongError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        except SpiffyError as error:
            raise ApiError(400, str(error)) from None
        finally:
            self._encoding -= number

    @staticmethod
    def _take(asked: Callable[[], None]) -> None:
        """Ask the engine to take answers on; what it says of that, to the client."""
        try:
            asked()
        except BusyError as busy:
            raise ApiError(
                429,
                str(busy),
                code="queue_full",
                kind="rate_limit_error",
                headers={"Retry-After": str(busy.seconds)},
            ) from None
        except StoppedError:
            raise ApiError(503, "the server is stopping", kind="server_error") from None

    async def answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        way: events.Way,
        prompts: Sequence[Any],
    ) -> Response:
        """Answer a request, in one piece or in many."""
        limits = self.engine.limits
        if len(prompts) * asked.n > limits.batch + limits.waiting:
            most = limits.batch + limits.waiting
            raise ApiError(400, f"more than {most} answers at once are not given here", param="n")
        options = {"max_tokens": asked.length, "temperature": asked.temperature}
        tasks = await self._tasks(
            request,
            prompts,
            asked.n,
            raw=way == "text",
            seed=asked.seed,
            stop=asked.stop,
            filters=asked.filters,
            **options,
        )
        queue = _Queue()
        jobs = [Job(task, queue.put, k, stream=asked.stream) for k, task in enumerate(tasks)]
        prompt_tokens = sum(len(task.prompt) for task in tasks[:: asked.n])
        answers = events.Answers(way, self.engine.name, prompt_tokens)
        self._take(partial(self.engine.submit, jobs))
        if asked.stream:
            usage = asked.stream_options.include_usage
            pieces = _streamed(queue, answers, len(jobs), usage)
            return _Events(pieces, partial(self.engine.cancel, jobs))
        try:
            await _unless_gone(request, _collected(queue, answers, len(jobs)))
        finally:
            self.engine.cancel(jobs)
        return JSONResponse(answers.whole())

    async def show(self, request: Request, asked: WatchRequest) -> Response:
        """Tell the forwards of one decode as they come."""
        (task,) = await self._tasks(
            request,
            [[message.as_template() for message in asked.messages]],
            1,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            filters=asked.filters,
            seed=asked.seed,
            drafts=asked.drafts,
        )
        queue = _Queue()
        job = Job(task, queue.put, watch=True)
        self._take(partial(self.engine.submit, [job]))
        return _Events(_shown(queue, job), partial(self.engine.cancel, [job]))


class _Queue:
    """From the engine's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def get(self) -> Event:
        return await self._events.get()

    async def get_or_quiet(self) -> Event | None:
        """The next event; None if there is none for a while."""
        try:
            async with asyncio.timeout(_QUIET_SECONDS):
                return await self.get()
        except TimeoutError:
            return None


T = TypeVar("T")


async def _collected(queue: _Queue, answers: events.Answers, jobs: int) -> None:
    """Wait for all answers."""
    while len(answers.done) < jobs:
        event = await queue.get()
        if isinstance(event, Failed):
            raise _failure(event.error)
        if isinstance(event, Done):
            answers.done.append(event)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Do something as long as the client waits for it; what came of it.

    Raises
    ------
    ClientDisconnect
        If it does not wait any more.
    """
    doing = asyncio.ensure_future(work)
    going = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((doing, going), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, going):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Events(StreamingResponse):
    """Server-sent events; whatever ends the response ends what makes them."""

    def __init__(self, content: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _streamed(
    queue: _Queue, answers: events.Answers, jobs: int, usage: bool
) -> AsyncIterator[bytes]:
    if answers.way == "chat":
        for number in range(jobs):
            yield events.sent(answers.piece(number, "", first=True))
    while len(answers.done) < jobs:
        match await queue.get_or_quiet():
            case None:
                yield events.STILL_HERE
            case Text(job, text):
                yield events.sent(answers.piece(job.number, text))
            case Done() as done:
                answers.done.append(done)
                yield events.sent(answers.piece(done.job.number, reason=done.reason))
            case Failed(_, error):
                yield events.sent(_failure(error).body)
                return
    if usage:
        yield events.sent(answers.last())
    yield events.THE_END


async def _shown(queue: _Queue, job: Job) -> AsyncIterator[bytes]:
    yield events.sent(beginning(job.task))
    while True:
        match await queue.get_or_quiet():
            case None:
                yield events.STILL_HERE
            case Seen(_, told):
                yield events.sent(told)
            case Done() as done:
                yield events.sent(events.ending(done))
                return
            case Failed(_, error):
                yield events.sent(_failure(error).body)
                return


# ------------------------------------------------------------ refusals and failures


def _failure(error: Exception) -> ApiError:
    """Of an answer that was begun. What only the log should know stays there."""
    if isinstance(error, SpiffyError):  # the model computed NaN
        return ApiError(500, str(error), kind="server_error", code="decoding_failed")
    if is_out_of_memory(error):
        return ApiError(500, "out of memory", kind="server_error", code="out_of_memory")
    if isinstance(error, StoppedError):
        return ApiError(503, str(error), kind="server_error")
    _LOG.error("an answer failed: %r", error, exc_info=error)
    return ApiError(500, "the answer failed: see the server's log", kind="server_error")


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _refused_by_starlette(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    refusal = ApiError(error.status_code, message, headers=error.headers)
    return await _refused(request, refusal)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=GONE)


async def _failed(request: Request, _: Exception) -> JSONResponse:
    """Of what should not happen; uvicorn logs it."""
    message = "the server failed: see its log"
    return await _refused(request, ApiError(500, message, kind="server_error"))
