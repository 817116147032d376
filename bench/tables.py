"""The results in words and as tables: for pages, Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spiffy.schemas.bench import INTERVAL_PROMPTS, Bench, Interval, Result, Split
from spiffy.schemas.labels import ties_in_words

if TYPE_CHECKING:
    from rich.table import Table

#: Kinds that say what drafting brings: no bound, and no other way of plain decoding.
DRAFTING = ("freedave", "chain", "paper", "pruned", "graph", "model", "order", "auto")


@dataclass(frozen=True)
class Column:
    """A column of the table of results.

    Attributes
    ----------
    heading
        With its unit.
    meaning
        One line for readers who meet it for the first time.
    cell
        Text of a result's cell; empty where it does not apply.
    """

    heading: str
    meaning: str
    cell: Callable[[Bench, Result], str]


def interval(value: Interval) -> str:
    """A ratio with the ends of its interval."""
    return f"{value.value:.2f}x ({value.low:.2f}-{value.high:.2f})"


def ratio(bench: Bench, value: Interval) -> str:
    """A ratio, with its interval where the run has prompts enough for one."""
    return interval(value) if bench.has_intervals else f"{value.value:.2f}x"


def quantity(count: int) -> str:
    """An exact count, in groups of three digits."""
    return f"{count:,}"


def memory(size: int | None) -> str:
    """Bytes as MiB or GiB."""
    if size is None:
        return ""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def shares(seconds: Split) -> str:
    """Where the time went, in percent of the whole."""
    parts = (seconds.forward, seconds.draft, seconds.verify, seconds.rest)
    total = seconds.total or 1.0
    return " / ".join(f"{100 * part / total:.0f}" for part in parts)


def identical(bench: Bench, result: Result) -> str:
    """Whether the tokens are plain decoding's: yes, or how many answers are."""
    if result.name == bench.baseline and not result.differing:
        return "baseline"
    if not result.compared:
        return "other policy"
    if not result.differing:
        return "yes"
    same = result.compared - result.differing
    return f"no: {same} of {result.compared} ({same / result.compared:.0%})"


def accuracy(result: Result) -> str:
    """Share of the scored answers that are right."""
    if not result.scored:
        return ""
    return f"{result.correct / result.scored:.1%} ({result.correct}/{result.scored})"


def fewer_forwards(bench: Bench, result: Result) -> float:
    """How many times fewer forwards than plain decoding."""
    return bench.result(bench.baseline).nfe / result.nfe


def more_positions(bench: Bench, result: Result) -> float:
    """Positions computed, in those of plain decoding."""
    return result.positions_computed / bench.result(bench.baseline).positions_computed


def _nfe(bench: Bench, result: Result) -> str:
    if result.name == bench.baseline:
        return quantity(result.nfe)
    own = ""
    if result.kind == "freedave":  # where nothing is folded, every draft that comes true saves one
        own = f"; without edges {1 + result.accepted_per_forward:.2f}x"
    return f"{quantity(result.nfe)} ({fewer_forwards(bench, result):.2f}x{own})"


def _positions(bench: Bench, result: Result) -> str:
    if result.name == bench.baseline:
        return quantity(result.positions_computed)
    return f"{quantity(result.positions_computed)} ({more_positions(bench, result):.2f}x)"


def _speedup(bench: Bench, result: Result) -> str:
    return "1" if result.name == bench.baseline else ratio(bench, result.speedup)


COLUMNS = (
    Column(
        "method", "How drafts were chosen, and at most how many per forward.", lambda b, r: r.name
    ),
    Column(
        "NFE (times fewer)",
        "Model forwards, every one counted; how many times fewer than plain. FreeDave's chain has "
        "no block edges, so also: than plain decoding without them.",
        _nfe,
    ),
    Column("positions (times plain's)", "Token positions computed in those forwards.", _positions),
    Column(
        "steps per forward",
        "Denoising steps that one forward was worth.",
        lambda b, r: f"{r.steps_per_forward:.2f}",
    ),
    Column(
        "accepted per forward",
        "Drafts that came true, per forward.",
        lambda b, r: f"{r.accepted_per_forward:.2f}" if r.drafted else "",
    ),
    Column(
        "tokens/s", "Tokens per second, all prompts.", lambda b, r: f"{r.tokens_per_second:.1f}"
    ),
    Column(
        "speed against plain",
        "Seconds of plain decoding over seconds of this, median over prompts (95% interval, "
        f"from {INTERVAL_PROMPTS} prompts on).",
        _speedup,
    ),
    Column(
        "forward / draft / verify / rest, %",
        "Where the time went: the transformer; choosing drafts; policy and comparing states; "
        "packing, caches. Output head and softmax are in verify on a CPU, else in forward.",
        lambda b, r: shares(r.seconds),
    ),
    Column(
        "peak memory", "Of the process (CPU) or allocated (GPU).", lambda b, r: memory(r.peak_bytes)
    ),
    Column("tokens identical", "Answers that are plain decoding's, token for token.", identical),
    Column(
        "accuracy", "Answers that are right, of those that can be scored.", lambda b, r: accuracy(r)
    ),
)


def columns(bench: Bench) -> tuple[Column, ...]:
    """Columns that say something about this run."""
    return tuple(c for c in COLUMNS if any(c.cell(bench, r) for r in bench.results))


def markdown(bench: Bench) -> str:
    """The table of results as Markdown, one line per method."""
    return markdown_table(
        [column.heading for column in columns(bench)],
        [[column.cell(bench, result) for column in columns(bench)] for result in bench.results],
    )


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join("| " + " | ".join(map(_markdown_cell, line)) + " |\n" for line in lines)


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split()) or "-"


#: What a terminal of 80 to 100 characters has room for.
_TERMINAL = (
    "method",
    *(column.heading for column in COLUMNS[1:3]),
    "tokens/s",
    "speed against plain",
)


def terminal_table(bench: Bench) -> Table:
    """The columns that decide, for the terminal."""
    from rich.table import Table

    table = Table(title=describe(bench), caption=headline(bench).sentence, caption_justify="left")
    shown = [c for c in columns(bench) if c.heading in (*_TERMINAL, "tokens identical", "accuracy")]
    for column in shown:
        justify: Literal["left", "right"] = "left" if column is COLUMNS[0] else "right"
        table.add_column(column.heading, justify=justify, no_wrap=column.cell is _speedup)
    for result in bench.results:
        table.add_row(*(column.cell(bench, result) for column in shown))
    return table


def describe(bench: Bench) -> str:
    """Model and settings in one line."""
    d = bench.decoding
    return (
        f"{bench.model.id}: {d.policy}, cache {d.cache}, block {d.block_length}, "
        f"{bench.data.samples} prompts of {bench.data.dataset}, {bench.machine.device} "
        f"{bench.machine.dtype}"
    )


@dataclass(frozen=True)
class Headline:
    """What a run says in one sentence.

    Attributes
    ----------
    verdict
        "pays": the best way of drafting is faster than plain decoding, its whole interval is.
        "unclear": its interval holds 1, or there are too few prompts for one. "slower": its whole
        interval lies below 1. "none": nothing was drafted losslessly.
    best
        The fastest lossless way of drafting; None with "none".
    sentence
        The same in words.
    """

    verdict: str
    best: Result | None
    sentence: str


def headline(bench: Bench) -> Headline:
    """Judge a run by the wall clock of what loses nothing.

    On an exact cache that is all drafting: an answer that differs there is a near-tie, or a mistake
    of ours that the sentence must not hide. On others it is what gave plain decoding's tokens.
    """
    plain, exact = bench.result(bench.baseline), bench.decoding.exact
    lossless = [r for r in drafting(bench) if r.compared and (exact or not r.differing)]
    if not lossless:
        return Headline("none", None, "Nothing here drafts and gives plain decoding's tokens.")
    best = max(lossless, key=lambda r: (r.speedup.value, -r.nfe))
    few = not bench.has_intervals
    if few:
        verdict, words = "unclear", "against plain decoding"
    elif best.speedup.low > 1:
        verdict, words = "pays", "is faster than plain decoding"
    elif best.speedup.high < 1:
        verdict, words = "slower", "is slower than plain decoding: nothing pays here"
    else:
        verdict, words = "unclear", "is as fast as plain decoding, as far as can be told"
    auto = next((r for r in bench.results if r.kind == "auto"), None)
    sentence = "" if auto is None else _of_auto(bench, auto)
    sentence += (
        f"The fastest lossless method, {best.name}, {words}: {ratio(bench, best.speedup)} its "
        f"speed, with {fewer_forwards(bench, best):.2f}x fewer forwards ({best.nfe:,} instead of "
        f"{plain.nfe:,}) over {more_positions(bench, best):.2f}x the positions."
    )
    if few:
        sentence += (
            f" Too few prompts to say whether it is faster ({bench.data.samples}): an interval "
            f"needs {INTERVAL_PROMPTS}."
        )
    fewest = min(lossless, key=lambda r: r.nfe)
    if fewest.nfe < best.nfe:
        sentence += (
            f" Fewest forwards: {fewest.name}, {fewer_forwards(bench, fewest):.2f}x fewer over "
            f"{more_positions(bench, fewest):.2f}x the positions, at "
            f"{fewest.speedup.value:.2f}x the speed."
        )
    sentence += _of_ties(bench, best)
    for other in bench.results:
        if other.kind == "plain" and not other.compared:
            sentence += (
                f" For reference, {other.name} gives other tokens at "
                f"{other.speedup.value:.2f}x the speed"
            )
            if other.scored and plain.scored:
                sentence += (
                    f" ({other.correct}/{other.scored} right, {plain.name} "
                    f"{plain.correct}/{plain.scored})"
                )
            sentence += "."
    return Headline(verdict, best, sentence)


def _of_ties(bench: Bench, best: Result) -> str:
    """How many answers are not plain decoding's: of the method that is named, and of any."""
    most = max(drafting(bench), key=lambda r: r.differing)
    if not (bench.decoding.exact and most.differing):
        return ""
    dtype = bench.machine.dtype.split(",")[0]
    cause, finer = ties_in_words(dtype)
    return (
        f" Of the {best.compared} answers of {best.name} {best.differing} differ from plain "
        f"decoding's; the most are {most.differing}, of {most.name}. In {dtype} {cause}: see "
        f"whether they still do with --dtype {finer}."
    )


def _of_auto(bench: Bench, auto: Result) -> str:
    """What comes by default: the number of drafts is learned while decoding."""
    speed = ratio(bench, auto.speedup)
    if not auto.drafted:
        return (
            f"Learning while it decoded, auto decided not to draft ({speed}: plain decoding beside "
            "itself). "
        )
    return (
        f"Learned while decoding (auto): {speed} plain decoding's speed, with "
        f"{fewer_forwards(bench, auto):.2f}x fewer forwards. "
    )


def drafting(bench: Bench) -> list[Result]:
    """Results that drafted anything, bounds left out."""
    return [r for r in bench.results if r.kind in DRAFTING and r.drafted]
