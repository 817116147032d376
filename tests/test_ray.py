"""Rows of data sets decoded by actors of Ray Data: those of `spiffy-decode`, and none lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import chain_graph, fail_while_decoding, of_another_model, shown

import spiffy.integrations.ray as door
from spiffy.integrations.ray import Decoder
from spiffy.runtime import generate, load_model
from spiffy.schemas import DraftGraph, SpiffyError

PROMPTS = [f"Tom has {k} apples. He buys 4 more. How many now?" for k in range(1, 5)]
COUNTS = ("nfe", "positions_computed", "steps", "accepted")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("graph") / "graph.json"
    chain_graph("tiny-sdar", 2, gen_length=8).save(path)
    return str(path)


@pytest.fixture(scope="module")
def decoder(graph: str) -> Decoder:
    return Decoder(graph=graph, budget=2, batch_size=3, device="cpu")


def expected(prompt: Any, **options: Any) -> dict[str, Any]:
    """The columns that a row is to get, by `generate`; with two drafts, on every machine."""
    graph = chain_graph("tiny-sdar", 2, gen_length=8)
    out = generate(load_model("tiny-sdar", device="cpu"), prompt, graph=graph, budget=2, **options)
    counts = {name: getattr(out.stats, name) for name in COUNTS}
    return {"text": out.text, "token_ids": out.token_ids, **counts, "error": ""}


def rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def test_rows_of_a_batch_share_forwards_and_change_nothing(decoder: Decoder) -> None:
    batch = {"id": np.arange(4), "prompt": np.array(PROMPTS, dtype=object)}
    found = rows(decoder(batch))
    assert [row["id"] for row in found] == list(range(4))
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert row["prompt"] == prompt
        assert row["seconds"] > 0
        assert without(row, "id", "prompt", "seconds") == expected(prompt)
    assert sum(row["accepted"] for row in found) > 0


def test_messages_fields_stops_and_prompts_that_cannot_be(graph: str) -> None:
    decoder = Decoder(
        graph=graph, budget=2, field="chat", system="S", stop="=", prefix="new_", device="cpu"
    )
    turns = [{"role": "user", "content": PROMPTS[0]}]
    chats = np.empty(4, dtype=object)
    chats[0], chats[1], chats[2] = np.array(turns, dtype=object), PROMPTS[1], "long " * 600
    first, second, long, none = rows(decoder({"chat": chats, "text": list("abcd")}))
    for row, prompt in ((first, PROMPTS[0]), (second, PROMPTS[1])):
        ours = {name.removeprefix("new_"): value for name, value in row.items() if "new" in name}
        assert without(ours, "seconds") == expected(prompt, system="S", stop="=")
    assert first["text"] == "a"
    for row, problem in ((long, "prompt of 6"), (none, "needs a non-empty text field 'chat'")):
        assert problem in row["new_error"]
        assert (row["new_text"], row["new_token_ids"], row["new_nfe"]) == ("", [], 0)
    (blank,) = rows(Decoder(graph=graph, device="cpu")({"prompt": [" "]}))
    assert "; --field (field= in Python) names another" in blank["error"]


def test_noise_belongs_to_the_row_however_rows_are_batched(graph: str) -> None:
    noisy = {"graph": graph, "budget": 2, "temperature": 3.0, "device": "cpu"}
    numbered = Decoder(**noisy, index="n")
    whole = numbered({"prompt": PROMPTS[:2], "n": np.array([5, 9])})["text"]
    assert whole == [
        expected(p, temperature=3.0, sequence=n)["text"]
        for p, n in ((PROMPTS[0], 5), (PROMPTS[1], 9))
    ]
    by_prompt = Decoder(**noisy)
    together = by_prompt({"prompt": PROMPTS[:2]})["text"]
    assert together == [by_prompt({"prompt": [p]})["text"][0] for p in PROMPTS[:2]]
    assert together != whole


@pytest.mark.parametrize(
    ("options", "batch", "message"),
    [
        ({}, {"x": ["a"]}, "no column of prompts"),
        ({"field": "y"}, {"prompt": ["a"]}, r"no column of prompts \('y'\) among 'prompt'"),
        ({"index": "n"}, {"prompt": ["a"]}, "no column 'n', which is to number the rows"),
        ({}, {"prompt": ["a"], "text": ["b"]}, "column 'text' is there already: give a prefix="),
        ({"batch_size": 0}, {}, "batch_size 0: give a number of rows from 1"),
        ({"batch_size": "8"}, {}, "batch_size '8': give a number of rows from 1"),
        ({"any_model": "no"}, {}, "any_model 'no': give True or False"),
        ({}, [("prompt", ["a"])], "a batch of type list: give map_batches batch_format='numpy'"),
        ({"raw": True, "system": "x"}, {}, "raw takes prompts as they are"),
        ({"policy": "greedy"}, {}, "policy"),
    ],
)
def test_wrong_columns_and_options_are_refused(
    options: dict[str, Any], batch: Any, message: str
) -> None:
    with pytest.raises(SpiffyError, match=message):
        Decoder("tiny-sdar", device="cpu", **options)(batch)


def test_a_graph_of_another_model_is_taken_on_demand(graph: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other.json")
    of_another_model(DraftGraph.load(graph)).save(other)
    with pytest.raises(SpiffyError, match="fingerprint of config and tokenizer m1-other"):
        Decoder(graph=other, device="cpu")
    decoder = Decoder(graph=other, any_model=True, budget=2, device="cpu")
    (row,) = rows(decoder({"prompt": PROMPTS[:1]}))
    assert without(row, "prompt", "seconds") == expected(PROMPTS[0])


def test_a_row_that_has_no_number_is_left_out_and_says_so() -> None:
    decoder = Decoder("tiny-sdar", index="n", gen_length=8, device="cpu")
    rows = decoder({"prompt": ["Hello"] * 5, "n": [0, 1.0, 1.5, "a", None]})
    assert rows["text"][0] == rows["text"][1] != ""
    assert rows["text"][2:] == [""] * 3
    said = "its index is no whole number: "
    assert rows["error"] == ["", "", said + "1.5", said + "'a'", said + "None"]


@pytest.mark.parametrize(
    "error", [SpiffyError("computed NaN"), torch.OutOfMemoryError("does not fit")]
)
def test_a_row_that_fails_while_it_is_decoded_says_so_and_ends_alone(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_while_decoding(monkeypatch, decoder.loaded.model, PROMPTS[1], error)
    good, bad, *others = rows(decoder({"prompt": PROMPTS}))
    assert (bad["error"], bad["text"], bad["nfe"]) == (str(error), "", 0)
    for row, prompt in zip((good, *others), (PROMPTS[0], *PROMPTS[2:]), strict=True):
        assert without(row, "prompt", "seconds") == expected(prompt)


def test_an_error_of_the_program_ends_the_job(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_while_decoding(monkeypatch, decoder.loaded.model, PROMPTS[1], TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        decoder({"prompt": PROMPTS})


@pytest.fixture
def local_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray on this machine; its workers are where this process is when it starts."""
    ray = pytest.importorskip("ray", reason="pip install 'spiffy-dllm[ray]'")
    pytest.importorskip("ray.data", reason="pip install 'spiffy-dllm[ray]'")
    monkeypatch.chdir(tmp_path)
    ray.init(
        num_cpus=4,  # two for the actors, the others for what reads and writes
        include_dashboard=False,
        object_store_memory=80 * 1024**2,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("local_ray")
def test_two_actors_run_what_the_readme_shows_and_one_of_them_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, doomed = tmp_path, PROMPTS[2]

    class Mortal(Decoder):
        """Its process is killed, once, with a batch in hand."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options, budget=2, device="cpu")

        def __call__(self, batch: Any) -> dict[str, Any]:
            (place / f"pid-{os.getpid()}").touch()
            if doomed in [*batch["prompt"]] and not (place / "killed").exists():
                (place / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    chain_graph("tiny-sdar", 2, gen_length=8).save("llada.json")
    Path("questions").mkdir()
    for number, prompt in enumerate(PROMPTS):  # a block of the data set each
        line = json.dumps({"id": number, "prompt": prompt})
        Path("questions", f"{number}.json").write_text(line + "\n")
    snippet = shown("README.md", "ds = ray.data")
    assert "size=2" in snippet
    monkeypatch.setattr(door, "Decoder", Mortal)
    exec(compile(snippet.replace("batch_size=64", "batch_size=1"), "README.md", "exec"), {})
    assert Path("killed").exists()
    assert len([*place.glob("pid-*")]) > 1
    lines = [line for path in Path("answers").iterdir() for line in path.read_text().splitlines()]
    found = sorted(map(json.loads, lines), key=lambda row: row["id"])
    assert [row["id"] for row in found] == list(range(len(PROMPTS)))
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert without(row, "id", "prompt", "seconds") == expected(prompt)
