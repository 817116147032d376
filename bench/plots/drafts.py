"""Pictures of which drafts come true."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from spiffy.bench.plots.style import (
    COLOUR_OF,
    INK,
    SIZE,
    WHO,
    Picture,
    label_of,
    legend_below,
    listed,
    new_figure,
    points_and_line,
    styled,
    targets,
)
from spiffy.schemas.bench import Acceptance, Bench, MethodKind, Result, Tally
from spiffy.schemas.html import presentable


def acceptance(bench: Bench) -> list[Picture]:
    """By depth, by place in the block, by length of the walk, and by rank."""
    shown = _representatives(bench)
    made = [
        _shares(
            shown,
            "depth",
            "Acceptance by depth",
            "positions that a draft fills in",
            lambda a: a.by_depth,
        ),
        _shares(
            shown,
            "place",
            "Acceptance by place in the block",
            "position in the block, from 1",
            lambda a: a.by_place,
        ),
        _walks(shown),
        _ranks(_two_largest(shown)),
    ]
    return [picture for picture in made if picture is not None]


def _representatives(bench: Bench) -> list[Result]:
    """Of every way of drafting the result with the largest budget, auto left out."""
    largest: dict[MethodKind, Result] = {}
    for result in bench.results:
        if result.kind in ("plain", "perfect", "auto") or not result.acceptance.by_depth:
            continue
        known = largest.get(result.kind)
        if known is None or (result.budget or 0) > (known.budget or 0):
            largest[result.kind] = result
    return [largest[kind] for kind in WHO if kind in largest]


def _two_largest(shown: Sequence[Result]) -> list[Result]:
    """The rank maps worth their room: ours, static and chosen at run time."""
    ours = [r for r in shown if r.kind in ("graph", "model")]
    return ours or list(shown[:1])


@styled
def _shares(
    results: Sequence[Result],
    name: str,
    title: str,
    unit: str,
    tallies: Callable[[Acceptance], tuple[Tally, ...]],
) -> Picture | None:
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    for result in results:
        points = [
            (at, tally.accepted / tally.drafted, tally)
            for at, tally in enumerate(tallies(result.acceptance), start=1)
            if tally.drafted
        ]
        if not points:
            continue
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, label=label_of(result.name), **points_and_line(result.kind))
        told = [f"{result.name}, {at}: {s:.1%} of {t.drafted}" for at, s, t in points]
        tips |= targets(axes, x, y, told, name)
        words.append(f"{result.name} ({listed([(at, f'{s:.0%}') for at, s, _ in points])})")
    if not words:
        return None
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(unit)
    axes.set_ylabel("accepted, of those verified")
    axes.set_title(title)
    legend_below(figure, 3)
    return Picture(name, title, f"{title}: {'; '.join(words)}.", figure, tips)


@styled
def _walks(results: Sequence[Result]) -> Picture | None:
    results = [r for r in results if sum(r.acceptance.walk_lengths)]
    if not results:
        return None
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    for result in results:
        total = sum(result.acceptance.walk_lengths)
        y = [count / total for count in result.acceptance.walk_lengths]
        x = list(range(len(y)))
        axes.plot(x, y, label=label_of(result.name), **points_and_line(result.kind))
        told = [f"{result.name}: {s:.1%} of forwards, {k} accepted" for k, s in enumerate(y)]
        tips |= targets(axes, x, y, told, "walks")
        words.append(f"{result.name} ({listed([(k, f'{s:.0%}') for k, s in enumerate(y)])})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("drafts accepted in one forward")
    axes.set_ylabel("share of forwards with drafts")
    axes.set_title("How far a forward gets")
    legend_below(figure, 3)
    text = f"Share of forwards by drafts accepted in them: {'; '.join(words)}."
    return Picture("walks", "How far a forward gets", text, figure, tips)


_SHOWN_RANKS = 16


@styled
def _ranks(results: Sequence[Result]) -> Picture | None:
    maps = {}
    for result in results:
        cells = {
            (tally.position_rank, tally.token_rank): tally
            for tally in result.acceptance.by_rank
            if tally.drafted and tally.position_rank < _SHOWN_RANKS
        }
        if cells:
            maps[result.name] = (result, cells)
    if not maps:
        return None
    columns = 1 + max(i for _, cells in maps.values() for i, _ in cells)
    rows = [1 + max(j for _, j in cells) for _, cells in maps.values()]
    height = max(SIZE[1], 0.4 + 0.62 * len(maps) + 0.3 * sum(rows))
    figure = new_figure(SIZE[0], height)
    all_axes = figure.subplots(len(maps), 1, squeeze=False, height_ratios=rows)[:, 0]
    tips: dict[str, str] = {}
    words: list[str] = []
    for axes, (name, (result, cells)), depth in zip(all_axes, maps.items(), rows, strict=True):
        for (i, j), tally in sorted(cells.items()):
            gid = f"rank-{result.kind}-{i}-{j}"
            tips[gid] = _heat_cell(axes, i, j, tally, COLOUR_OF[result.kind], columns, gid)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(depth - 0.5, -0.5)
        axes.set_xticks(range(columns))
        axes.set_yticks(range(depth))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("token rank")
        axes.set_title(f"Accepted fills, %: {presentable(name)}")
        shares = [(key, f"{t.accepted / t.drafted:.0%}") for key, t in sorted(cells.items())]
        words.append(f"{name} ({listed(shares)})")
    all_axes[-1].set_xlabel("position rank (0: most confident)")
    text = (
        "Share of drafted fills that were in accepted drafts, by (position rank, token rank): "
        f"{'; '.join(words)}."
    )
    return Picture("ranks", "Accepted fills by rank", text, figure, tips)


def _heat_cell(
    axes: Axes, i: int, j: int, tally: Tally, colour: str, columns: int, gid: str
) -> str:
    """Draw a cell, opaque by share, which works on light and dark pages; returns its tip.

    Never more than half: whatever the page, its ink can be read on that.
    """
    share = tally.accepted / tally.drafted
    axes.add_patch(
        Rectangle(
            (i - 0.47, j - 0.45),
            0.94,
            0.9,
            facecolor=colour,
            alpha=0.06 + 0.44 * share,
            linewidth=0,
            gid=gid,
        )
    )
    axes.text(
        i,
        j,
        "<1" if 0 < share < 0.005 else f"{100 * share:.0f}",
        ha="center",
        va="center",
        fontsize=8.5 if columns <= 10 else 7,
        color=INK,
    )
    return f"position rank {i}, token rank {j}: {share:.1%} accepted of {tally.drafted} drafted"
