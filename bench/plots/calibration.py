"""Pictures of an artifact: costs, expected steps, coefficients."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from spiffy.bench.plots.style import (
    COLOURS,
    INK,
    MUTED,
    SIZE,
    Picture,
    label_of,
    legend_below,
    listed,
    new_figure,
    styled,
    targets,
)
from spiffy.schemas import AcceptanceModel, CostPoint, CostProfile
from spiffy.schemas.labels import device_in_words, shown_budgets


@styled
def cost(
    profile: CostProfile, chosen: int | None = None, name: str = "cost", *, predicted: bool = False
) -> Picture | None:
    """What a forward costs by number of drafts.

    Parameters
    ----------
    chosen
        Drafts that auto took for most forwards, or that are `predicted` to pay; 0: none.
    """
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    styles = {"graph": (COLOURS["graph"], "o"), "model": (COLOURS["model"], "^")}
    curves: list[tuple[str, tuple[CostPoint, ...], str, str]] = [
        ("forward alone", profile.points, INK, "."),
    ]
    for way, points in profile.turns.items():
        colour, marker = styles.get(way, (MUTED, "s"))
        label = {"graph": "with drafting: graph", "model": "with drafting: model"}.get(way, way)
        curves.append((label, points, colour, marker))
    for label, points, colour, marker in curves:
        x, y = [p.drafts for p in points], [1000 * p.seconds for p in points]
        axes.plot(x, y, color=colour, marker=marker, label=label_of(label), linewidth=1.4)
        measured = list(zip(x, y, strict=True))
        tips |= targets(axes, x, y, [f"{label}, {n}: {ms:.3g} ms" for n, ms in measured], name)
        words.append(f"{label} ({listed([(n, f'{ms:.3g}') for n, ms in measured])})")
    if chosen is not None:
        axes.axvline(chosen, color=COLOURS["auto"], linestyle=(0, (5, 3)), linewidth=1.4)
        axes.annotate(
            f"{'predicted to pay' if predicted else 'auto'}: {chosen or 'no drafts'}",
            (chosen, 0.95),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=COLOURS["auto"],
        )
        drafts = f"{chosen} drafts" if chosen else "no drafts"
        words.append(
            f"predicted to pay: {drafts}" if predicted else f"auto chose {drafts} most often"
        )
    axes.set_ylim(bottom=0)
    axes.margins(x=0.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("drafts in the forward")
    axes.set_ylabel("ms")
    title = "Cost of a forward, c(n)"
    axes.set_title(title)
    legend_below(figure, 2)
    note = f"{device_in_words(profile.device, profile.dtype, profile.threads)}."
    if profile.turns:
        note += " With drafting: averaged over roots, of which some have fewer drafts."
    text = f"Milliseconds by drafts: {'; '.join(words)}."
    return Picture(name, title, text, figure, tips, note=note)


@styled
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
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    tips: dict[str, str] = {}
    words: list[str] = []
    for way, (x, y, label, marker) in curves.items():
        axes.plot(x, y, color=COLOURS[way], marker=marker, label=label)
        told = [f"{label}, {n} drafts: {s:.3f} steps" for n, s in zip(x, y, strict=True)]
        tips |= targets(axes, x, y, told, name)
        named = (0, *shown_budgets(x[-1]))
        shown = [(n, f"{s:.2f}") for n, s in zip(x, y, strict=True) if n in named]
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


@styled
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
        axes.set_yticks(range(len(ordered)), [label_of(k) for k, _ in ordered], fontsize=7.5)
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
