"""What changed between two draft graphs, in words."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from spiffy.schemas import AcceptanceModel, DraftGraph, Node
from spiffy.schemas.labels import shown_budgets, written

_NAMED = 12  # nodes listed one by one
_SHOWN = 32  # characters of a value
_SEEN = 0.001  # steps that three digits show


def differences(a: DraftGraph, b: DraftGraph) -> list[str]:
    """Sentences that say what `b` has otherwise than `a`; none if they draft the same.

    Cost profiles are left out, like in the digest: they belong to machines. So is provenance, by
    which nothing is drafted.
    """
    return [
        *_fields("model", a.model.model_dump(), b.model.model_dump()),
        *_fields("decoding", a.decoding.model_dump(), b.decoding.model_dump()),
        *_fields("calibration", a.calibration.model_dump(), b.calibration.model_dump()),
        *_nodes(a.nodes, b.nodes, a.calibration.roots, b.calibration.roots),
        *_expected(a, b),
        *_measured(a, b),
        *_acceptance(a.acceptance, b.acceptance),
    ]


def _fields(what: str, a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    # A field that means nothing in one of them is not there.
    return [
        f"{what}: {key} {_value(a.get(key))} -> {_value(b.get(key))}"
        for key in {**a, **b}
        if a.get(key) != b.get(key)
    ]


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(str, value))
        return f"({text})" if len(text) <= _SHOWN else f"({len(value)} of them)"
    text = str(value)
    half = _SHOWN // 2 - 1  # names may differ at either end
    return text if len(text) <= _SHOWN else f"{text[:half]}...{text[-half:]}"


def _nodes(a: Sequence[Node], b: Sequence[Node], roots_a: int, roots_b: int) -> list[str]:
    numbers_a = {node.fill: k for k, node in enumerate(a, start=1)}
    numbers_b = {node.fill: k for k, node in enumerate(b, start=1)}
    added = [f"{numbers_b[fill]}: {written(fill)}" for fill in numbers_b if fill not in numbers_a]
    removed = [f"{numbers_a[fill]}: {written(fill)}" for fill in numbers_a if fill not in numbers_b]
    common = [fill for fill in numbers_b if fill in numbers_a]
    kept = _longest_ascending([numbers_a[fill] for fill in common])
    moved = [
        f"{written(fill)} from {numbers_a[fill]} to {numbers_b[fill]}"
        for fill in common
        if numbers_a[fill] not in kept
    ]
    lines = [
        f"nodes: {len(list_)} {verb} ({_some(list_)})"
        for verb, list_ in (("added", added), ("removed", removed), ("moved", moved))
        if list_
    ]
    shifts = [
        (abs(after - before), fill, before, after)
        for fill in common
        for before, after in [
            (
                a[numbers_a[fill] - 1].count / max(roots_a, 1),
                b[numbers_b[fill] - 1].count / max(roots_b, 1),
            )
        ]
    ]
    if (largest := max(shifts, default=(0.0, (), 0.0, 0.0))) and largest[0] > 0:
        _, fill, before, after = largest
        lines.append(
            f"acceptance of common nodes: changed most at {written(fill)}, "
            f"{before:.1%} -> {after:.1%} of roots"
        )
    rewired = sum(
        {a[k - 1].fill if k else () for k in a[numbers_a[fill] - 1].parents}
        != {b[k - 1].fill if k else () for k in b[numbers_b[fill] - 1].parents}
        for fill in common
    )
    if rewired:
        lines.append(f"nodes: {rewired} follow other nodes than before")
    return lines


def _some(items: Sequence[str]) -> str:
    more = f", and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + more


def _longest_ascending(numbers: Sequence[int]) -> set[int]:
    """Members of a longest ascending subsequence of distinct numbers: what did not move."""
    tails: list[int] = []  # smallest last member of an ascending subsequence, by length
    before: dict[int, int | None] = {}
    for number in numbers:
        at = bisect_left(tails, number)
        before[number] = tails[at - 1] if at else None
        tails[at : at + 1] = [number]
    kept: set[int] = set()
    last = tails[-1] if tails else None
    while last is not None:
        kept.add(last)
        last = before[last]
    return kept


def _expected(a: DraftGraph, b: DraftGraph) -> list[str]:
    if a.expected_steps == b.expected_steps:
        return []
    if not a.expected_steps or not b.expected_steps:
        return ["expected steps: only one of them states any"]
    pairs = _pairs(dict(enumerate(a.expected_steps)), dict(enumerate(b.expected_steps)))
    return [f"expected steps per forward at drafts {pairs}"] if pairs else []


def _measured(a: DraftGraph, b: DraftGraph) -> list[str]:
    """Of what is not in the digest this alone decides what is drafted, with `--budget auto`."""
    lines = []
    for way in sorted({*a.measured_steps, *b.measured_steps}):
        before, after = (graph.measured_steps.get(way, ()) for graph in (a, b))
        if before == after:
            continue
        if not before or not after:
            lines.append(f"measured steps by the {way}: only one of them states any")
            continue
        curves = [{p.drafts: p.steps for p in points} for points in (before, after)]
        pairs = _pairs(*curves) or "the same, compared with other replays or at other numbers"
        lines.append(f"measured steps by the {way} at drafts {pairs}")
    return lines


def _pairs(a: Mapping[int, float], b: Mapping[int, float]) -> str:
    """What two curves say at common numbers of drafts; nothing if that is the same.

    Of many numbers the powers of two, the last, and where they differ most.
    """
    common = sorted(a.keys() & b.keys() - {0})
    most = max(common, key=lambda n: abs(b[n] - a[n]), default=0)
    if not common or a[most] == b[most]:
        return ""
    digits = 3 if abs(b[most] - a[most]) > _SEEN else 6  # as many as artifacts have
    listed = {*shown_budgets(common[-1]), most}
    shown = [n for n in common if n in listed]
    return ", ".join(f"{n}: {a[n]:.{digits}f} -> {b[n]:.{digits}f}" for n in shown)


def _acceptance(a: AcceptanceModel | None, b: AcceptanceModel | None) -> list[str]:
    if a == b:
        return []
    if a is None or b is None:
        return [f"acceptance model: {'added' if a is None else 'removed'}"]
    lines = []
    for part in ("position", "commit", "token"):
        before, after = getattr(a, part) or {}, getattr(b, part) or {}
        names = sorted({*before, *after})
        changed = [(abs(after.get(k, 0.0) - before.get(k, 0.0)), k) for k in names]
        if (most := max(changed, default=(0.0, ""))) and most[0] > 0:
            count, name = sum(change > 0 for change, _ in changed), most[1]
            lines.append(
                f"acceptance model: {count} of {len(names)} {part} coefficients changed, most "
                f"{name} {before.get(name, 0.0):.3g} -> {after.get(name, 0.0):.3g}"
            )
    if a.bigrams != b.bigrams:
        pairs_a, pairs_b = ({(x, y) for x, y, _ in model.bigrams} for model in (a, b))
        lines.append(
            f"acceptance model: bigrams {len(pairs_a)} -> {len(pairs_b)}, "
            f"{len(pairs_a & pairs_b)} in both"
        )
    steps_a, steps_b = ({p.drafts: p.steps for p in m.expected_steps} for m in (a, b))
    if steps_a != steps_b:
        pairs = _pairs(steps_a, steps_b) or "other numbers"
        lines.append(f"acceptance model: expected steps at drafts {pairs}")
    return lines
