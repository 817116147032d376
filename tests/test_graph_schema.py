"""The artifact: the same bytes every time, and one clear sentence for every way to be wrong."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from spiffy.calib.audit import audit
from spiffy.graphs.diff import differences
from spiffy.schemas import (
    CalibrationRecord,
    CostPoint,
    CostProfile,
    DecodingSettings,
    DraftGraph,
    ExpectedSteps,
    ModelRecord,
    Node,
    SpiffyError,
)
from spiffy.schemas.io import write_atomically

NODES = (
    Node(fill=((0, 0),), parents=(0,), count=60),
    Node(fill=((1, 0),), parents=(0,), count=30),
    Node(fill=((0, 0), (1, 0)), parents=(1, 2), count=25),
    Node(fill=((0, 1),), parents=(0,), count=10),
)


def a_graph(nodes: tuple[Node, ...] = NODES, **fields: Any) -> DraftGraph:
    given_fields: dict[str, Any] = {
        "model": ModelRecord(family="llada", id="tiny", fingerprint="ab12", vocab_size=320),
        "decoding": DecodingSettings.parse(policy="threshold", threshold=0.9),
        "calibration": CalibrationRecord(
            dataset="gsm8k Übung",
            dataset_sha256="0" * 64,
            samples=50,
            held_out_samples=10,
            roots=1234,
            seed=0,
            objective="expected-steps",
            tool_version="0.1.0",
        ),
        "exact": True,
        "nodes": nodes,
        "expected_steps": tuple(1 + k / 3 for k in range(len(nodes) + 1)),
    }
    return DraftGraph(**{**given_fields, **fields})


def content() -> dict[str, Any]:
    """The artifact as JSON content without digest, so that editing it is not damage."""
    loaded: dict[str, Any] = json.loads(a_graph().to_json())
    del loaded["digest"]
    return loaded


def write(tmp_path: Path, text: str | bytes | dict[str, Any]) -> Path:
    path = tmp_path / "graph.json"
    if isinstance(text, dict):
        text = json.dumps(text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path) -> str:
    """Message of the refusal, which has to be a single line that names the file."""
    with pytest.raises(SpiffyError) as caught:
        DraftGraph.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# ---------------------------------------------------------------- round trip


@st.composite
def graphs(draw: st.DrawFn) -> DraftGraph:
    """Any graph: every node extends the root or a node before it by new position ranks."""
    fills: list[tuple[tuple[int, int], ...]] = [()]
    nodes: list[Node] = []
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.integers(0, len(nodes)))
        taken = {i for i, _ in fills[parent]}
        free = st.sampled_from([i for i in range(41) if i not in taken])
        extra = draw(st.dictionaries(free, st.integers(0, 1023), min_size=1, max_size=3))
        fill = tuple(sorted((*fills[parent], *extra.items())))
        if fill in fills:
            continue
        count = draw(st.integers(0, 10**6))
        nodes.append(Node(fill=fill, parents=(parent,), count=count))
        fills.append(fill)
    steps = st.floats(1, 40)
    expected = draw(st.lists(steps, min_size=len(nodes) + 1, max_size=len(nodes) + 1))
    return a_graph(tuple(nodes), expected_steps=tuple(draw(st.sampled_from([(), expected]))))


@given(graph=graphs())
def test_saving_what_was_loaded_gives_the_same_bytes(
    graph: DraftGraph, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("graph")
    graph.save(folder / "a.json")
    loaded = DraftGraph.load(folder / "a.json")
    loaded.save(folder / "b.json")
    assert loaded == graph
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == ["a.json", "b.json"]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    a_graph().save(tmp_path / "graph.json")
    raw = (tmp_path / "graph.json").read_bytes()
    stored = json.loads(raw.decode("utf-8"))
    assert stored["format"] == "spiffy.draft-graph"
    assert stored["version"] == "1.6"
    assert [node["fill"] for node in stored["nodes"]] == [
        [[0, 0]],
        [[1, 0]],
        [[0, 0], [1, 0]],
        [[0, 1]],
    ]
    assert raw.endswith(b"}\n")
    assert "Übung".encode() in raw


def test_bytes_do_not_depend_on_the_order_of_fields() -> None:
    stored = content()
    backwards = {key: stored[key] for key in reversed(stored)}
    backwards["model"] = {key: stored["model"][key] for key in reversed(stored["model"])}
    graph = DraftGraph.model_validate_json(json.dumps(backwards))
    assert graph.to_json() == a_graph().to_json()


def test_the_digest_covers_everything_but_cost_profiles() -> None:
    graph = a_graph()
    profile = CostProfile(device="cpu", dtype="float32", points=(CostPoint(drafts=0, seconds=0.1),))
    assert graph.model_copy(update={"cost_profiles": (profile,)}).digest() == graph.digest()
    others = [
        a_graph(NODES[:3]),
        a_graph(decoding=DecodingSettings.parse(threshold=0.8)),
        a_graph(model=graph.model.model_copy(update={"id": "other"})),
        a_graph(calibration=graph.calibration.model_copy(update={"seed": 1})),
        a_graph(expected_steps=()),
    ]
    digests = {other.digest() for other in [graph, *others]}
    assert len(digests) == 6


def test_settings_that_only_one_graph_has_are_a_difference() -> None:
    plain = a_graph()
    edits = a_graph(decoding=DecodingSettings.parse(policy="joint", cache="block"))
    parts = a_graph(decoding=plain.decoding.model_copy(update={"sub_block_length": 8}))
    assert "decoding: edit_threshold None -> 0.9" in differences(plain, edits)
    assert "decoding: edit_threshold 0.9 -> None" in differences(edits, plain)
    assert differences(plain, parts) == ["decoding: sub_block_length None -> 8"]
    assert differences(parts, plain) == ["decoding: sub_block_length 8 -> None"]
    assert differences(plain, a_graph()) == []


def test_what_differs_is_shown_where_it_differs() -> None:
    nodes = tuple(Node(fill=((k, 0),), parents=(0,), count=9 - k) for k in range(7))
    flat = (1.0,) + (1.5,) * 7
    graph = a_graph(nodes, expected_steps=flat)
    other = a_graph(nodes, expected_steps=(*flat[:3], 1.75, *flat[4:]))
    (line,) = differences(graph, other)
    assert "3: 1.500 -> 1.750" in line
    assert "7: 1.500 -> 1.500" in line  # the largest
    assert "5: " not in line
    (line,) = differences(graph, a_graph(nodes, expected_steps=(*flat[:4], 1.5001, *flat[5:])))
    assert "4: 1.500000 -> 1.500100" in line
    fewer = a_graph(nodes[:6], expected_steps=flat[:7])
    assert all(line.startswith("nodes: 1 removed") for line in differences(graph, fewer))


def test_measured_steps_are_compared_because_auto_drafts_by_them() -> None:
    def measured(**points: tuple[float, float | None]) -> DraftGraph:
        steps = {
            way: (ExpectedSteps(drafts=4, steps=value, replayed=replayed),)
            for way, (value, replayed) in points.items()
        }
        return a_graph().model_copy(update={"measured_steps": steps})

    one = measured(graph=(2.0, 1.5))
    assert differences(one, one) == []
    said = differences(one, measured(graph=(2.5, 1.5), model=(3.0, None)))
    assert said == [
        "measured steps by the graph at drafts 4: 2.000 -> 2.500",
        "measured steps by the model: only one of them states any",
    ]
    assert len(differences(one, measured(graph=(2.0, 1.75)))) == 1


def test_a_digest_of_another_version_is_no_fault() -> None:
    graph = a_graph()
    found = audit(graph, "0" * 64)  # the loader has refused those that are wrong
    assert not any("digest" in problem for problem in found.wrong)
    assert "digest: of another version of the format" in found.unchecked
    assert "digest" in " ".join(audit(graph, graph.digest()).checked)


def test_more_drafts_may_bring_less_but_no_forward_makes_more_steps_than_it_has_states() -> None:
    """On few held-out prompts a draft that comes true can cost a forward later on."""
    found = audit(a_graph(expected_steps=(1.0, 2.0, 1.4, 1.9, 2.0)), None)
    assert "expected steps" in found.checked
    assert found.wrong == []
    for steps, wrong in ((9.0, []), (9.001, ["9.001 steps of a forward with 8 drafts"])):
        points = {"graph": [{"drafts": 8, "steps": steps}]}
        graph = DraftGraph.model_validate_json(json.dumps(content() | {"measured_steps": points}))
        assert audit(graph, None).wrong == [f"measured_steps.graph: {text}" for text in wrong]


def test_cost_profiles_survive_a_round_trip(tmp_path: Path) -> None:
    points = (CostPoint(drafts=0, seconds=0.1), CostPoint(drafts=8, seconds=0.125))
    profile = CostProfile(device="cpu", dtype="float32", points=points)
    graph = a_graph(cost_profiles=(profile,))
    graph.save(tmp_path / "graph.json")
    assert DraftGraph.load(tmp_path / "graph.json").cost_profiles == (profile,)


def test_every_prefix_of_a_graph_is_a_graph() -> None:
    for budget in range(len(NODES) + 1):
        assert a_graph(NODES[:budget]).budget == budget


def test_from_pretrained_reads_a_checkpoint_directory(tmp_path: Path) -> None:
    a_graph().save(tmp_path / "draft_graph.json")
    assert DraftGraph.from_pretrained(str(tmp_path)) == a_graph()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpiffyError, match="no such file"):
        DraftGraph.from_pretrained(str(tmp_path / "empty"))


# ---------------------------------------------------------------- unreadable files


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.json")


def test_a_directory_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "nonsense", '{"a": 1,}', '{"a": 1} x', "[1", "'a'"])
def test_malformed_json_is_refused(tmp_path: Path, text: str) -> None:
    assert "not valid JSON" in refusal(write(tmp_path, text))


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    text = a_graph().to_json().encode()
    for length in range(1, len(text) - 2, 37):
        path = write(tmp_path, text[:length])
        message = refusal(path)
        assert "not valid JSON" in message or "not UTF-8" in message


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    assert "not UTF-8" in refusal(write(tmp_path, b'{"format": "\xff\xfe"}'))


def test_absurd_nesting_is_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "[" * 100_000 + "]" * 100_000))
    assert "nested too deeply" in message or "not a draft graph" in message


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path, constant: str) -> None:
    text = a_graph().to_json().replace('"count":10,', f'"count":{constant},')
    assert constant in text
    assert f"{constant} is not JSON" in refusal(write(tmp_path, text))


def test_numbers_too_large_to_be_finite_are_refused(tmp_path: Path) -> None:
    stored = content()
    text = json.dumps(stored).replace('"expected_steps": [1.0', '"expected_steps": [1e999')
    assert "1e999" in text
    assert "finite" in refusal(write(tmp_path, text))


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    text = a_graph().to_json().replace('"count":10,', '"count":10,"count":11,')
    assert "'count' occurs twice" in refusal(write(tmp_path, text))


def test_a_file_far_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    with path.open("wb") as file:
        file.truncate(10**9)  # sparse
    assert "more than the" in refusal(path)


# ---------------------------------------------------------------- not ours, or not of our time


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"format": "other", "version": "1.0"}'])
def test_json_that_is_no_artifact_is_refused(tmp_path: Path, text: str) -> None:
    assert "not a draft graph" in refusal(write(tmp_path, text))


@pytest.mark.parametrize("version", ["2.0", "2.7", "17.1", "9" * 5000 + ".0"])
def test_a_newer_major_version_is_refused(tmp_path: Path, version: str) -> None:
    message = refusal(write(tmp_path, {**content(), "version": version, "nodes": "changed"}))
    assert "newer than this program reads" in message
    assert "upgrade spiffy-dllm" in message
    assert len(message) < 400 + len(str(tmp_path))


def test_a_major_version_that_never_was_is_refused(tmp_path: Path) -> None:
    assert "never published" in refusal(write(tmp_path, {**content(), "version": "0.3"}))


@pytest.mark.parametrize("version", [None, 1, 1.0, "1", "1.0.0", "a.b", "-1.0", "1.", "\uff11.0"])
def test_a_version_that_is_none_is_refused(tmp_path: Path, version: object) -> None:
    assert '"version" must look like' in refusal(write(tmp_path, {**content(), "version": version}))


def test_unknown_fields_of_a_newer_minor_version_are_accepted(tmp_path: Path) -> None:
    stored = {**content(), "version": "1.7", "digest": "of a content that we do not know"}
    stored["colour"] = "green"
    stored["model"]["parameters"] = 8_000_000_000
    stored["calibration"]["hours"] = 2.5
    stored["nodes"][0]["gain"] = 0.5
    assert DraftGraph.load(write(tmp_path, stored)) == a_graph()


# ---------------------------------------------------------------- damaged, or not a graph


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    text = a_graph().to_json()
    assert "digest disagree" in refusal(write(tmp_path, text.replace('"count":60', '"count":61')))
    wrong = json.loads(text)
    wrong["digest"] = "0" * 64
    assert "digest disagree" in refusal(write(tmp_path, wrong))


def test_a_file_without_digest_may_be_edited(tmp_path: Path) -> None:
    stored = content()
    stored["nodes"][0]["count"] = 61
    assert DraftGraph.load(write(tmp_path, stored)).nodes[0].count == 61


Edit = Callable[[dict[str, Any]], object]
BROKEN: dict[str, tuple[Edit, str]] = {
    "parent after child": (
        lambda c: c["nodes"][0].update(parents=[3]),
        "node 1: parent 3 does not come before it",
    ),
    "own parent": (
        lambda c: c["nodes"][1].update(parents=[2]),
        "node 2: parent 2 does not come before it",
    ),
    "negative parent": (
        lambda c: c["nodes"][2].update(parents=[-1]),
        "node 3: parent -1 does not come before it",
    ),
    "duplicate fill": (
        lambda c: c["nodes"][3].update(fill=[[0, 0]]),
        "node 4: the same fill occurs twice",
    ),
    "unsorted fill": (
        lambda c: c["nodes"][2].update(fill=[[1, 0], [0, 0]]),
        "node 3: position ranks are not distinct and sorted",
    ),
    "one position twice": (
        lambda c: c["nodes"][2].update(fill=[[0, 0], [0, 1]]),
        "node 3: position ranks are not distinct and sorted",
    ),
    "not extending its parent": (
        lambda c: c["nodes"][2].update(parents=[1], fill=[[1, 0], [2, 0]]),
        "node 3: does not extend its parent 1",
    ),
    "one parent of two wrong": (
        lambda c: c["nodes"][2].update(fill=[[0, 0], [2, 0]]),
        "node 3: does not extend its parent 2",
    ),
    "too few expected steps": (lambda c: c["expected_steps"].pop(), "expected_steps: 4 values"),
    "too many expected steps": (
        lambda c: c["expected_steps"].append(9.0),
        "expected_steps: 6 values",
    ),
    "empty fill": (lambda c: c["nodes"][0].update(fill=[]), "nodes.0.fill"),
    "no parents": (lambda c: c["nodes"][0].update(parents=[]), "nodes.0.parents"),
    "negative rank": (lambda c: c["nodes"][0].update(fill=[[-1, 0]]), "nodes.0.fill"),
    "absurd rank": (lambda c: c["nodes"][0].update(fill=[[0, 10**9]]), "nodes.0.fill"),
    "rank as text": (lambda c: c["nodes"][0].update(fill=[["0", 0]]), "nodes.0.fill"),
    "rank as fraction": (lambda c: c["nodes"][0].update(fill=[[0.0, 0]]), "nodes.0.fill"),
    "rank as truth value": (lambda c: c["nodes"][0].update(fill=[[True, 0]]), "nodes.0.fill"),
    "three ranks": (lambda c: c["nodes"][0].update(fill=[[0, 0, 0]]), "nodes.0.fill"),
    "negative count": (lambda c: c["nodes"][0].update(count=-1), "nodes.0.count"),
    "no nodes field": (lambda c: c.pop("nodes"), "nodes: Field required"),
    "too many nodes": (
        lambda c: c.update(
            nodes=[{"fill": [[0, j % 1024]], "parents": [0], "count": 0} for j in range(4097)]
        ),
        "nodes: ",
    ),
    "no model": (lambda c: c.pop("model"), "model: Field required"),
    "no fingerprint": (lambda c: c["model"].pop("fingerprint"), "model.fingerprint"),
    "unknown policy": (lambda c: c["decoding"].update(policy="best"), "decoding.policy"),
    "block does not divide": (
        lambda c: c["decoding"].update(gen_length=100),
        "decoding: block_length 32 does not divide gen_length 100",
    ),
    "steps not numbers": (lambda c: c.update(expected_steps=["1"] * 5), "expected_steps.0"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_graph_is_refused(tmp_path: Path, kind: str) -> None:
    edit, words = BROKEN[kind]
    stored = content()
    edit(stored)
    assert words in refusal(write(tmp_path, stored))


def test_a_broken_graph_cannot_be_made_in_memory_either() -> None:
    with pytest.raises(ValidationError, match="the same fill occurs twice"):
        a_graph((NODES[0], NODES[0]))


# ---------------------------------------------------------------- another model


@pytest.mark.parametrize(
    ("family", "fingerprint", "vocab_size", "words"),
    [
        ("dream", "ab12", 320, "family llada, this model has dream"),
        ("llada", "ab12", 321, "vocabulary size 320, this model has 321"),
        ("llada", "cd34", 320, "fingerprint of config and tokenizer ab12, this model has cd34"),
    ],
)
def test_a_graph_of_another_model_is_refused(
    family: str, fingerprint: str, vocab_size: int, words: str
) -> None:
    with pytest.raises(SpiffyError) as caught:
        a_graph().check_fits(family, fingerprint, vocab_size)
    assert words in str(caught.value)
    assert "calibrated for tiny" in str(caught.value)


def test_a_graph_fits_its_own_model() -> None:
    a_graph().check_fits("llada", "ab12", 320)


# ---------------------------------------------------------------- writing


def assert_nothing_written(folder: Path, path: Path) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(SpiffyError) as caught:
        a_graph().save(path)
    assert "cannot be written" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_a_missing_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    assert_nothing_written(tmp_path, tmp_path / "absent" / "graph.json")


def test_a_file_in_place_of_the_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert_nothing_written(tmp_path, tmp_path / "file" / "graph.json")


def test_a_directory_in_place_of_the_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "graph.json").mkdir()
    assert_nothing_written(tmp_path, tmp_path / "graph.json")


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
def test_a_write_that_fails_late_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A full disk, or a folder that lost its permissions (which root would not notice)."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "graph.json"
    path.write_text("precious")
    monkeypatch.setattr(os, call, fail)
    assert_nothing_written(tmp_path, path)
    assert path.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_nothing_written(tmp_path, tmp_path / "locked" / "graph.json")


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "answers.jsonl", pieces())
    assert [*tmp_path.iterdir()] == []


def test_the_umask_says_who_may_read_a_new_file_and_an_old_one_says_it_itself(
    tmp_path: Path,
) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("private")
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        write_atomically(new, "text")
        os.umask(0o002)
        write_atomically(old, "text")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (new, old)] == [0o640, 0o640]
    assert old.read_text() == "text"


def test_saving_replaces_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text("old")
    a_graph().save(path)
    assert DraftGraph.load(path) == a_graph()
    assert [file.name for file in tmp_path.iterdir()] == ["graph.json"]


@pytest.mark.parametrize(("cache", "exact"), [("prefix", True), ("prefix-shared", False)])
def test_an_artifact_cannot_say_otherwise_whether_its_cache_is_exact(
    tmp_path: Path, cache: str, exact: bool
) -> None:
    text = content()
    text["decoding"]["cache"] = cache
    text["exact"] = not exact
    assert f"exact: {not exact} contradicts cache '{cache}'" in refusal(write(tmp_path, text))
    text["exact"] = exact
    assert DraftGraph.load(write(tmp_path, text)).exact == exact


@pytest.mark.parametrize("minor", [0, 1, 3])
def test_prefix_of_older_versions_becomes_exact_and_its_digest_still_holds(
    tmp_path: Path, minor: int
) -> None:
    """Until 1.3 all drafts with cache prefix shared a suffix; the digest is version 1.3's."""
    text = {**content(), "version": f"1.{minor}", "exact": False}
    text["decoding"]["cache"] = "prefix"
    text["digest"] = "bcf09cf61cf3bd8d17bc6a0eb61ca59b2b388d571ea6c3a08674910b99650e48"
    older = DraftGraph.load(write(tmp_path, text))
    assert older == a_graph(decoding=older.decoding)
    assert older.exact
    assert older.decoding.cache == "prefix"
    older.save(tmp_path / "again.json")
    assert DraftGraph.load(tmp_path / "again.json") == older
    if minor:
        text["nodes"][0]["count"] += 1
        assert "digest disagree" in refusal(write(tmp_path, text))
