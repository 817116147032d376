"""What studies write into pages, and what they refuse."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chain_graph, study

from spiffy.bench.order import OrderNetwork, OrderShape
from spiffy.bench.order_training import Report, Training
from spiffy.calib.pipeline import Traces
from spiffy.calib.prompts import PromptSet
from spiffy.runtime import decoding_settings, generate, load_model
from spiffy.runtime.budget.cost import cache_folder
from spiffy.runtime.generate import Output
from spiffy.schemas import SpiffyError

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
WRITTEN_BY_GSM8K = {
    ("docs/results.md", "bench"),
    ("docs/results-drafting.md", "domains"),
    ("docs/rival.md", "rival"),
    ("docs/losslessness.md", "sharing"),
}

pages = study("pages")
expect = pages.expect


def marked(path: Path, *keys: str) -> Path:
    path.write_text("\n".join(f"<!-- {key} -->\nold\n<!-- /{key} -->\nend" for key in keys))
    return path


def test_a_table_goes_into_the_pages_that_have_its_markers(tmp_path: Path) -> None:
    one, other = marked(tmp_path / "a.md", "x", "y"), marked(tmp_path / "b.md", "y")
    pages.fill([one, other], "x", "new")
    assert one.read_text().count("new") == 1
    assert "new" not in other.read_text()
    pages.fill([], "x", "new")  # nobody asked for a page


def test_a_table_without_a_place_is_no_success(tmp_path: Path) -> None:
    page = marked(tmp_path / "a.md", "y")
    before = page.read_text()
    with pytest.raises(SystemExit, match="<!-- x -->"):
        pages.fill([page], "x", "new")
    assert page.read_text() == before


@pytest.mark.parametrize(
    ("held", "keys"), [([()], ("x",)), ([("x",)], ("x", "y")), ([("x",), ()], ("x",))]
)
def test_a_place_that_is_missing_is_told_before_measuring(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    held: list[tuple[str, ...]],
    keys: tuple[str, ...],
) -> None:
    into = [marked(tmp_path / f"{k}.md", *some) for k, some in enumerate(held)]
    with pytest.raises(SystemExit) as ended:
        pages.expect(argparse.ArgumentParser(), into, *keys)
    assert ended.value.code == 2
    assert keys[-1] in capsys.readouterr().err


def test_a_page_with_a_marker_twice_loses_no_text(tmp_path: Path) -> None:
    page = marked(tmp_path / "a.md", "x", "x")
    before = page.read_text()
    with pytest.raises(SystemExit, match="once"):
        pages.fill([page], "x", "new")
    assert page.read_text() == before


def test_notes_say_all_options_and_name_files_without_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "gsm8k.jsonl"
    data.touch()
    monkeypatch.setattr(sys, "argv", ["/x/studies/domains.py", "--into=docs/rival.md"])
    args = argparse.Namespace(
        dataset=[str(data), "humaneval", "a/b"],
        samples=8,
        shapes=pages.words()("0.3b, qwen3"),
        budgets=pages.numbers()("1,2"),
        seconds=24.0,
        save=ROOT / "docs" / "results.md",
        busy=True,
        raw=False,
        only="",
        threads=None,
        into=[Path("docs/rival.md")],
    )
    assert pages.command(args) == (
        "python studies/domains.py --dataset gsm8k.jsonl humaneval a/b --samples 8 "
        "--shapes 0.3b,qwen3 --budgets 1,2 --seconds 24 --save docs/results.md --busy"
    )


MISUSED = [
    ("ablations", "--models tiny-sdr", "tiny-sdr"),
    ("ablations", "--models tiny-sdar --into PAGE", "--models"),
    ("auto", "--models tiny-sdar --into PAGE", "--models"),
    ("auto", "--repeats 0", "below 1"),
    ("bench", "--only nothing", "nothing"),
    ("compiled", "--prompts 0", "below 1"),
    ("compiled", "--models tiny-sdar --into PAGE", "--models"),
    ("graphs", "--models tiny-sdr", "tiny-sdr"),
    ("graphs", "--models tiny-sdar --into PAGE", "--models"),
    ("harness", "--samples 1", "below 2"),
    ("load", "--shape huge", "huge"),
    ("load", "--ways auto", "none"),
    ("losslessness", "--models tiny-sdr", "tiny-sdr"),
    ("losslessness", "--caches duel", "duel"),
    ("losslessness", "--caches dual --into PAGE", "--caches"),
    ("mixture", "--policies static --into PAGE", "--policies"),
    ("overhead", "--forwards 1", "below 2"),
    ("prefix", "--drafts 8 --into PAGE", "--drafts"),
    ("prepack", "--repeats 0", "below 1"),
    ("real_sizes", "--shapes 0.3b,huge", "huge"),
    ("real_sizes", "--models tiny-sdr", "tiny-sdr"),
    ("real_sizes", "--budgets 17", "above 16"),
    ("rival", "--only nothing", "nothing"),
    ("soak", "--minutes 0.01", "0.01"),
]


@pytest.mark.parametrize(("name", "words", "told"), MISUSED)
def test_what_cannot_be_measured_or_kept_is_told_before_measuring(
    name: str,
    words: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, page = study(name), tmp_path / "page.md"
    page.touch()
    monkeypatch.setattr(
        sys, "argv", [f"studies/{name}.py", *words.replace("PAGE", str(page)).split()]
    )
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_pages_take_all_models_in_any_order(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["a", "b"])
    parser.add_argument("--sizes", type=pages.numbers(), default="1,2")
    pages.add_into(parser)
    page = marked(tmp_path / "a.md", "x")
    given = parser.parse_args(["--models", "b", "a", "--sizes", "1,2", "--into", str(page)])
    pages.whole(parser, given, "models", "sizes")
    pages.whole(parser, parser.parse_args(["--models", "a"]), "models", "sizes")  # no page
    with pytest.raises(SystemExit):
        pages.whole(parser, parser.parse_args(["--sizes", "1", "--into", str(page)]), "sizes")


class _AskedError(Exception):
    """A study would begin to measure."""


def filled_by(words: list[str], patch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Pages and keys of the tables that a study, called so, would fill."""
    found: set[tuple[str, str]] = set()

    def asked(parser: argparse.ArgumentParser, into: list[Path], *keys: str) -> None:
        expect(parser, into, *keys)
        found.update((str(page), key) for page in into for key in keys if pages._holds(page, key))
        raise _AskedError

    module = study(Path(words[0]).stem)
    owner = module if hasattr(module, "expect") else module.pages
    patch.setattr(owner, "expect", asked)
    patch.setattr(sys, "argv", words)
    with pytest.raises(_AskedError):
        module.main()
    patch.undo()
    return found


@pytest.mark.skipif(shutil.which("make") is None, reason="asks make what it would run")
def test_make_fills_every_marked_table_and_leaves_those_of_data_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):  # studies may set them
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def filled(*options: str) -> set[tuple[str, str]]:
        command = ["make", "--dry-run", "bench", "results", *options]
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        told = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        lines = [shlex.split(line) for line in told.replace("\\\n", " ").splitlines() if line]
        calls = [words[1:] for words in lines if words[1:] and words[1].startswith("studies/")]
        with pytest.MonkeyPatch.context() as patch:
            return {each for words in calls for each in filled_by(words, patch)}

    every = {
        (page.relative_to(ROOT).as_posix(), key)
        for page in PAGES
        for key in re.findall(r"<!-- /(.+?) -->", page.read_text(encoding="utf-8"))
    }
    assert filled("GSM8K=x.jsonl") == every
    assert every - filled("GSM8K=") == WRITTEN_BY_GSM8K


def test_pages_have_the_heads_that_studies_write() -> None:
    head = study("bench").headline([]).splitlines()[0]
    assert head in PAGES[0].read_text(encoding="utf-8")
    head = study("graphs").forwards_table([]).splitlines()[0]
    assert head in (ROOT / "docs" / "results-drafting.md").read_text(encoding="utf-8")


def test_a_kept_order_network_is_taken_for_what_it_was_made_of_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rival, model = study("rival"), load_model("tiny-sdar", device="cpu")
    settings = decoding_settings(model, gen_length=64)
    trainings: list[Training] = []

    def train(*given: Any) -> tuple[OrderNetwork, Report]:
        trainings.append(given[4])
        network = OrderNetwork(OrderShape(settings.block_length, model.fingerprint))
        return network, Report(1, 1, 8, (1.5, 0.5), 2, 0.1, 0.5, 0.25)

    monkeypatch.setattr(rival, "train", train)

    def trained(text: str = "a", **options: int) -> int:
        """How many trainings there were, after one more call."""
        prompts, training = PromptSet("p", (text,)), Training(**options)
        found = rival.order_network(
            model, settings, prompts, Traces((), 0, 0), training, tmp_path / "n"
        )
        assert found.report.losses == (1.5, 0.5)
        return len(trainings)

    assert [trained(), trained()] == [1, 1]
    assert "anew" not in capsys.readouterr().out
    assert [trained(seed=1), trained(seed=1)] == [2, 2]
    assert [trained(epochs=1), trained("b", epochs=1)] == [3, 4]
    with torch.no_grad():
        next(iter(model.module.parameters())).add_(1)
    assert trained("b", epochs=1) == 5
    (tmp_path / "n.json").unlink()
    assert [trained("b", epochs=1), trained("b", epochs=1)] == [6, 6]
    assert capsys.readouterr().out.count("training anew") == 5


def test_a_model_and_its_compiled_self_start_from_the_same_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration stores those of the model as it is."""
    compiled, model = study("compiled"), load_model("tiny-sdar", device="cpu")
    chain_graph("tiny-sdar", gen_length=8).save(tmp_path / "graph.json")
    monkeypatch.setenv("SPIFFY_CACHE", str(tmp_path / "users"))
    folders: list[Path | None] = []

    def calibrated(*_: object) -> Path:
        assert cache_folder() == tmp_path / "users"
        return tmp_path / "graph.json"

    def decoded(*args: Any, **options: Any) -> Output:
        folders.append(cache_folder())
        return generate(*args, **options)

    monkeypatch.setattr(compiled, "calibrated", calibrated)
    monkeypatch.setattr(compiled, "compiling", lambda *_: 0.0)
    monkeypatch.setattr(compiled, "loaded", lambda *_, **__: (model, 0.0))
    monkeypatch.setattr(compiled, "generate", decoded)
    args = argparse.Namespace(shape=None, prompts=1, gen_length=8)
    assert compiled.line("tiny-sdar", args, tmp_path).startswith("| tiny-sdar, block |")
    assert len(folders) == 8
    assert tmp_path / "users" not in folders
    assert len(set(folders)) == 1


def test_what_a_model_cannot_do_ends_a_study_with_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        raise SpiffyError("no room")

    with pytest.raises(SystemExit) as ended:
        pages.start(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no room\n"
    with pytest.raises(SystemExit) as ended:
        pages.start(lambda: 1)
    assert ended.value.code == 1
