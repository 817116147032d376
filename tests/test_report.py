"""Reports: well-formed, self-contained, escaped, honest about what is missing; and comparisons.

Longer than other files, because all of it looks at the same pages, which take a minute to make.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from example_bench import example_bench, example_graph
from in_browser import Browser, needs_browser
from typer.testing import CliRunner

from spiffy.bench import plots, report, tables
from spiffy.bench.compare import compare
from spiffy.bench.plots.style import COLOURS
from spiffy.bench.report import write_calibration_report, write_report
from spiffy.cli.graph import app as graph_app
from spiffy.graphs.diff import differences
from spiffy.schemas import DraftGraph, Node, SpiffyError
from spiffy.schemas.bench import INTERVAL_PROMPTS, Acceptance, Bench, Draft, Interval, Turn
from spiffy.schemas.html import visible

ROOT = Path(__file__).parent.parent
VOID = {"meta", "link", "input", "br", "hr", "img"}
HOSTILE = "</script><script>alert(1)</script><!-- \"'&amp; \u2028 \u202e \U0001f600 \x00 {{ 7*7 }}"


class Page(HTMLParser):
    """What a page holds, parsed strictly: every element must be closed where it belongs."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag}: {names}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((tuple(self.open), data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self) -> list[str]:
        return [str(a["id"]) for _, a in self.elements if "id" in a]

    def within(self, tag: str) -> list[str]:
        return [text for path, text in self.texts if tag in path]


def html_of(bench: Bench, folder: Path) -> str:
    write_report(bench, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return html_of(example_bench(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def hostile_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return html_of(hostile(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def calibration_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "calibration.html"
    write_calibration_report(example_graph(), path)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("fixture", ["html", "calibration_html"])
def test_pages_are_well_formed_and_refer_to_nothing_outside(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    text = request.getfixturevalue(fixture)
    page = Page(text)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    targets = [a[key] for _, a in page.elements for key in ("href", "src") if a.get(key)]
    for target in targets:
        assert str(target).startswith(("#", "data:")), target
        assert str(target)[1:] in ids or target == "data:,"
    for used in re.findall(r"url\(([^)]*)\)", text):
        assert used.strip("\"'").removeprefix("#") in ids
    for _, attributes in page.elements:
        for key in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(key) or "").split()) <= set(ids)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("fixture", ["html", "calibration_html"])
def test_every_picture_has_a_text_alternative_and_headings_do_not_skip(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    page = Page(request.getfixturevalue(fixture))
    pictures = page.all("svg") + page.all("img")
    assert len(pictures) >= 4
    for picture in pictures:
        assert picture["role"] == "img"
        assert picture["aria-labelledby"]
    descriptions = page.within("desc")
    assert len(descriptions) == len(page.all("svg"))
    assert all(len(text) > 40 and any(map(str.isdigit, text)) for text in descriptions)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_the_same_run_gives_the_same_bytes_and_needs_no_torch(html: str, tmp_path: Path) -> None:
    example_bench().save(tmp_path / "bench.json")
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from pathlib import Path; from spiffy.bench.report import write_report; "
        "from spiffy.schemas.bench import Bench; "
        "write_report(Bench.load(Path('bench.json')), Path('report.html'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html


def test_colours_are_left_to_the_theme(html: str) -> None:
    inside = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", inside)
    used = set(re.findall(r"var\(--([a-z-]+)\)", inside))
    style = html.split("<style>")[1].split("</style>")[0]
    dark = style.split("prefers-color-scheme: dark")[1].split("}")[0]
    for name in used:
        assert f"--{name}:" in style.split("}")[0]
        assert f"--{name}:" in dark


def hostile() -> Bench:
    bench = example_bench()
    walk = bench.walkthrough
    assert walk is not None
    start = walk.answer_start
    draft = Draft(fill=((start, HOSTILE),), parents=(0,), accepted=True)
    turn = Turn(
        block=0,
        span=walk.turns[0].span,
        drafts=(draft,),
        steps=(((start, HOSTILE),), ((start + 1, " \n"),)),
        seconds=0.1,
    )
    walk = walk.model_copy(
        update={"prompt": HOSTILE, "text": HOSTILE, "turns": (turn,), "prompt_tokens": (HOSTILE,)}
    )
    rows = (*bench.results[:-1], bench.results[-1].model_copy(update={"note": HOSTILE}))
    return bench.model_copy(update={"walkthrough": walk, "results": rows, "command": HOSTILE})


def test_nothing_in_a_run_becomes_markup_or_script(html: str, hostile_html: str) -> None:
    text = hostile_html
    page = Page(text)
    assert len(page.all("script")) == len(Page(html).all("script")) == 2
    assert "alert(1)</script>" not in text
    assert "\x00" not in text
    assert "\u202e" not in text
    assert "{{ 7*7 }}" in text  # shown, not evaluated
    data = next(d for path, d in page.texts if path[-1] == "script" and d.startswith("{"))
    assert not set("<>&\u2028") & set(data)
    turn = json.loads(data)["turns"][0]
    assert turn["steps"][1] == [[turn["steps"][0][0][0] + 1, "·↵"]]
    assert turn["steps"][0][0][1] == visible(HOSTILE)


def test_blanks_and_control_characters_are_visible() -> None:
    assert visible(" a\n\t") == "·a↵⇥"
    assert visible("") == "∅"
    assert visible("\u202e\u00a0\x1b") == "\\u202e\\u00a0\\u001b"
    assert visible("né🙂") == "né🙂"


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    bench = example_bench()
    plain = [r.model_copy(update={"scored": 0, "peak_bytes": None}) for r in bench.results[:1]]
    bare = bench.model_copy(
        update={"profile": None, "walkthrough": None, "nodes": (), "results": tuple(plain)}
    )
    page = Page(html_of(bare, tmp_path))
    ids = page.ids()
    assert {"results", "conditions"} <= set(ids)
    assert not {"cost", "walkthrough", "graph", "acceptance", "player"} & set(ids)
    headings = page.within("thead")
    assert "accuracy" not in headings
    assert "peak memory" not in headings
    links = [a["href"] for a in page.all("a")]
    assert all(str(link)[1:] in ids for link in links)
    assert page.all("script") == []
    assert "Nothing here drafts" in " ".join(page.within("header"))


def test_conditions_are_stated(html: str) -> None:
    bench = example_bench()
    stated = " ".join(Page(html).within("dd"))
    for fact in (
        bench.command,
        bench.machine.device,
        bench.machine.system,
        bench.graph_digest,
        bench.data.sha256,
        *(f"{name} {version}" for name, version in bench.machine.versions.items()),
        "2 prompts of synthetic",
        "bootstrap",
        "0.50 at the start",
        "0 of the first prompt that are not counted (warm-up)",
    ):
        assert fact in stated


@pytest.mark.parametrize(
    ("calibrated_on", "said"),
    [(0, "none of them was"), (2, "2 of them were"), (None, "is not known")],
)
def test_it_is_said_what_is_known_of_held_out_prompts(calibrated_on: int | None, said: str) -> None:
    bench = example_bench()
    data = bench.data.model_copy(update={"calibrated_on": calibrated_on})
    stated = dict(report._conditions(bench.model_copy(update={"data": data})))["Data"]
    assert said in stated
    assert ("none of them was calibrated on" in stated) == (calibrated_on == 0)


def test_counts_of_auto_are_not_said_to_repeat(html: str) -> None:
    assert len(re.findall(r"repeat exactly, but for those of auto", html)) == 2
    assert html.count("repeat exactly") == 2


def test_the_last_block_is_shown_if_a_forward_before_committed_it() -> None:
    """A draft may complete two blocks: the second one is nobody's root."""
    walk = example_bench().walkthrough
    assert walk is not None
    first = walk.turns[0].span[0]
    (start, stop) = span = (first, first + 8)
    step = tuple((p, f"t{p}") for p in range(start, stop + 3))
    turn = Turn(block=0, span=span, drafts=(), steps=(step,), seconds=0.1)
    short = {"turns": (turn,), "answer_start": start, "prompt_tokens": (), "length": first + 14}
    for length, last in ((first + 32, stop + 8), (first + 14, first + 14)):
        cut = walk.model_copy(update={**short, "length": length})
        assert json.loads(report.walkthrough_data(cut)["json"])["last"] == last
        shown = cut._repr_html_()
        assert all(f"t{p}<sup>" in shown for p, _ in step)
    reached = walk.model_copy(update={**short, "turns": (turn.model_copy(update={"steps": ()}),)})
    assert json.loads(report.walkthrough_data(reached)["json"])["last"] == stop


def test_the_list_of_forwards_needs_no_script(html: str) -> None:
    walk = example_bench().walkthrough
    assert walk is not None
    table = html.split('<table class="forwards">')[1].split("</table>")[0]
    rows = re.findall(r"<tr><td>.*?</tr>", table)
    assert len(rows) == len(walk.turns)
    for row, turn in zip(rows, walk.turns, strict=True):
        cells = re.findall(r"<td>(.*?)</td>", row)
        accepted = sum(draft.accepted for draft in turn.drafts)
        assert cells[2:5] == [str(len(turn.drafts)), str(accepted), str(len(turn.steps))]
    assert "<details open" in html


# -- words and tables -----------------------------------------------------------------------------


def numbers(cell: str) -> list[float]:
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", cell.replace(",", ""))]


def test_the_markdown_table_is_the_data() -> None:
    bench = of_prompts(example_bench(), INTERVAL_PROMPTS)
    lines = tables.markdown(bench).splitlines()
    headings, rule, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines)
    assert len({len(row) for row in (headings, rule, *rows)}) == 1
    assert len(rows) == len(bench.results)
    base = bench.results[0]
    for row, result in zip(rows, bench.results, strict=True):
        cells = dict(zip(headings, row, strict=True))
        assert cells["method"] == result.name
        nfe = numbers(cells["NFE (times fewer)"])
        assert nfe[0] == result.nfe
        if result is not base:
            assert nfe[1] == pytest.approx(base.nfe / result.nfe, abs=0.005)
            if result.kind == "freedave":
                own = (result.nfe + result.accepted) / result.nfe
                assert nfe[2] == pytest.approx(own, abs=0.005)
            ratio = result.speedup
            assert numbers(cells["speed against plain"]) == pytest.approx(
                [ratio.value, ratio.low, ratio.high], abs=0.005
            )
        assert numbers(cells["positions (times plain's)"])[0] == result.positions_computed
        assert float(cells["steps per forward"]) == pytest.approx(
            result.steps / result.nfe, abs=0.005
        )
        parts = numbers(cells["forward / draft / verify / rest, %"])
        assert sum(parts) == pytest.approx(100, abs=2)
        assert parts[0] == pytest.approx(
            100 * result.seconds.forward / result.seconds.total, abs=0.5
        )
        assert numbers(cells["accuracy"])[1:] == [result.correct, result.scored]
    identical = {row[0]: dict(zip(headings, row, strict=True))["tokens identical"] for row in rows}
    assert identical[base.name] == "baseline"
    assert identical["plain threshold"] == "other policy"
    assert identical["model 4"] == "yes"


def test_a_markdown_cell_cannot_end_its_column() -> None:
    table = tables.markdown_table(["a|b", "c"], [["x\ny", "1 | 2"], ["", ""]])
    assert table.splitlines()[0] == "| a\\|b | c |"
    assert table.splitlines()[2:] == ["| x y | 1 \\| 2 |", "| - | - |"]


def of_prompts(bench: Bench, samples: int) -> Bench:
    return bench.model_copy(update={"data": bench.data.model_copy(update={"samples": samples})})


def with_speed(name: str, value: float, low: float, high: float, **changed: Any) -> Bench:
    bench = of_prompts(example_bench(), INTERVAL_PROMPTS)
    speedup = Interval(value=value, low=low, high=high)
    slow = Interval(value=0.5, low=0.4, high=0.6)
    rows = [
        r.model_copy(update={"speedup": speedup, **changed})
        if r.name == name
        else r.model_copy(update={"speedup": slow})
        for r in bench.results
    ]
    return bench.model_copy(update={"results": tuple(rows)})


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((1.5, 1.2, 1.8), "pays"), ((1.1, 0.9, 1.3), "unclear"), ((0.8, 0.7, 0.9), "slower")],
)
def test_the_headline_says_whether_drafts_pay(
    interval: tuple[float, float, float], verdict: str
) -> None:
    told = tables.headline(with_speed("graph 4", *interval))
    assert told.verdict == verdict
    assert told.best is not None
    assert told.best.name == "graph 4"
    assert f"{interval[0]:.2f}x" in told.sentence
    assert ("nothing pays" in told.sentence) == (verdict == "slower")


def test_the_headline_never_praises_bounds_or_what_loses_tokens() -> None:
    shared = example_bench().decoding.model_copy(update={"cache": "prefix-shared"})
    for name, changed in (("perfect 4", {}), ("graph 4", {"differing": 1})):
        bench = with_speed(name, 9.0, 8.0, 10.0, **changed)
        best = tables.headline(bench.model_copy(update={"decoding": shared})).best
        assert best is not None
        assert best.name != name


def test_a_near_tie_hides_no_method_and_is_told() -> None:
    bench = with_speed("graph 4", 1.5, 1.2, 1.8, compared=80, differing=6)
    machine = bench.machine.model_copy(update={"dtype": "bfloat16, prepacked"})
    told = tables.headline(bench.model_copy(update={"machine": machine}))
    assert told.best is not None
    assert (told.verdict, told.best.name) == ("pays", "graph 4")
    assert "Of the 80 answers of graph 4 6 differ" in told.sentence
    assert "In bfloat16 near-ties can do that" in told.sentence
    assert "--dtype float32" in told.sentence
    assert ("74/80", "answers identical, token for token") in report._tiles(bench)


@pytest.mark.parametrize("prompts", [1, 5, 6])
def test_few_prompts_have_no_interval_and_no_verdict(prompts: int) -> None:
    bench = of_prompts(with_speed("graph 4", 1.5, 1.2, 1.8), prompts)
    enough, told = prompts == 6, tables.headline(bench)
    assert told.verdict == ("pays" if enough else "unclear")
    assert (f"({prompts}): an interval needs 6" in told.sentence) == (not enough)
    assert ("1.50x (1.20-1.80)" in tables.markdown(bench)) == enough
    assert ("95% interval 1.20" in str(report._tiles(bench))) == enough


def test_the_headline_says_what_auto_chose() -> None:
    bench = with_speed("graph 4", 1.5, 1.2, 1.8)
    assert "Learned while decoding (auto): 0.50x (0.40-0.60)" in tables.headline(bench).sentence
    none = bench.results[-1].model_copy(update={"drafted": 0, "budget": 0})
    bench = bench.model_copy(update={"results": (*bench.results[:-1], none)})
    assert "auto decided not to draft" in tables.headline(bench).sentence


def test_comparing_a_run_with_itself_finds_no_difference() -> None:
    bench = example_bench()
    text = compare(bench, bench)
    assert "Nothing but the load" in text
    assert "cannot be compared" not in text
    row = next(line for line in text.splitlines() if line.startswith("| graph 4"))
    assert f"{bench.result('graph 4').nfe} (same)" in row


def test_comparisons_say_which_numbers_mean_nothing() -> None:
    a = example_bench()
    machine = a.machine.model_copy(update={"device": "another core"})
    rows = tuple(r.model_copy(update={"nfe": 2 * r.nfe}) for r in a.results[:-1])
    b = a.model_copy(update={"machine": machine, "results": rows})
    text = compare(a, b)
    assert "| device |" in text
    assert "tokens/s cannot be compared: different device" in text
    assert "counts (NFE" not in text
    assert "(2.00x)" in next(line for line in text.splitlines() if line.startswith("| graph 4"))
    assert "only in the first run: auto" in text

    data = a.data.model_copy(update={"sha256": "f" * 64})
    text = compare(a, b.model_copy(update={"data": data}))
    assert "counts (NFE, positions, steps) and accuracy cannot be compared" in text
    assert "(2.00x)" not in text


def test_in_bfloat16_another_device_spoils_counts_and_identity_is_compared() -> None:
    a = example_bench()
    machine = a.machine.model_copy(update={"dtype": "bfloat16, prepacked"})
    a = a.model_copy(update={"machine": machine})
    other = machine.model_copy(update={"device": "another core"})
    rows = tuple(r.model_copy(update={"differing": r.compared and 1}) for r in a.results)
    text = compare(a, a.model_copy(update={"machine": other, "results": rows}))
    assert "accuracy cannot be compared: different device" in text
    assert "yes -> no: 1 of 2 (50%)" in next(
        line for line in text.splitlines() if line.startswith("| graph 4")
    )


def test_plain_decoding_that_does_not_repeat_is_told() -> None:
    bench = example_bench()
    base = bench.results[0].model_copy(update={"differing": 1})
    bench = bench.model_copy(update={"results": (base, *bench.results[1:])})
    assert tables.identical(bench, base) == "no: 1 of 2 (50%)"
    assert "1 of 2" in bench._repr_html_()


def test_conditions_say_what_times_rest_on() -> None:
    bench = example_bench()
    assert "auto began with" not in dict(report._conditions(bench))
    order = bench.results[1].model_copy(update={"name": "order 4", "kind": "order"})
    bench = bench.model_copy(
        update={
            "costs_known": True,
            "data": bench.data.model_copy(update={"stopped": True}),
            "machine": bench.machine.model_copy(update={"threads": None}),
            "results": (*bench.results, order),
        }
    )
    told = dict(report._conditions(bench))
    assert "measured before" in told["auto began with"]
    assert "stopped early" in told["Data"]
    assert "host's CPU" in told["Order network"]
    assert "freedave has none" in told["Block edges"]


@pytest.mark.parametrize("changed", [{"raw": True}, {"system": "Be brief."}, {"warm_up": 1}])
def test_other_ids_or_what_was_learned_before_spoil_counts(changed: dict[str, Any]) -> None:
    a = example_bench()
    text = compare(a, a.model_copy(update={"data": a.data.model_copy(update=changed)}))
    assert "counts (NFE, positions, steps) and accuracy cannot be compared" in text


def test_values_that_differ_late_are_shown_where_they_do() -> None:
    a = example_bench()
    for before, after, shown in (
        ("x" * 60 + "left", "x" * 60 + "right", ("left", "right")),
        ("x" * 60, "x" * 60 + "more", ("x |", "more |")),
        ("a" * 64, "b" * 64, ("aaaa... |", "bbbb... |")),
        (None, "None", ("none |", "None |")),
        ("none", None, ("'none' |", "None |")),
    ):
        one, other = (
            a.model_copy(update={"data": a.data.model_copy(update={"system": system})})
            for system in (before, after)
        )
        row = next(line for line in compare(one, other).splitlines() if "system message" in line)
        assert all(part in row for part in shown)
        _, _, left, right, _ = row.split("|")
        assert left != right
        assert len(row) < 100


def test_counts_that_learned_from_times_or_from_other_repeats_get_no_ratio() -> None:
    a = example_bench()
    data = a.data.model_copy(update={"repeats": 3})
    rows = tuple(r.model_copy(update={"nfe": 2 * r.nfe}) for r in a.results)
    for b, ratios in (
        (a.model_copy(update={"results": rows}), {"graph 4": 1, "model 4": 1, "auto": 0}),
        (
            a.model_copy(update={"results": rows, "data": data}),
            {"graph 4": 1, "model 4": 0, "auto": 0},
        ),
    ):
        lines = compare(a, b).splitlines()
        for name, count in ratios.items():
            row = next(line for line in lines if line.startswith(f"| {name} "))
            assert row.count("(2.00x)") == count


def test_every_way_of_drafting_has_a_colour(html: str) -> None:
    dots = re.findall(r'class="dot" style="background: var\(--([a-z-]+)\)', html)
    assert len(dots) == len(example_bench().results)
    assert {result.kind for result in example_bench().results} >= {"freedave", "paper", "auto"}
    assert set(dots) <= COLOURS.keys()


# -- draft graphs ---------------------------------------------------------------------------------


def run_graph(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(graph_app, [str(a) for a in arguments])
    if isinstance(done.exception, SpiffyError):
        return 2, str(done.exception)
    return done.exit_code, done.output


def test_show_prints_counts_gains_and_shared_nodes(tmp_path: Path) -> None:
    graph = example_graph()
    graph.save(tmp_path / "graph.json")
    code, printed = run_graph("show", tmp_path / "graph.json")
    assert code == 0
    gain = graph.expected_steps[1] - graph.expected_steps[0]
    share = graph.nodes[0].count / graph.calibration.roots
    assert f"1: +0.0  ({graph.nodes[0].count} roots, {share:.1%}; {gain:+.3f} steps" in printed
    assert printed.count("also from") == sum(len(node.parents) > 1 for node in graph.nodes)
    assert graph.acceptance is not None
    assert f"{len(graph.acceptance.position)} position" in printed
    assert f"{len(graph.acceptance.bigrams)} bigrams" in printed
    assert "an invented core" in printed


def fills(*nodes: tuple[tuple[tuple[int, int], ...], int]) -> tuple[Node, ...]:
    return tuple(Node(fill=fill, parents=(0,), count=count) for fill, count in nodes)


def test_diff_says_what_was_added_removed_and_moved() -> None:
    a, b, c, d = ((0, 0),), ((1, 0),), ((2, 0),), ((3, 0),)
    graph = example_graph().model_copy(update={"expected_steps": (), "acceptance": None})
    roots = graph.calibration.roots
    before = graph.model_copy(update={"nodes": fills((a, 9), (b, 5), (c, 4))})
    after = graph.model_copy(update={"nodes": fills((d, 9), (a, 9), (c, 4), (b, 5))})
    lines = differences(before, after)
    assert "nodes: 1 added (1: +3.0)" in lines
    moved = [line for line in lines if "moved" in line]  # one of the two that changed places
    assert moved in (["nodes: 1 moved (+1.0 from 2 to 4)"], ["nodes: 1 moved (+2.0 from 3 to 3)"])
    assert [line for line in differences(after, before) if "removed" in line] == [
        "nodes: 1 removed (1: +3.0)"
    ]
    counted = graph.model_copy(update={"nodes": fills((a, 9), (b, 2), (c, 4))})
    assert differences(before, counted) == [
        f"acceptance of common nodes: changed most at +1.0, {5 / roots:.1%} -> {2 / roots:.1%} of "
        "roots"
    ]
    assert differences(graph, graph) == []


def test_diff_names_settings_steps_and_the_acceptance_model(tmp_path: Path) -> None:
    ours, theirs = example_graph(), example_graph("paper")
    ours.save(tmp_path / "ours.json")
    theirs.save(tmp_path / "theirs.json")
    code, printed = run_graph("diff", tmp_path / "ours.json", tmp_path / "theirs.json")
    assert code == 1
    assert "calibration: objective expected-steps -> paper" in printed
    assert "acceptance model: removed" in printed
    assert run_graph("diff", tmp_path / "ours.json", tmp_path / "ours.json") == (
        0,
        "no differences\n",
    )


def test_plot_writes_what_the_suffix_says(tmp_path: Path) -> None:
    graph = example_graph().model_copy(update={"cost_profiles": ()})
    graph.save(tmp_path / "graph.json")
    starts = {"svg": b"<?xml", "png": b"\x89PNG", "html": b"<!DOCTYPE html>"}
    for suffix, start in starts.items():
        out = tmp_path / f"graph.{suffix}"
        assert run_graph("plot", tmp_path / "graph.json", "--out", out)[0] == 0
        assert out.read_bytes().startswith(start)
    again = tmp_path / "again.svg"
    run_graph("plot", tmp_path / "graph.json", "--out", again)
    assert again.read_bytes() == (tmp_path / "graph.svg").read_bytes()
    code, said = run_graph("plot", tmp_path / "graph.json", "--out", tmp_path / "graph.gif")
    assert (code, said.count("\n")) == (2, 0)
    assert ".svg, .png or .html" in said


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example_graph().save(tmp_path / "graph.json")
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    for out in ("graph.svg", "graph.html"):
        code, said = run_graph("plot", tmp_path / "graph.json", "--out", tmp_path / out)
        assert code == 2
        assert "pip install 'spiffy-dllm[report]'" in said
        assert not (tmp_path / out).exists()
    with pytest.raises(SpiffyError, match=r"spiffy-dllm\[report\]"):
        write_report(example_bench(), tmp_path / "report.html")


def test_what_was_predicted_is_not_said_to_be_chosen(calibration_html: str) -> None:
    drawn = " ".join(Page(calibration_html).within("svg"))
    assert "predicted to pay: " in drawn
    assert "auto" not in drawn
    profile = example_graph().cost_profiles[0]
    for chosen, said in ((4, "auto chose 4 drafts most often"), (0, "auto chose no drafts")):
        picture = plots.cost(profile, chosen)
        assert picture is not None
        assert said in picture.text
    none = plots.cost(profile, 0, predicted=True)
    assert none is not None
    assert "predicted to pay: no drafts" in none.text


def test_any_names_can_stand_in_pictures() -> None:
    """They are no formulas; and legends leave out none of them."""
    names = ("_first", "$\\frac", "a\x07\u202eb")
    shown = ("_first<", "$\\frac<", "a\\u0007\\u202eb<")
    profile, model = example_graph().cost_profiles[0], example_graph().acceptance
    assert model is not None
    turns = dict.fromkeys(names, profile.turns["graph"])
    position = dict.fromkeys(names, 0.5)
    bench = example_bench()
    pairs = zip(bench.results, names * len(bench.results), strict=False)
    rows = [result.model_copy(update={"name": name + result.name}) for result, name in pairs]
    named = bench.model_copy(update={"results": tuple(rows), "baseline": rows[0].name})
    made = {
        "cost": plots.cost(profile.model_copy(update={"turns": turns})),
        "coefficients": plots.coefficients(model.model_copy(update={"position": position})),
        "speed": plots.speed(named),
        "trade": plots.trade(named),
        "time": plots.time_split(named),
        **{picture.name: picture for picture in plots.acceptance(named)},
    }
    for name, picture in made.items():
        assert picture is not None
        svg = picture.inline()
        assert not {"\x07", "\u202e"} & set(svg)
        assert "mathdefault" not in svg
        if name in ("cost", "coefficients"):
            assert all(label in svg for label in shown)
        if name in ("speed", "trade"):
            assert f" {rows[0].name}<" in svg


def test_auto_that_drafts_nothing_is_in_the_charts() -> None:
    bench = example_bench()
    none = bench.results[-1].model_copy(update={"budget": 0})
    bench = bench.model_copy(update={"results": (*bench.results[:-1], none)})
    for make in (plots.speed, plots.nfe, plots.trade, plots.time_split):
        picture = make(bench)
        assert picture is not None
        assert "auto (" in picture.text
        assert any("auto" in tip for tip in picture.tips.values())
    alone = bench.model_copy(update={"results": (bench.results[0], none)})
    picture = plots.nfe(alone)
    assert picture is not None
    assert "auto (0: " in picture.text


def test_counts_are_told_in_full() -> None:
    bench = example_bench()
    rows = [
        r.model_copy(update={"nfe": 98_304, "tokens_per_second": 12_345.6}) for r in bench.results
    ]
    many = bench.model_copy(update={"results": tuple(rows)})
    for make, said in ((plots.nfe, "98,304"), (plots.tokens_per_second, "12,346")):
        picture = make(many)
        assert picture is not None
        assert all(f": {said} " in tip for tip in picture.tips.values())
        assert picture.text.count(said) == len(rows)
        assert "e+" not in picture.text


def light(colour: str) -> list[float]:
    """A colour's channels as light, each 0 to 1."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def luminance(channels: list[float]) -> float:
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def mixed(colour: str, paper: str, alpha: float) -> str:
    pairs = [(int(colour[k : k + 2], 16), int(paper[k : k + 2], 16)) for k in (1, 3, 5)]
    return "#" + "".join(f"{round(alpha * a + (1 - alpha) * b):02x}" for a, b in pairs)


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_of_the_heat_map_can_be_read(html: str, dark: bool) -> None:
    """Cells are drawn over the page, by their share; the contrast is WCAG's."""
    style = html.split("<style>")[1].split("</style>")[0]
    part = style.split("prefers-color-scheme: dark")[1] if dark else style
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part.split("}")[0]))
    svg = next(s for s in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if 'id="ranks-text"' in s)
    cells = [
        (name, float(alpha))
        for name, alpha in re.findall(r"fill: var\(--([a-z-]+)\); opacity: ([\d.]+)", svg)
        if name in ("graph", "model")
    ]
    assert len(cells) > 8
    assert max(alpha for _, alpha in cells) > 0.3
    texts = set(re.findall(r"fill: var\(--([a-z-]+)\)", svg))
    assert texts <= {"ink", "muted", "graph", "model", "paper"}
    ink = luminance(light(colours["ink"])) + 0.05
    for name, alpha in [*cells, *((name, 0.5) for name in ("graph", "model", "chain", "order"))]:
        ground = luminance(light(mixed(colours[name], colours["paper"], alpha))) + 0.05
        assert max(ink, ground) / min(ink, ground) >= 4.5, (name, alpha)


def test_large_and_empty_graphs_can_be_drawn() -> None:
    from spiffy.bench.plots import draft_graph

    nodes = [Node(fill=((0, 0),), parents=(0,), count=300)]
    nodes += [Node(fill=((0, 0), (k, 0)), parents=(1,), count=300 - k) for k in range(1, 300)]
    picture = draft_graph(nodes, 300)
    assert picture is not None
    assert picture.inline().count('class="tip"') == 300
    assert draft_graph([], 0) is None


def test_templates_ship_with_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["spiffy.bench"]
    shipped = {file for pattern in patterns for file in (ROOT / "bench").glob(pattern)}
    assert {*(ROOT / "bench" / "templates").iterdir()} <= shipped


# -- in a browser ---------------------------------------------------------------------------------


def forward(browser: Browser) -> int:
    return int(browser.js("document.getElementById('player-slider').value"))


def status(browser: Browser) -> str:
    return str(browser.js("document.getElementById('player-status').textContent"))


@needs_browser
@pytest.mark.parametrize("fixture", ["html", "hostile_html", "calibration_html"])
def test_a_page_renders_on_phone_and_desktop_without_errors_or_requests(
    browser: Browser, tmp_path: Path, request: pytest.FixtureRequest, fixture: str
) -> None:
    path = tmp_path / "report.html"
    path.write_text(request.getfixturevalue(fixture), encoding="utf-8")
    browser.open(path.as_uri(), 390)
    browser.requests()  # what starting the browser asked for
    for width in (390, 1280):
        browser.open(path.as_uri(), width)
        assert browser.js("document.documentElement.scrollWidth") <= width
        narrow = "[...document.querySelectorAll('svg.plot')].filter(s => s.clientWidth < 200)"
        assert browser.js(f"{narrow}.length") == 0
    assert browser.errors() == []
    requests = browser.requests()
    assert path.as_uri() in requests
    assert [url for url in requests if not url.startswith((path.as_uri(), "data:"))] == []


@needs_browser
def test_the_step_through_obeys_slider_buttons_and_keys(
    browser: Browser, tmp_path: Path, html: str
) -> None:
    walk = example_bench().walkthrough
    assert walk is not None
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    browser.open(path.as_uri(), 1280)
    count = len(walk.turns)
    assert forward(browser) == 1
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert forward(browser) == 3
    browser.press("ArrowLeft")
    assert forward(browser) == 2
    assert status(browser).startswith(f"Forward 2 of {count}, block ")
    browser.js("document.getElementById('player-next').click()")
    assert forward(browser) == 3
    shown = "document.getElementById('player-slider')"
    browser.driver.execute_script(
        f"{shown}.value = {count}; {shown}.dispatchEvent(new Event('input'))"
    )
    steps = sum(len(turn.steps) for turn in walk.turns)
    assert f"So far {steps} steps in {count} forwards" in status(browser)
    cells = "document.querySelectorAll('#player-answer .tok:not(.given)')"
    texts = browser.js(f"[...{cells}].map(e => e.firstChild.textContent)")
    committed = {p: visible(t) for turn in walk.turns for step in turn.steps for p, t in step}
    last = walk.answer_start + len(texts)
    assert last >= max(p + 1 for p in committed)
    assert texts == [committed.get(p, "_") for p in range(walk.answer_start, last)]
    # The forward with most accepted drafts: its lines say so.
    best = max(range(count), key=lambda k: sum(d.accepted for d in walk.turns[k].drafts))
    browser.driver.execute_script(
        f"{shown}.value = {best + 1}; {shown}.dispatchEvent(new Event('input'))"
    )
    turn = walk.turns[best]
    rows = "#player-drafts tbody tr"
    assert browser.js(f"document.querySelectorAll('{rows}').length") == len(turn.drafts) + 2
    accepted = browser.js(f"document.querySelectorAll('{rows}.accepted').length")
    assert accepted == sum(draft.accepted for draft in turn.drafts) > 0
    assert browser.errors() == []


@needs_browser
def test_tokens_that_policy_joint_replaces_are_no_masks(browser: Browser, tmp_path: Path) -> None:
    bench = example_bench()
    assert bench.walkthrough is not None
    start = bench.walkthrough.answer_start
    span = bench.walkthrough.turns[0].span
    draft = Draft(fill=((start, "new"), (start + 1, "b")), parents=(0,), accepted=True)
    turns = (
        Turn(block=0, span=span, drafts=(), steps=(((start, "old"),),), seconds=0.1),
        Turn(
            block=0,
            span=span,
            drafts=(draft,),
            steps=((), ((start, "new"), (start + 1, "b")), ((start + 2, "c"),)),
            seconds=0.1,
        ),
    )
    walk = bench.walkthrough.model_copy(update={"turns": turns})
    bare = {"profile": None, "nodes": (), "results": bench.results[:1]}
    html_of(bench.model_copy(update={"walkthrough": walk, **bare}), tmp_path)
    browser.open((tmp_path / "report.html").as_uri(), 1280)
    browser.press("ArrowRight")
    rows = browser.js(
        "[...document.querySelectorAll('#player-drafts tbody tr')]"
        ".map(r => [...r.children].map(c => c.textContent))"
    )
    assert rows == [
        ["root", "old", "_", "_", "the state so far"],
        ["1 (from root)", "new", "b", "_", "accepted: the state after step 2"],
        ["committed", "new2", "b2", "c3", "3 steps"],
    ]
    assert browser.errors() == []


@needs_browser
def test_printing_shows_all_forwards(browser: Browser, tmp_path: Path, html: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    browser.open(path.as_uri(), 1280)
    assert not browser.js("document.getElementById('player-list').open")
    pdf = browser.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert len(pdf["data"]) > 10_000
    assert browser.js("document.getElementById('player-list').open")


def test_a_walkthrough_without_drafts_or_prompt_tokens_is_fine(tmp_path: Path) -> None:
    bench = example_bench()
    walk = bench.walkthrough
    assert walk is not None
    turns = tuple(turn.model_copy(update={"drafts": ()}) for turn in walk.turns)
    walk = walk.model_copy(update={"turns": turns, "prompt_tokens": ()})
    rows = tuple(r.model_copy(update={"acceptance": Acceptance()}) for r in bench.results)
    bare = bench.model_copy(update={"walkthrough": walk, "results": rows})
    page = Page(html_of(bare, tmp_path))
    assert "player" in page.ids()
    assert "acceptance" not in page.ids()


def test_a_loaded_graph_gives_the_same_page(calibration_html: str, tmp_path: Path) -> None:
    example_graph().save(tmp_path / "graph.json")
    write_calibration_report(DraftGraph.load(tmp_path / "graph.json"), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == calibration_html
