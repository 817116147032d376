"""`spiffy-serve`: answer requests in OpenAI's protocol."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from spiffy.cli.common import (
    doing,
    note_if_inexact,
    ready_to_draft,
    run_app,
    warn_of_differences,
)
from spiffy.cli.options import (
    ModelOfGraph,
    Unseeded,
    VersionOption,
    decoding_option,
    drafting_option,
    model_option,
    read_budget,
    spread,
)
from spiffy.cli.streams import write
from spiffy.cli.threads import apart, read_threads, set_threads
from spiffy.schemas import DraftGraph, SpiffyError

if TYPE_CHECKING:
    from spiffy.integrations.serve.app import Access
    from spiffy.integrations.serve.engine import Limits
    from spiffy.integrations.serve.listen import Sockets

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

serving_option = partial(typer.Option, rich_help_panel="Serving")

_QUESTION = "Lily has 9 old pens and buys 2 new pens. How many pens are there now?"


@dataclass(frozen=True)
class _Serving:
    """Where the server listens, whom it answers, and how many at a time."""

    host: Annotated[
        str, serving_option(help="Address to listen at; 0.0.0.0: all of this machine's.")
    ] = "127.0.0.1"
    port: Annotated[int, serving_option(min=0, max=65535, help="0: any that is free.")] = 8000
    api_key: Annotated[
        str | None,
        serving_option(
            envvar="SPIFFY_API_KEY", help="Key that requests have to bring. Default: none."
        ),
    ] = None
    max_batch: Annotated[
        int, serving_option(min=1, max=4096, help="Answers that share a forward, at most.")
    ] = 16
    max_waiting: Annotated[
        int,
        serving_option(min=0, help="Answers that wait beside those; further requests get 429."),
    ] = 64
    max_body: Annotated[int, serving_option(min=1, help="Bytes of a request's body, at most.")] = (
        1 << 20
    )
    max_connections: Annotated[
        int, serving_option(min=1, help="Connections at a time; further ones get 503.")
    ] = 256
    keep_alive: Annotated[
        int,
        serving_option(
            min=1,
            help="Seconds that a connection may idle between two requests: more than a proxy in "
            "front lets it.",
        ),
    ] = 75
    drain_seconds: Annotated[
        int, serving_option(min=0, help="Time that what is begun has to end after SIGTERM.")
    ] = 60
    verify_share: Annotated[
        float,
        serving_option(
            min=0,
            max=1,
            help="Share of the answers that are compared with plain decoding in idle time "
            "(spiffy_verified_total in /metrics).",
        ),
    ] = 0.0

    def check(self) -> None:
        """Refuse a key that no request could bring."""
        key = self.api_key
        if key is None and os.environ.get("SPIFFY_API_KEY") == "":  # meant to have one
            raise SpiffyError("SPIFFY_API_KEY is set but empty: give it a key, or unset it")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise SpiffyError(
                "--api-key (SPIFFY_API_KEY): give a key of printable ASCII characters, without a "
                "line's end"
            )
        if key is not None and key != key.strip():  # which headers lose
            raise SpiffyError("--api-key (SPIFFY_API_KEY): drop the spaces around the key")

    def limits(self) -> Limits:
        from spiffy.integrations.serve.engine import Limits

        return Limits(self.max_batch, self.max_waiting, self.verify_share)

    def access(self) -> Access:
        from spiffy.integrations.serve.app import Access

        return Access(self.api_key, self.max_body)

    def sockets(self) -> Sockets:
        from spiffy.integrations.serve.listen import Sockets

        return Sockets(self.max_connections, self.drain_seconds, self.keep_alive)


def _require_server() -> None:
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(name) is None:
            raise SpiffyError(f"serving needs {name}: pip install 'spiffy-dllm[serve]'")


@app.command()
@spread
def serve(
    graph: Annotated[
        str | None,
        model_option(
            help="Draft graph: a file, a folder or a hub id (owner/name) that has "
            "draft_graph.json; without one: plain."
        ),
    ] = None,
    *,
    model: ModelOfGraph,
    serving: _Serving,
    decoding: Unseeded,
    seed: Annotated[
        int | None,
        decoding_option(
            help="Draws the seeds of requests that name none: the same ones after every start. "
            "Default: others every time."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        drafting_option(
            help="Most drafts per forward and answer. auto (default): as many as pay on this "
            "machine, learned while decoding."
        ),
    ] = None,
    version: VersionOption = False,
) -> None:
    """Serve a model to clients of OpenAI's API: chat, completions, streaming.

    Requests share forwards. What a request does not say of temperature, top_p and top_k is as
    given here, or the graph's.

    Example: spiffy-serve --model tiny-sdar --graph sdar.json
    """
    serving.check()
    decoding.check()
    _require_server()
    artifact = None if graph is None else DraftGraph.find(graph)
    if artifact is None and model.model is None:
        raise SpiffyError("give --graph FILE.json, or --model NAME to serve plainly")
    if serving.verify_share and artifact is None:
        raise SpiffyError("--verify-share compares drafting with plain decoding: give --graph")
    if budget is not None and artifact is None:
        raise SpiffyError("--budget counts drafts: give --graph")
    if model.any_model and artifact is None:
        raise SpiffyError("--any-model takes a graph of another model: give --graph, or drop it")
    drafts = read_budget("auto" if budget is None else budget)
    threads = read_threads(model.threads)
    with doing("loading") as status:
        from spiffy.integrations.serve.app import build
        from spiffy.integrations.serve.engine import Engine
        from spiffy.integrations.serve.listen import address_of, bind
        from spiffy.integrations.serve.listen import serve as listen
        from spiffy.integrations.serve.warm_up import warm_up

        edges = decoding.block_edges()
        sock = bind(serving.host, serving.port)  # before the minutes that loading may take
        lm = apart(lambda: model.load(artifact, graph))  # the engine computes in another thread
        settings = decoding.settings(lm, artifact, model.any_model)
        set_threads(lm, settings, threads)
        if artifact is not None:
            warn_of_differences(artifact, settings)
            note_if_inexact(settings)
            ready_to_draft(artifact, status)
        engine = Engine(lm, settings, artifact, drafts, edges=edges, limits=serving.limits())
    with doing("warming up"):
        apart(lambda: warm_up(engine, _QUESTION))
    server = build(engine, serving.access(), seed)
    address = address_of(sock)
    greeting = _greeting(engine.name, address, serving)
    listen(server, engine, sock, serving.sockets(), lambda: write(greeting))


def _greeting(model: str, address: str, serving: _Serving) -> str:
    """Where the server is, and how to try it."""
    body = {"messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 64}
    key = "" if serving.api_key is None else " -H 'Authorization: Bearer KEY'"
    return (
        f"serving {model} at {address}\n"
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d '{json.dumps(body)}'\n"
    )


def main() -> None:
    """Entry point of `spiffy-serve`."""
    run_app(app)


if __name__ == "__main__":
    main()
