"""Figures as SVG: one style, colours that a page replaces, equal bytes for equal data."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spiffy.schemas.bench import MethodKind
from spiffy.schemas.html import presentable

#: Colours by role, told apart by the colour-blind too and dark enough on white. Each is used for
#: one role only, because a page replaces them by CSS variables of the same name to go dark.
INK, MUTED, GRID, PAPER = "#1f2329", "#5a6570", "#d8dde3", "#ffffff"
COLOURS = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "paper": PAPER,
    "plain": "#59646f",
    "chain": "#a36a00",
    "paper-graph": "#a1347c",
    "pruned": "#5b4db3",
    "graph": "#00785a",
    "model": "#0066b0",
    "order": "#8c1d2f",
    "auto": "#c4430b",
    "perfect": "#6d7680",
}

#: matplotlib's settings (Any: their type would list every one there is).
STYLE: Any = {
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are anybody's, and no formulas
}


@dataclass
class Picture:
    """A figure with what it says in words.

    Attributes
    ----------
    name
        Unique on a page: letters, digits and hyphens.
    title
        What it shows.
    text
        What is to be seen in it: the text alternative.
    tips
        Texts shown when pointing at elements, by the element's `gid`.
    wide
        Whether it needs the whole width of a page.
    note
        Printed below it.
    """

    name: str
    title: str
    text: str
    figure: Figure
    tips: Mapping[str, str] = field(default_factory=dict)
    wide: bool = False
    note: str = ""

    def inline(self) -> str:
        """SVG element for a page, its colours left to the page's CSS."""
        return _inline(self)

    def file(self, kind: str) -> bytes:
        """Content of an svg or png file, on white."""
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        with matplotlib.rc_context(self._style()):
            self.figure.savefig(buffer, format=kind, dpi=200, facecolor=PAPER, metadata=metadata)
        return buffer.getvalue()

    def _style(self) -> Any:
        # Without a salt, names of clip paths and markers are random; and they must differ between
        # the pictures of a page.
        return {**STYLE, "svg.hashsalt": f"spiffy-{self.name}"}


_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"


def _inline(picture: Picture) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(picture._style()):
        picture.figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        if element.tag == "g" and (name := element.attrib.pop("id", None)) in picture.tips:
            tip = ElementTree.Element("title")
            tip.text = presentable(picture.tips[str(name)])
            element.insert(0, tip)
            element.set("class", "tip")
        if (target := element.attrib.pop(_XLINK, None)) is not None:
            element.set("href", target)
        if (style := element.get("style")) is not None:
            element.set("style", _themed(style))
    width, height = (round(float(root.attrib.pop(side)[:-2])) for side in ("width", "height"))
    title, text = ElementTree.Element("title"), ElementTree.Element("desc")
    title.text, text.text = picture.title, presentable(picture.text)
    title.set("id", f"{picture.name}-title")
    text.set("id", f"{picture.name}-text")
    root.insert(0, text)
    root.insert(0, title)
    root.set("class", "plot")
    root.set("role", "img")
    root.set("aria-labelledby", f"{picture.name}-title {picture.name}-text")
    root.set("style", f"--natural: {width}pt; aspect-ratio: {width} / {height}")
    return ElementTree.tostring(root, encoding="unicode")


_BY_COLOUR = {colour: name for name, colour in COLOURS.items()}


def _themed(style: str) -> str:
    style = re.sub(
        r"#[0-9a-f]{6}",
        lambda match: f"var(--{_BY_COLOUR[match[0]]})" if match[0] in _BY_COLOUR else match[0],
        style,
    )
    return re.sub(r"font-family:[^;]*;?", "", style)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in our style; inches at 72 points, about 100 CSS pixels on a page."""
    return Figure(figsize=(width, height))


def label_of(name: str) -> str:
    """A foreign name as a label: such as SVG can hold, and no legend leaves out.

    Legends pass over names that begin with an underscore.
    """
    shown = presentable(name)
    return f" {shown}" if shown.startswith("_") else shown


def legend_below(figure: Figure, columns: int = 4) -> None:
    """One legend for all axes, below them."""
    seen: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    if seen:
        figure.legend(
            list(seen.values()),
            list(seen),
            loc="outside lower center",
            ncols=min(columns, len(seen)),
            handlelength=2.2,
            columnspacing=1.4,
        )


def listed(values: Sequence[tuple[object, str]]) -> str:
    """Name and value pairs in words: "1: 310, 2: 240"."""
    return ", ".join(f"{name}: {value}" for name, value in values)


#: Names of the ways of drafting, as people read them.
WHO: dict[MethodKind, str] = {
    "plain": "plain",
    "freedave": "FreeDave's chain",
    "chain": "confident chain",
    "paper": "paper's graph",
    "pruned": "paper's, pruned",
    "graph": "our graph",
    "model": "chosen at run time",
    "order": "order network",
    "auto": "auto",
    "perfect": "perfect drafts",
}
#: Their colours, by the names that pages know them by.
COLOUR_NAMES: dict[MethodKind, str] = {
    kind: {"paper": "paper-graph", "freedave": "chain"}.get(kind, kind) for kind in WHO
}
COLOUR_OF: dict[MethodKind, str] = {kind: COLOURS[name] for kind, name in COLOUR_NAMES.items()}
MARKER_OF: dict[MethodKind, str] = {
    "plain": "",
    "freedave": "P",
    "chain": "s",
    "paper": "D",
    "pruned": "v",
    "graph": "o",
    "model": "^",
    "order": "h",
    "auto": "*",
    "perfect": "x",
}
SIZE = (4.5, 3.2)


def points_and_line(kind: MethodKind) -> Any:
    """How a way of drafting is drawn: options for `Axes.plot`."""
    return {"color": COLOUR_OF[kind], "marker": MARKER_OF[kind]}


P = ParamSpec("P")


def styled(make: Callable[P, Picture | None]) -> Callable[P, Picture | None]:
    """Run a maker of pictures under our style."""

    @wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> Picture | None:
        with matplotlib.rc_context(STYLE):
            return make(*args, **options)

    return made


def targets(
    axes: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str], name: str
) -> dict[str, str]:
    """Invisible targets for the pointer; their texts by gid."""
    tips = {}
    for at, (left, up, text) in enumerate(zip(x, y, texts, strict=True)):
        gid = f"{name}-{len(axes.lines)}-{at}"
        axes.plot([left], [up], "o", color=INK, markersize=12, alpha=0.0, gid=gid)
        tips[gid] = text
    return tips
