"""Pictures of a benchmark run: what drafts cost and bring, by budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.ticker import EngFormatter, FormatStrFormatter

from spiffy.bench.plots.style import (
    COLOUR_OF,
    COLOURS,
    MARKER_OF,
    PAPER,
    SIZE,
    WHO,
    Picture,
    label_of,
    legend_below,
    listed,
    new_figure,
    styled,
    targets,
)
from spiffy.bench.tables import fewer_forwards, more_positions, ratio
from spiffy.schemas.bench import Bench, Interval, MethodKind, Result
from spiffy.schemas.html import presentable


def nfe(bench: Bench) -> Picture | None:
    """Forwards by budget."""
    return _by_budget(
        bench, "nfe", "Model forwards (NFE)", "forwards, all prompts", lambda r: r.nfe
    )


def positions(bench: Bench) -> Picture | None:
    """Positions computed by budget."""
    return _by_budget(
        bench,
        "positions",
        "Positions computed",
        "token positions, all prompts",
        lambda r: r.positions_computed,
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
        f"times as fast{' (95% interval)' if bench.has_intervals else ''}",
        lambda r: r.speedup.value,
        lambda r: r.speedup,
    )


@styled
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
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    budgets = sorted({r.budget or 0 for results in curves.values() for r in results})
    # On an axis of powers 0 drafts stand where half of the fewest would.
    place = {n: float(n) or min(filter(None, budgets), default=2) / 2 for n in budgets}
    for at, (kind, results) in enumerate(curves.items()):
        # A little apart, or intervals would hide each other.
        shift = 1.0 if spread is None else 1.035 ** (at - (len(curves) - 1) / 2)
        x, y = [place[r.budget or 0] * shift for r in results], [value(r) for r in results]
        axes.plot(x, y, label=WHO[kind], **_look(kind))
        if spread is not None and bench.has_intervals:
            intervals = [spread(r) for r in results]
            low, high = [i.low for i in intervals], [i.high for i in intervals]
            axes.vlines(x, low, high, color=COLOUR_OF[kind], linewidth=1.2)
        told = [f"{r.name}: {_number(value(r))} {unit}" for r in results]
        if spread is not None:
            told = [f"{r.name}: {ratio(bench, spread(r))}" for r in results]
        tips |= targets(axes, x, y, told, name)
        words.append(f"{WHO[kind]} ({listed([(r.budget, _number(value(r))) for r in results])})")
    for result, dash in zip(_plains(bench), _DASHES, strict=False):
        label = label_of(result.name)
        axes.axhline(value(result), color=COLOURS["plain"], linestyle=dash, label=label)
        words.append(f"{result.name} ({_number(value(result))})")
    axes.set_xscale("log", base=2)
    axes.set_xticks([*place.values()], [str(budget) for budget in place])
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


def _number(value: float) -> str:
    """Counts in full, others with what can be told of them."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)
_DASHES = ((0, (5, 3)), (0, (1.5, 2)), (0, (6, 2, 1, 2)))


def _plains(bench: Bench) -> list[Result]:
    return [r for r in bench.results if r.kind == "plain"]


def _look(kind: MethodKind) -> dict[str, Any]:
    return {
        "color": COLOUR_OF[kind],
        "linestyle": ":" if kind == "perfect" else "-",
        "marker": MARKER_OF[kind],
        "markersize": 11 if kind == "auto" else 5,
        "zorder": 3 if kind == "auto" else 2,
    }


def _curves(bench: Bench) -> dict[MethodKind, list[Result]]:
    """Results with a budget, by kind and ascending; auto's is 0 where it mostly drafted nothing."""
    curves: dict[MethodKind, list[Result]] = {}
    for kind in WHO:
        results = [r for r in bench.results if r.kind == kind and r.budget is not None]
        if results:
            curves[kind] = sorted(results, key=lambda r: (r.budget or 0, r.name))
    return curves


@styled
def trade(bench: Bench) -> Picture | None:
    """Forwards saved by positions computed: what memory-bound and compute-bound machines pay."""
    curves = _curves(bench)
    if not curves:
        return None
    figure = new_figure(*SIZE)
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
        tips |= targets(axes, x, y, told, "trade")
        pairs = [(r.budget, f"{f:.2f} for {p:.2f}") for r, p, f in zip(results, x, y, strict=True)]
        words.append(f"{WHO[kind]} ({listed(pairs)})")
    axes.plot([1], [1], "o", color=COLOURS["plain"], label=label_of(bench.baseline))
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


@styled
def time_split(bench: Bench) -> Picture | None:
    """Where the seconds went, a bar for plain decoding and each way of drafting at its fastest."""
    curves = _curves(bench)
    results = [
        *_plains(bench),
        *(max(curve, key=lambda r: r.speedup.value) for curve in curves.values()),
    ]
    figure = new_figure(SIZE[0], max(SIZE[1], 1.15 + 0.24 * len(results)))
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
    axes.set_yticks(range(len(results)), [_short(presentable(r.name)) for r in results])
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
