"""Graphs go to the hub with a card, and are found there, by huggingface_hub's own client."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Call, a_graph_of, parity_model
from huggingface_hub import HfApi, ModelCard, constants
from loopback_hub import LoopbackHub, connect

from spiffy.calib.pipeline import model_facts
from spiffy.integrations import hub as door
from spiffy.runtime import ALIASES, generate, load_model
from spiffy.schemas import CostPoint, CostProfile, DraftGraph, ExpectedSteps
from spiffy.schemas import hub as schemas_hub

REVISION = "a" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    found = LoopbackHub()
    connect(found, tmp_path, monkeypatch)
    schemas_hub.holds_weights.cache_clear()
    yield found
    found.stop()


def a_graph(**model: Any) -> DraftGraph:
    graph = a_graph_of(parity_model("sdar-a"))
    record = graph.model.model_copy(update={"id": "org/model", "revision": REVISION, **model})
    profile = CostProfile(
        device="CPU | <b>", dtype="float32", points=(CostPoint(drafts=0, seconds=0.5),)
    )
    steps = {"model": (ExpectedSteps(drafts=2, steps=2.125),)}
    update = {"model": record, "cost_profiles": (profile,), "measured_steps": steps}
    return graph.model_copy(update=update)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    a_graph().save(tmp_path / "graph.json")
    return tmp_path / "graph.json"


# ------------------------------------------------------------------------------------- the card


def test_a_card_names_the_model_and_shows_what_was_measured(call: Call, file: Path) -> None:
    code, text, _ = call("graph", "card", file)
    assert code == 0
    card = ModelCard(text)
    assert card.data.library_name == "spiffy-dllm"
    assert card.data.base_model == "org/model"
    assert card.data.base_model_revision == REVISION
    assert {"draft-graph", "spiffy"} <= set(card.data.tags or ())
    assert "| drafts | nodes, replayed | model, decoded |" in text
    assert "| 1 | 1.50 |  |" in text
    assert "| 2 | 2.00 | 2.12 |" in text
    assert r"| CPU \| &lt;b&gt;, float32 | 0 | 500 |" in text
    assert f"`{a_graph().digest()[:16]}`" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "static, tokens a step: 1"),
        ({"steps_per_block": 2, "schedule": "timestep"}, "static, 2 steps a block (timestep)"),
        ({"policy": "threshold", "threshold": 0.85}, "threshold 0.85"),
        (
            {"policy": "joint", "edit_threshold": 0.5},
            "joint 0.9, edits above 0.5, at most 16 steps of a full block",
        ),
        ({"policy": "entropy-bounded"}, "entropy-bounded, 0.1 nats"),
        ({"policy": "mine:rule"}, "mine:rule, tokens a step: at least 1"),
    ],
)
def test_a_card_says_what_a_step_commits_by(settings: dict[str, Any], said: str) -> None:
    graph = a_graph_of(parity_model("sdar-a"), **settings)
    assert f"| unmasking policy | {said} |" in door.card(graph)


@pytest.mark.parametrize("name", ["tiny-llada", "](http://x) <img src=x>", "a|b"])
def test_a_card_takes_no_model_for_one_of_the_hub_and_no_name_for_markup(name: str) -> None:
    text = door.card(a_graph(id=name))
    assert ModelCard(text).data.base_model is None
    assert "](http" not in text.replace(r"\](http", "")
    assert "<img" not in text
    assert "a|b" not in text


def test_a_card_is_written_whole_or_not_at_all(call: Call, file: Path, tmp_path: Path) -> None:
    assert call("graph", "card", file, "--out", tmp_path / "README.md")[0] == 0
    assert (tmp_path / "README.md").read_text() == door.card(a_graph())
    code, _, log = call("graph", "card", file, "--out", tmp_path / "none" / "README.md")
    assert (code, log.count("\n")) == (2, 1)


# ---------------------------------------------------------------------------------------- to it


def test_push_makes_a_repository_that_the_graph_is_found_in(
    hub: LoopbackHub, call: Call, file: Path, tmp_path: Path
) -> None:
    code, printed, _ = call("graph", "push", file, "someone/drafts")
    assert (code, printed.startswith(f"{hub.address}/someone/drafts/commit/")) == (0, True)
    files = hub.files("someone/drafts")
    assert files["draft_graph.json"] == file.read_text()
    assert files["README.md"] == door.card(a_graph(), "someone/drafts")
    assert "custom_generate/generate.py" not in files
    assert DraftGraph.from_pretrained("someone/drafts") == a_graph()
    shown = call("graph", "show", "someone/drafts")
    assert shown[:2] == call("graph", "show", file)[:2]
    code, printed, _ = call("graph", "validate", "someone/drafts", "--strict")
    assert (code, "digest" in printed) == (0, True)


def test_pushing_again_replaces_the_graphs_part_of_the_card_only(
    hub: LoopbackHub, call: Call, file: Path
) -> None:
    assert call("graph", "push", file, "someone/drafts")[0] == 0
    text = hub.files("someone/drafts")["README.md"].replace("---\n\n#", "license: mit\n---\n\n#", 1)
    text = text.replace("tags:\n", "tags:\n- mine\n")
    hub.put("someone/drafts", {"README.md": (text + "\nThanks to all.\n").encode()})
    a_graph(revision="c" * 40).save(file)
    assert call("graph", "push", file, "someone/drafts")[0] == 0
    card = ModelCard(hub.files("someone/drafts")["README.md"])
    assert (card.data.license, card.data.base_model_revision) == ("mit", "c" * 40)
    assert card.text.count("pip install spiffy-dllm") == 1
    assert "at `cccc" in card.text
    assert {"mine", "draft-graph"} <= set(card.data.tags or ())
    assert card.text.rstrip().endswith("Thanks to all.")


def test_push_beside_weights_leaves_the_models_card_and_adds_the_folder(
    hub: LoopbackHub, call: Call, file: Path
) -> None:
    card = "---\nlicense: mit\ntags: [chat]   # ours\n---\n# A model\n"
    hub.put("org/model", {"config.json": b"{}", "README.md": card.encode()})
    code, _, log = call("graph", "push", file, "org/model")
    assert (code, log.count("\n")) == (2, 1)
    assert "org/model holds a model: give --beside-weights" in log
    for _ in range(2):
        assert call("graph", "push", file, "org/model", "--beside-weights")[0] == 0
        files = hub.files("org/model")
        assert files["README.md"] == (
            f"{card}\n{door.section(a_graph(), 'org/model', beside=True)}\n"
        )
    assert files["config.json"] == "{}"
    assert 'GRAPH = "org/model"' in files["custom_generate/generate.py"]
    assert "custom_generate/requirements.txt" not in files
    compile(files["custom_generate/generate.py"], "generate.py", "exec")
    # Of an earlier version: models were not loaded where it was not installed.
    hub.put("org/model", {"custom_generate/requirements.txt": b"spiffy-dllm>=0.1.0\n"})
    assert call("graph", "push", file, "org/model", "--beside-weights")[0] == 0
    assert hub.files("org/model") == files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generate.py", b"def generate(model): ...\n"),
        ("requirements.txt", b"spiffy-dllm>=0.1.0\nnumpy\n"),
    ],
)
def test_a_custom_generate_of_somebody_else_is_not_replaced(
    hub: LoopbackHub, call: Call, file: Path, name: str, text: bytes
) -> None:
    hub.put("org/model", {"config.json": b"{}", f"custom_generate/{name}": text})
    code, _, log = call("graph", "push", file, "org/model", "--beside-weights")
    assert (code, log.count("\n")) == (2, 1)
    assert f"org/model has a custom_generate/{name} that is not ours: push to a repo" in log
    assert len(hub.repositories["org/model"]) == 1
    assert call("graph", "push", file, "org/drafts")[0] == 0


@pytest.mark.parametrize("options", [(), ("--private",)])
def test_a_new_repository_is_private_if_that_is_asked_for_or_its_owners_default(
    hub: LoopbackHub, call: Call, file: Path, options: tuple[str, ...]
) -> None:
    assert call("graph", "push", file, "new/drafts", *options)[0] == 0
    (asked,) = hub.created
    said = {key: value for key, value in asked.items() if key in ("private", "visibility")}
    assert bool(said) == bool(options)  # "public" would overrule an organization's default
    assert "public" not in said.values()


def test_nothing_that_is_to_be_private_goes_to_a_public_repository(
    hub: LoopbackHub, call: Call, file: Path
) -> None:
    assert call("graph", "push", file, "some/drafts")[0] == 0
    before = [*hub.repositories["some/drafts"]]
    code, _, log = call("graph", "push", file, "some/drafts", "--private")
    assert (code, log.count("\n")) == (2, 1)
    assert "some/drafts is public: drop --private" in log
    assert hub.repositories["some/drafts"] == before


def test_a_published_models_alias_is_its_hub_id_in_a_card_and_in_new_graphs() -> None:
    text = door.card(a_graph(id="llada-8b"))
    card = ModelCard(text)
    assert card.data.base_model == "GSAI-ML/LLaDA-8B-Instruct"
    assert card.data.base_model_revision == REVISION
    assert f"A draft graph for GSAI-ML/LLaDA-8B-Instruct at `{REVISION}`" in text
    # By its id weights can be compared wherever the graph is found.
    facts = model_facts(parity_model("sdar-a").replaced(name="llada-8b"))
    assert facts.id == "GSAI-ML/LLaDA-8B-Instruct"


def test_another_graph_takes_what_the_one_before_said_of_its_model_with_it(
    hub: LoopbackHub, call: Call, file: Path
) -> None:
    def pushed(**model: Any) -> tuple[Any, Any]:
        a_graph(**model).save(file)
        assert call("graph", "push", file, "some/drafts")[0] == 0
        data = ModelCard(hub.files("some/drafts")["README.md"]).data
        return data.get("base_model"), data.get("base_model_revision")

    assert pushed() == ("org/model", REVISION)
    assert pushed(revision=None) == ("org/model", None)
    assert pushed(id="org/other") == ("org/other", REVISION)
    assert pushed(id="a-folder", revision=None) == (None, None)
    # What somebody wrote there is theirs.
    text = hub.files("some/drafts")["README.md"].replace("---\n", "---\nbase_model: a/b\n", 1)
    hub.put("some/drafts", {"README.md": text.encode()})
    assert pushed(id="a-folder", revision=None) == ("a/b", None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("nobody",), "'nobody' is no repository of the hub: give owner/name"),
        (("some/drafts", "--beside-weights"), "some/drafts holds no weights (no config.json)"),
    ],
)
def test_a_repository_of_another_kind_is_refused(
    hub: LoopbackHub, call: Call, file: Path, options: tuple[str, ...], said: str
) -> None:
    hub.put("some/drafts", {})
    code, _, log = call("graph", "push", file, *options)
    assert (code, log.count("\n")) == (2, 1)
    assert said in log
    assert len(hub.repositories["some/drafts"]) == 1


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("/api/models/new/drafts", 401, "the token is not valid; run `hf auth login`"),
        ("/api/models/new/drafts", 500, "500"),
        ("/create", 403, "the token may not write there"),
        ("/preupload/", 404, "404"),
        ("/commit/", 403, "the token may not write there"),
        ("/commit/", 403, "not for you"),
        ("/commit/", 409, "not for you"),
        ("/commit/", 412, "not for you"),
        ("/validate-yaml", 400, "Invalid metadata in README.md. - no licence"),
        ("/commit/", 503, "503"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: LoopbackHub, call: Call, file: Path, where: str, status: int, said: str
) -> None:
    hub.fails[where] = status
    if where not in ("/create", "/api/models/new/drafts"):
        hub.put("new/drafts", {})
    if where.startswith("/api"):
        hub.fails = {"/new/drafts": status}
    code, _, log = call("graph", "push", file, "new/drafts")
    assert (code, log.count("\n")) == (2, 1)
    assert log.startswith("error: new/drafts: nothing was pushed")
    assert said in log
    assert "draft_graph.json" not in {
        n for _, f in hub.repositories.get("new/drafts", []) for n in f
    }


def test_an_answer_that_is_lost_is_not_taken_for_a_refusal(
    hub: LoopbackHub, call: Call, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = HfApi.create_commit

    def cut(*arguments: Any, **options: Any) -> None:
        commit(*arguments, **options)
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(HfApi, "create_commit", cut)
    code, _, log = call("graph", "push", file, "new/drafts")
    assert (code, log.count("\n")) == (2, 1)
    assert "new/drafts: it is not known whether the commit was made: look, or push again" in log
    assert "draft_graph.json" in hub.repositories["new/drafts"][-1][1]


def test_what_is_no_hub_is_named(
    call: Call, file: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: {}["id"])
    code, _, log = call("graph", "push", file, "new/drafts")
    assert (code, log.count("\n")) == (2, 1)
    assert "nothing was pushed (it answers what its client cannot read: is HF_ENDPOINT a" in log


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_what_cannot_be_had_is_one_line(hub: LoopbackHub, call: Call, status: int) -> None:
    hub.put("some/drafts", {"draft_graph.json": a_graph().to_json().encode()})
    hub.fails["draft_graph.json"] = status
    for command in (("graph", "show", "some/drafts"), ("decode", "--graph", "some/drafts")):
        code, _, log = call(*command)
        assert (code, log.count("\n")) == (2, 1)
        assert "some/drafts: no draft_graph.json to be had (" in log
        assert str(status) in log


@pytest.mark.parametrize("metadata", ["tags: [", "tags: 5", "- a"])
def test_a_card_that_cannot_be_read_stays_as_it_is(
    hub: LoopbackHub, call: Call, file: Path, metadata: str
) -> None:
    hub.put("some/drafts", {"README.md": f"---\n{metadata}\n---\n".encode()})
    code, _, log = call("graph", "push", file, "some/drafts")
    assert (code, log.count("\n")) == (2, 1)
    assert "the front matter of its README.md cannot be read" in log
    assert len(hub.repositories["some/drafts"]) == 1


def test_without_token_or_network_it_is_one_line(
    hub: LoopbackHub, call: Call, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, _, log = call("graph", "push", file, "new/drafts")
    assert (code, log.count("\n")) == (2, 1)
    assert "the hub wants a token: run `hf auth login`, or set HF_TOKEN" in log
    assert hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.put("new/drafts", {})
    assert "the token is not valid" in call("graph", "push", file, "new/drafts")[2]
    hub.stop()
    code, _, log = call("graph", "push", file, "new/drafts")
    assert (code, log.count("\n")) == (2, 1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, log = call("graph", "show", "new/drafts")
    assert (code, log.count("\n")) == (2, 1)
    assert "new/drafts: no draft_graph.json to be had" in log


# -------------------------------------------------------------------------------------- from it


def test_other_weights_than_the_graphs_are_noted(
    hub: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {"config.json": b"{}", "model.safetensors": b"1"}
    first = hub.put("org/model", weights)
    graph = a_graph(revision=first)
    hub.put("org/model", {"draft_graph.json": graph.to_json().encode(), "README.md": b"new"})
    assert DraftGraph.find("org/model") == graph
    assert not caplog.records  # another commit, the same weights
    hub.put("other/drafts", {"draft_graph.json": graph.to_json().encode()})
    assert DraftGraph.find("other/drafts") == graph
    assert not caplog.records  # no weights to compare
    hub.put("other/copy", {**weights, "draft_graph.json": graph.to_json().encode()})
    DraftGraph.find("other/copy")
    assert not caplog.records  # a copy of the same weights
    hub.put("org/model", {"model.safetensors": b"2"})
    DraftGraph.find("org/model")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "org/model: its weights are not of the revision" in caplog.text
    assert f"(org/model at {first[:12]})" in caplog.text
    caplog.clear()
    unknown = a_graph(revision="d" * 40, id="nobody-knows")
    hub.put("org/model", {"draft_graph.json": unknown.to_json().encode()})
    DraftGraph.find("org/model")
    assert "are of the revision that the graph was calibrated with (nobody-knows" in caplog.text
    assert "cannot be told: the hub does not know it" in caplog.text


def test_what_is_no_file_is_looked_for_on_the_hub_unless_it_is_called_like_one(
    hub: LoopbackHub, call: Call
) -> None:
    for name, said in (
        ("out/llada.json", "out/llada.json: no such file"),
        ("llada", "llada: no such file"),
        ("org/none", "org/none: no draft_graph.json to be had"),
    ):
        code, _, log = call("graph", "show", name)
        assert (code, log.count("\n")) == (2, 1)
        assert said in log
    hub.put("org/none", {})
    assert "org/none: the hub has no draft_graph.json there" in call("graph", "show", "org/none")[2]


def test_decode_takes_a_repository_with_its_weights_or_without(
    hub: LoopbackHub, call: Call
) -> None:
    tiny = load_model("tiny-sdar", device="cpu")
    graph = a_graph_of(tiny, block_length=8, gen_length=16)
    alone = {"draft_graph.json": graph.to_json().encode()}
    hub.put("some/drafts", alone)
    shipped = {path.name: path.read_bytes() for path in Path(ALIASES["tiny-sdar"]).iterdir()}
    record = graph.model.model_copy(update={"id": "/home/of/someone/else"})
    beside = graph.model_copy(update={"model": record}).to_json().encode()
    hub.put("some/model", {**shipped, "draft_graph.json": beside})
    answers = []
    for repo in ("some/drafts", "some/model"):
        code, answer, log = call("decode", "--graph", repo, "--prompt", "Tom has 3 apples.")
        assert code == 0, log
        answers.append(answer)
    assert answers[0] == answers[1] != ""


def test_a_folder_is_taken_too(tmp_path: Path, call: Call) -> None:
    a_graph().save(tmp_path / "draft_graph.json")
    assert DraftGraph.find(tmp_path) == a_graph()
    assert call("graph", "validate", tmp_path, "--strict")[0] == 0


def test_the_readmes_commands_run(
    hub: LoopbackHub, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Where you work already\n")[2].partition("\n## ")[0]
    lines = [shlex.split(line) for line in section.splitlines() if "you/llada-drafts" in line]
    assert [line[0] for line in lines] == ["spiffy-graph", "spiffy-decode"]
    a_graph_of(load_model("tiny-llada", device="cpu"), block_length=32, gen_length=32).save(
        tmp_path / "llada.json"
    )
    monkeypatch.chdir(tmp_path)
    for command, *arguments in lines:
        code, printed, log = call(command.removeprefix("spiffy-"), *arguments)
        assert code == 0, log
    assert printed.rstrip().endswith("#### 11")


def test_transformers_decodes_with_what_push_put_beside_the_weights(
    hub: LoopbackHub, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's trust in this folder is what transformers asks for; our code never asks for it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "m")])
    tiny = load_model("tiny-sdar", device="cpu")
    a_graph_of(tiny, block_length=8, gen_length=16).save(tmp_path / "graph.json")
    hub.put("some/model", {"config.json": b"{}"})
    assert call("graph", "push", tmp_path / "graph.json", "some/model", "--beside-weights")[0] == 0
    ids, options = tiny.encode("Tom has 3 apples.")[None], {"max_new_tokens": 16}
    out = tiny.module.generate(  # type: ignore[operator]
        ids, custom_generate="some/model", trust_remote_code=True, **options
    )
    answer = generate(tiny, ids[0], gen_length=16).token_ids
    assert out[0, ids.shape[1] :].tolist() == answer
    with pytest.raises(ValueError, match="trust_remote_code"):
        tiny.module.generate(ids, custom_generate="some/model", trust_remote_code=False)  # type: ignore[operator]
