"""Pictures of a benchmark run and of an artifact; each says in words what it shows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FormatStrFormatter, MaxNLocator, PercentFormatter

from spiffy.bench.figures import (
    COLOURS,
    INK,
    MUTED,
    PAPER,
    STRONG,
    STYLE,
    Picture,
    legend_below,
    listed,
    new_figure,
)
from spiffy.bench.tables import fewer_forwards, interval, more_positions
from spiffy.schemas import AcceptanceModel, CostPoint, CostProfile, Node
from spiffy.schemas.bench import Acceptance, Bench, Interval, MethodKind, Result, Tally

WHO: dict[MethodKind, str] = {
    "plain": "plain",
    "chain": "confident chain",
    "paper": "paper's graph",
    "pruned": "paper's, pruned",
    "graph": "our graph",
    "model": "acceptance model",
    "auto": "auto",
    "perfect": "perfect drafts",
}
_COLOUR: dict[MethodKind, str] = {
    kind: COLOURS["paper-graph" if kind == "paper" else kind] for kind in WHO
}
_MARKER: dict[MethodKind, str] = {
    "plain": "",
    "chain": "s",
    "paper": "D",
    "pruned": "v",
    "graph": "o",
    "model": "^",
    "auto": "*",
    "perfect": "x",
}
_SIZE = (4.5, 3.2)

P = ParamSpec("P")


def _styled(make: Callable[P, Picture | None]) -> Callable[P, Picture | None]:
    """Run a maker of pictures under our style."""

    @wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> Picture | None:
        with matplotlib.rc_context(STYLE):
            return make(*args, **options)

    return made


# -- what drafts cost and bring, by budget ---------------------------------------------------------


def nfe(bench: Bench) -> Picture | None:
    """Forwards by budget."""
    return _by_budget(
        bench, "nfe", "Model forwards (NFE)", "forwards, all prompts", lambda r: float(r.nfe)
    )


def positions(bench: Bench) -> Picture | None:
    """Positions computed by budget."""
    return _by_budget(
        bench,
        "positions",
        "Positions computed",
        "token positions, all prompts",
        lambda r: float(r.positions_computed),
    )


def tokens_per_second(bench: Bench) -> Picture | None:
    """Tokens per second by budget."""
    return _by_budget(
        bench, "tokens-per-second", "Throughput", "tokens/s", lambda r: r.tokens_per_second
    )


def speed(bench: Bench) -> Picture | None:
    """Speed against plain decoding by budget, with intervals."""
    return _by_budget(
        bench,
        "speed",
        "Speed against plain decoding",
        "times as fast (95% interval)",
        lambda r: r.speedup.value,
        lambda r: r.speedup,
    )


@_styled
def _by_budget(
    bench: Bench,
    name: str,
    title: str,
    unit: str,
    value: Callable[[Result], float],
    spread: Callable[[Result], Interval] | None = None,
) -> Picture | None:
    curves = _curves(bench)
    if not curves:
        return None
    figure = new_figure(*_SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    for at, (kind, results) in enumerate(curves.items()):
        # A little apart, or intervals would hide each other.
        shift = 1.0 if spread is None else 1.035 ** (at - (len(curves) - 1) / 2)
        x, y = [(r.budget or 0) * shift for r in results], [value(r) for r in results]
        axes.plot(x, y, label=WHO[kind], **_look(kind))
        if spread is not None:
            intervals = [spread(r) for r in results]
            low, high = [i.low for i in intervals], [i.high for i in intervals]
            axes.vlines(x, low, high, color=_COLOUR[kind], linewidth=1.2)
        told = [f"{r.name}: {value(r):,.4g} {unit}" for r in results]
        if spread is not None:
            told = [f"{r.name}: {interval(spread(r))}" for r in results]
        tips |= _points(axes, x, y, told, name)
        words.append(f"{WHO[kind]} ({listed([(r.budget, f'{value(r):,.4g}') for r in results])})")
    for result, dash in zip(_plains(bench), _DASHES, strict=False):
        axes.axhline(value(result), color=COLOURS["plain"], linestyle=dash, label=result.name)
        words.append(f"{result.name} ({value(result):,.4g})")
    budgets = sorted({r.budget or 0 for results in curves.values() for r in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.margins(x=0.06, y=0.08)
    axes.set_xlabel("most drafts per forward")
    if spread is None:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.set_yticks([tick for tick in _RATIOS if bottom <= tick <= top])
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.minorticks_off()
    axes.set_title(title)
    axes.set_ylabel(unit)
    legend_below(figure, 3)
    text = f"{title} ({unit}) by most drafts per forward. {'; '.join(words)}."
    return Picture(name, title, text, figure, tips)


_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)
_DASHES = ((0, (5, 3)), (0, (1.5, 2)), (0, (6, 2, 1, 2)))


def _plains(bench: Bench) -> list[Result]:
    return [r for r in bench.results if r.kind == "plain"]


def _look(kind: MethodKind) -> dict[str, Any]:
    return {
        "color": _COLOUR[kind],
        "linestyle": ":" if kind == "perfect" else "-",
        "marker": _MARKER[kind],
        "markersize": 11 if kind == "auto" else 5,
        "zorder": 3 if kind == "auto" else 2,
    }


def _curves(bench: Bench) -> dict[MethodKind, list[Result]]:
    """Results with a budget, by kind and ascending."""
    curves: dict[MethodKind, list[Result]] = {}
    for kind in WHO:
        results = [r for r in bench.results if r.kind == kind != "plain" and r.budget]
        if results:
            curves[kind] = sorted(results, key=lambda r: (r.budget or 0, r.name))
    return curves


@_styled
def trade(bench: Bench) -> Picture | None:
    """Forwards saved by positions computed: what memory-bound and compute-bound machines pay."""
    curves = _curves(bench)
    if not curves:
        return None
    figure = new_figure(*_SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    for kind, results in curves.items():
        x = [more_positions(bench, r) for r in results]
        y = [fewer_forwards(bench, r) for r in results]
        axes.plot(x, y, label=WHO[kind], **_look(kind))
        told = [
            f"{r.name}: {f:.2f}x fewer forwards over {p:.2f}x the positions"
            for r, p, f in zip(results, x, y, strict=True)
        ]
        tips |= _points(axes, x, y, told, "trade")
        pairs = [(r.budget, f"{f:.2f} for {p:.2f}") for r, p, f in zip(results, x, y, strict=True)]
        words.append(f"{WHO[kind]} ({listed(pairs)})")
    axes.plot([1], [1], "o", color=COLOURS["plain"], label=bench.baseline)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.margins(y=0.08)
    axes.set_xlabel("positions computed, in plain's")
    axes.set_ylabel("times fewer forwards")
    axes.set_title("What forwards are paid with")
    legend_below(figure, 3)
    text = f"Times fewer forwards for times the positions, by budget: {'; '.join(words)}."
    return Picture("trade", "What forwards are paid with", text, figure, tips)


def _points(
    axes: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str], name: str
) -> dict[str, str]:
    """Invisible targets for the pointer; their texts by gid."""
    tips = {}
    for at, (left, up, text) in enumerate(zip(x, y, texts, strict=True)):
        gid = f"{name}-{len(axes.lines)}-{at}"
        axes.plot([left], [up], "o", color=INK, markersize=12, alpha=0.0, gid=gid)
        tips[gid] = text
    return tips


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "\N{HORIZONTAL ELLIPSIS}"


_PARTS = ("forward", "draft", "verify", "rest")
#: Colours of the parts of a decode's time.
_PART_COLOUR = {
    "forward": COLOURS["model"],
    "draft": COLOURS["chain"],
    "verify": COLOURS["graph"],
    "rest": COLOURS["perfect"],
}


@_styled
def time_split(bench: Bench) -> Picture | None:
    """Where the seconds went, a bar for plain decoding and each way of drafting at its fastest."""
    curves = _curves(bench)
    results = [
        *_plains(bench),
        *(max(curve, key=lambda r: r.speedup.value) for curve in curves.values()),
    ]
    figure = new_figure(_SIZE[0], max(_SIZE[1], 1.15 + 0.24 * len(results)))
    axes = figure.add_subplot()
    tips = {}
    for part in _PARTS:
        left = [
            sum(getattr(r.seconds, before) for before in _PARTS[: _PARTS.index(part)])
            for r in results
        ]
        widths = [getattr(r.seconds, part) for r in results]
        bars = axes.barh(
            range(len(results)),
            widths,
            left=left,
            height=0.66,
            color=_PART_COLOUR[part],
            edgecolor=PAPER,
            linewidth=0.6,
            label=part,
        )
        for at, (bar, r) in enumerate(zip(bars, results, strict=True)):
            bar.set_gid(f"time-{part}-{at}")
            seconds = getattr(r.seconds, part)
            tips[f"time-{part}-{at}"] = f"{r.name}, {part}: {seconds:.3g} s"
    axes.set_yticks(range(len(results)), [_short(r.name) for r in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds, all prompts")
    axes.set_title("Where the time goes")
    legend_below(figure)
    text = "; ".join(
        f"{r.name} ({listed([(p, f'{getattr(r.seconds, p):.3g} s') for p in _PARTS])})"
        for r in results
    )
    title, note = "Where the time goes", "Each way of drafting at the budget that was fastest."
    return Picture("time", title, f"Seconds by part. {text}.", figure, tips, note=note)


# -- which drafts come true -----------------------------------------------------------------------


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
            1,
        ),
        _shares(
            shown,
            "place",
            "Acceptance by place in the block",
            "position in the block, from 1",
            lambda a: a.by_place,
            1,
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


@_styled
def _shares(
    results: Sequence[Result],
    name: str,
    title: str,
    unit: str,
    tallies: Callable[[Acceptance], tuple[Tally, ...]],
    first: int,
) -> Picture | None:
    figure = new_figure(*_SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    for result in results:
        points = [
            (at, tally.accepted / tally.drafted, tally)
            for at, tally in enumerate(tallies(result.acceptance), start=first)
            if tally.drafted
        ]
        if not points:
            continue
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, color=_COLOUR[result.kind], marker=_MARKER[result.kind], label=result.name)
        told = [f"{result.name}, {at}: {s:.1%} of {t.drafted}" for at, s, t in points]
        tips |= _points(axes, x, y, told, name)
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


@_styled
def _walks(results: Sequence[Result]) -> Picture | None:
    results = [r for r in results if sum(r.acceptance.walk_lengths)]
    if not results:
        return None
    figure = new_figure(*_SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    for result in results:
        total = sum(result.acceptance.walk_lengths)
        y = [count / total for count in result.acceptance.walk_lengths]
        x = list(range(len(y)))
        axes.plot(x, y, color=_COLOUR[result.kind], marker=_MARKER[result.kind], label=result.name)
        told = [f"{result.name}: {s:.1%} of forwards, {k} accepted" for k, s in enumerate(y)]
        tips |= _points(axes, x, y, told, "walks")
        words.append(f"{result.name} ({listed([(k, f'{s:.0%}') for k, s in enumerate(y)])})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("drafts accepted in one forward")
    axes.set_ylabel("share of forwards")
    axes.set_title("How far a forward gets")
    legend_below(figure, 3)
    text = f"Share of forwards by drafts accepted in them: {'; '.join(words)}."
    return Picture("walks", "How far a forward gets", text, figure, tips)


_SHOWN_RANKS = 16


@_styled
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
    height = max(_SIZE[1], 0.4 + 0.62 * len(maps) + 0.3 * sum(rows))
    figure = new_figure(_SIZE[0], height)
    all_axes = figure.subplots(len(maps), 1, squeeze=False, height_ratios=rows)[:, 0]
    tips: dict[str, str] = {}
    words: list[str] = []
    for axes, (name, (result, cells)), depth in zip(all_axes, maps.items(), rows, strict=True):
        for (i, j), tally in sorted(cells.items()):
            gid = f"rank-{result.kind}-{i}-{j}"
            tips[gid] = _heat_cell(axes, i, j, tally, _COLOUR[result.kind], columns, gid)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(depth - 0.5, -0.5)
        axes.set_xticks(range(columns))
        axes.set_yticks(range(depth))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("token rank")
        axes.set_title(f"Accepted fills, %: {name}")
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
    """Draw a cell, opaque by share, which works on light and dark pages; returns its tip."""
    share = tally.accepted / tally.drafted
    axes.add_patch(
        Rectangle(
            (i - 0.47, j - 0.45),
            0.94,
            0.9,
            facecolor=colour,
            alpha=0.06 + 0.94 * share,
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
        color=STRONG if share > 0.5 else INK,
    )
    return f"position rank {i}, token rank {j}: {share:.1%} accepted of {tally.drafted} drafted"


# -- costs, graphs, acceptance models -------------------------------------------------------------


@_styled
def cost(profile: CostProfile, chosen: int | None = None, name: str = "cost") -> Picture | None:
    """What a forward costs by number of drafts; `chosen` is what auto took."""
    figure = new_figure(*_SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    styles = {"graph": (COLOURS["graph"], "o"), "model": (COLOURS["model"], "^")}
    curves: list[tuple[str, tuple[CostPoint, ...], str, str]] = [
        ("forward alone", profile.points, INK, "."),
    ]
    for who, points in profile.turns.items():
        colour, marker = styles.get(who, (MUTED, "s"))
        label = {"graph": "with drafting: graph", "model": "with drafting: model"}.get(who, who)
        curves.append((label, points, colour, marker))
    for label, points, colour, marker in curves:
        x, y = [p.drafts for p in points], [1000 * p.seconds for p in points]
        axes.plot(x, y, color=colour, marker=marker, label=label, linewidth=1.4)
        measured = list(zip(x, y, strict=True))
        tips |= _points(axes, x, y, [f"{label}, {n}: {ms:.3g} ms" for n, ms in measured], name)
        words.append(f"{label} ({listed([(n, f'{ms:.3g}') for n, ms in measured])})")
    if chosen is not None:
        axes.axvline(chosen, color=COLOURS["auto"], linestyle=(0, (5, 3)), linewidth=1.4)
        axes.annotate(
            f"auto: {chosen or 'no drafts'}",
            (chosen, 0.95),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=COLOURS["auto"],
        )
        words.append(f"auto chose {chosen} drafts")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("drafts in the forward")
    axes.set_ylabel("ms")
    title = "Cost of a forward, c(n)"
    axes.set_title(title)
    legend_below(figure, 2)
    threads = "" if profile.threads is None else f", threads: {profile.threads}"
    note = f"{profile.device}, {profile.dtype}{threads}."
    if profile.turns:
        note += " With drafting: averaged over roots, of which some have fewer drafts."
    text = f"Milliseconds by drafts: {'; '.join(words)}."
    return Picture(name, title, text, figure, tips, note=note)


@_styled
def expected(
    graph: Sequence[float], model: AcceptanceModel | None = None, name: str = "expected"
) -> Picture | None:
    """Expected steps per forward by budget."""
    curves = {}
    if graph:
        curves["graph"] = ([*range(len(graph))], [*graph], "our graph", "")
    if model is not None and model.expected_steps:
        points = model.expected_steps
        curves["model"] = (
            [p.drafts for p in points],
            [p.steps for p in points],
            "acceptance model",
            "^",
        )
    if not curves:
        return None
    figure = new_figure(*_SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    for who, (x, y, label, marker) in curves.items():
        axes.plot(x, y, color=COLOURS[who], marker=marker, label=label)
        told = [f"{label}, {n} drafts: {s:.3f} steps" for n, s in zip(x, y, strict=True)]
        tips |= _points(axes, x, y, told, name)
        shown = [(n, f"{s:.2f}") for n, s in zip(x, y, strict=True) if n in (0, *_POWERS, x[-1])]
        words.append(f"{label} ({listed(shown)})")
    axes.set_ylim(bottom=1)
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("drafts per forward")
    axes.set_ylabel("denoising steps per forward")
    title = "Expected steps per forward"
    axes.set_title(title)
    legend_below(figure)
    return Picture(name, title, f"{title} by drafts: {'; '.join(words)}.", figure, tips)


_POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@_styled
def coefficients(model: AcceptanceModel) -> Picture | None:
    """The acceptance model's coefficients, largest first."""
    parts = {
        "position: which is committed next": (model.position, COLOURS["model"]),
        "commit: is it committed next": (model.commit or {}, COLOURS["auto"]),
        "token: which one it becomes": (model.token, COLOURS["graph"]),
    }
    parts = {title: ({k: v for k, v in part.items() if v}, c) for title, (part, c) in parts.items()}
    parts = {title: (part, colour) for title, (part, colour) in parts.items() if part}
    if not parts:
        return None
    sizes = [min(_LARGEST, len(part)) for part, _ in parts.values()]
    figure = new_figure(3.6 * len(parts), 0.8 + 0.155 * max(sizes))
    words = []
    for at, (title, (part, colour)) in enumerate(parts.items(), start=1):
        axes = figure.add_subplot(1, len(parts), at)
        ordered = sorted(part.items(), key=lambda item: -abs(item[1]))[:_LARGEST]
        axes.barh(range(len(ordered)), [v for _, v in ordered], color=colour, height=0.7)
        axes.set_yticks(range(len(ordered)), [k for k, _ in ordered], fontsize=7.5)
        axes.set_ylim(max(sizes) - 0.4, -0.6)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_title(title, fontsize=8.5)
        axes.set_xlabel("coefficient")
        words.append(f"{title} ({listed([(k, f'{v:.2g}') for k, v in ordered[:8]])} ...)")
    title = "Coefficients of the acceptance model"
    note = f"At most the {_LARGEST} largest of each."
    text = f"{title}: {'; '.join(words)}."
    return Picture("coefficients", title, text, figure, wide=True, note=note)


_LARGEST = 24  # coefficients shown of each regression


_LABELLED = 48  # nodes that get a label, the most often accepted first


@_styled
def draft_graph(nodes: Sequence[Node], roots: int) -> Picture | None:
    """The draft graph from left (the root) to right, node area by share of roots."""
    if not nodes:
        return None
    place, edges = _layout(nodes)
    deepest = max(x for x, _ in place)
    tallest = max(abs(y) for _, y in place)
    figure = new_figure(max(5.2, 1.35 * deepest + 1.2), min(9.0, max(2.4, 0.62 * tallest + 1.1)))
    axes = figure.add_subplot()
    shared = {number for number, node in enumerate(nodes, start=1) if len(node.parents) > 1}
    for parent, child, first in edges:
        (x0, y0), (x1, y1) = place[parent], place[child]
        axes.plot(
            [x0, x1],
            [y0, y1],
            color=MUTED,
            linewidth=1.1 if first else 0.7,
            linestyle="-" if first else (0, (2, 2)),
            zorder=1,
        )
    labelled = set(
        sorted(range(1, len(nodes) + 1), key=lambda k: (-nodes[k - 1].count, k))[:_LABELLED]
    )
    axes.scatter(*place[0], s=150, color=INK, zorder=2, marker="s")
    axes.annotate("root", place[0], (0, 11), textcoords="offset points", ha="center")
    tips = {}
    top = max(1, max(node.count for node in nodes))
    for number, node in enumerate(nodes, start=1):
        share = node.count / top
        colour = COLOURS["auto"] if number in shared else COLOURS["graph"]
        gid = f"node-{number}"
        axes.scatter(
            *place[number],
            s=14 + 340 * share,
            color=colour,
            edgecolor=PAPER,
            linewidth=0.8,
            zorder=2,
            gid=gid,
        )
        fill = " ".join(f"+{i}.{j}" for i, j in node.fill)
        tips[gid] = f"node {number}: {fill}, {_share(node, roots)}"
        if number in labelled:
            axes.annotate(
                beyond_parent(nodes, number),
                place[number],
                (0, 4.5 + 9.5 * share**0.5),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
                zorder=3,
            )
    axes.set_axis_off()
    axes.margins(x=0.06, y=0.14)
    for label, colour in (("one way there", "graph"), ("several ways there", "auto")):
        axes.scatter([], [], s=40, color=COLOURS[colour], label=label)
    legend_below(figure)
    said = [(k, f"{beyond_parent(nodes, k)} {_share(nodes[k - 1], roots)}") for k in labelled]
    text = (
        f"{len(nodes)} nodes over {deepest} steps; {len(shared)} are reached several ways. "
        f"{listed(sorted(said)[:16])}."
    )
    return Picture(
        "draft-graph",
        "Draft graph",
        text,
        figure,
        tips,
        wide=True,
        note="From the root on the left, a step per column. +2.0 fills in the best token (rank 0) "
        "at the third most confident position (rank 2); area is the share of calibration roots "
        "whose future passed through the state.",
    )


def beyond_parent(nodes: Sequence[Node], number: int) -> str:
    """What a node fills in beyond its first parent, as "+position rank.token rank"."""
    node = nodes[number - 1]
    parent = node.parents[0]
    known = nodes[parent - 1].fill if parent else ()
    return " ".join(f"+{i}.{j}" for i, j in node.fill if (i, j) not in known)


def _share(node: Node, roots: int) -> str:
    return f"{node.count / roots:.1%} of roots" if roots else f"{node.count} roots"


Point = tuple[float, float]


def _layout(nodes: Sequence[Node]) -> tuple[list[Point], list[tuple[int, int, bool]]]:
    """Columns by steps from the root; a first child beside its parent, the others below."""
    depth = [0]
    for node in nodes:
        depth.append(1 + max(depth[parent] for parent in node.parents))
    columns: defaultdict[int, list[int]] = defaultdict(list)
    for number in range(1, len(nodes) + 1):
        columns[depth[number]].append(number)
    y = [0.0] * (len(nodes) + 1)
    siblings: Counter[int] = Counter()
    for _, column in sorted(columns.items()):
        # Parents from above to below, so that no two edges to first parents cross.
        column.sort(key=lambda k: (y[nodes[k - 1].parents[0]], k))
        above = -1.0
        for number in column:
            parent = nodes[number - 1].parents[0]
            above = y[number] = max(y[parent] + siblings[parent], above + 1)
            siblings[parent] += 1
    edges = [
        (parent, number, parent == node.parents[0])
        for number, node in enumerate(nodes, start=1)
        for parent in node.parents
    ]
    return [(float(depth[k]), -y[k]) for k in range(len(y))], edges


def pictures_of(bench: Bench) -> dict[str, list[Picture]]:
    """All pictures of a run by section, those left out that have no data."""
    chosen = next((r.budget for r in bench.results if r.kind == "auto"), None)
    sections: Mapping[str, Iterable[Picture | None]] = {
        "charts": (
            speed(bench),
            tokens_per_second(bench),
            nfe(bench),
            positions(bench),
            trade(bench),
            time_split(bench),
        ),
        "acceptance": acceptance(bench),
        "cost": (() if bench.profile is None else (cost(bench.profile, chosen),)),
        "graph": (draft_graph(bench.nodes, bench.roots),),
    }
    return {name: [p for p in made if p is not None] for name, made in sections.items()}
