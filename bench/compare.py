"""Two benchmark runs against each other, and which of their numbers can be."""

from __future__ import annotations

from collections.abc import Mapping

from spiffy.bench.tables import identical, markdown_table, quantity, ratio
from spiffy.schemas.bench import Bench, Result

#: Settings by which numbers they make incomparable.
_COUNTS = "counts (NFE, positions, steps) and accuracy"
_SPEEDS = "tokens/s"
_RATIOS = "speed against plain"


def compare(a: Bench, b: Bench) -> str:
    """Markdown: what differs between the runs, what therefore cannot be compared, and the rest."""
    differing = _differences(a, b)
    spoilt: dict[str, list[str]] = {}
    for name, (_, _, spoils) in differing.items():
        for numbers in spoils:
            spoilt.setdefault(numbers, []).append(name)
    lines = ["## What differs", ""]
    if differing:
        rows = [[name, before, after] for name, (before, after, _) in differing.items()]
        lines.append(markdown_table(["", "first", "second"], rows))
    else:
        lines.append("Nothing but the load of the machine.\n")
    for numbers, names in spoilt.items():
        lines.append(f"- {numbers} cannot be compared: different {', '.join(names)}")
    if spoilt:
        lines.append("")
    lines += ["## Method by method", "", _table(a, b, set(spoilt))]
    missing = [
        f"only in the {which} run: {', '.join(names)}"
        for which, names in (("first", _only_in(a, b)), ("second", _only_in(b, a)))
        if names
    ]
    lines += [f"- {line}" for line in missing]
    return "\n".join(lines).rstrip("\n") + "\n"


_Difference = tuple[str, str, tuple[str, ...]]


def _differences(a: Bench, b: Bench) -> dict[str, _Difference]:
    """By name: both values, and the numbers that they make incomparable."""
    everything = (_COUNTS, _SPEEDS, _RATIOS)
    # Where near-ties are common, other kernels decide some of them otherwise.
    dtypes = {bench.machine.dtype.split(",")[0] for bench in (a, b)}
    times = (_SPEEDS, _RATIOS) if dtypes <= {"float32", "float64"} else everything
    found: dict[str, _Difference] = {}

    def add(name: str, before: object, after: object, spoils: tuple[str, ...]) -> None:
        if before != after:
            found[name] = *_words(before, after), spoils

    def add_fields(
        before: Mapping[str, object], after: Mapping[str, object], spoils: tuple[str, ...]
    ) -> None:
        for key in sorted({*before, *after}):
            add(key, before.get(key), after.get(key), spoils)

    # One model may go by several names, and be at several revisions of its repository.
    known = a.weights is not None and b.weights is not None
    same = known and (a.weights, a.model.fingerprint) == (b.weights, b.model.fingerprint)
    add("model", a.model.id, b.model.id, () if same else everything)
    add("model revision", a.model.revision, b.model.revision, () if same else everything)
    add("model fingerprint", a.model.fingerprint, b.model.fingerprint, everything)
    if known:
        add("weights (digest)", a.weights, b.weights, everything)
    add("adapter", a.adapter, b.adapter, () if same else everything)
    add_fields(a.decoding.model_dump(), b.decoding.model_dump(), everything)
    add("dataset", a.data.dataset, b.data.dataset, everything)
    add("prompts", a.data.samples, b.data.samples, everything)
    add("prompts (digest)", a.data.sha256, b.data.sha256, everything)
    add("raw prompts", a.data.raw, b.data.raw, everything)
    add("system message", a.data.system, b.data.system, everything)
    add("seed", a.data.seed, b.data.seed, everything if a.decoding.temperature else ())
    add("block edges", ", ".join(a.edges), ", ".join(b.edges), everything)
    add("dtype", a.machine.dtype, b.machine.dtype, everything)
    add("device", a.machine.device, b.machine.device, times)
    add("threads", a.machine.threads, b.machine.threads, times)
    add("system", a.machine.system, b.machine.system, times)
    versions_a, versions_b = dict(a.machine.versions), dict(b.machine.versions)
    ours = "spiffy-dllm"  # what a comparison is often about
    add(ours, versions_a.pop(ours, None), versions_b.pop(ours, None), ())
    add_fields(versions_a, versions_b, times)
    # The rest may differ on purpose, or only says how sure the numbers are.
    add("draft graph", a.graph_digest, b.graph_digest, ())
    add_fields(
        {f"{kind} (digest)": digest for kind, digest in a.compared_with.items()},
        {f"{kind} (digest)": digest for kind, digest in b.compared_with.items()},
        (),
    )
    add("code revision", a.machine.git_revision, b.machine.git_revision, ())
    add("repeats", a.data.repeats, b.data.repeats, ())
    # What learns from walks, as "auto" does, has learned from those too.
    add("warm-up", a.data.warm_up, b.data.warm_up, everything)
    add("costs known to auto", a.costs_known, b.costs_known, ())
    add("baseline", a.baseline, b.baseline, (_RATIOS,))
    return found


_SHORT, _AROUND = 32, 12  # characters of a value that is shown whole; around a difference


def _words(before: object, after: object) -> tuple[str, str]:
    """Two values that differ, as texts that do; of long ones, where they begin to."""
    a, b = (str(value) if value not in (None, "") else "none" for value in (before, after))
    if a == b:
        a, b = repr(before), repr(after)
    pairs = enumerate(zip(a, b, strict=False))
    at = next((k for k, (one, other) in pairs if one != other), min(len(a), len(b)))
    return _excerpt(a, at), _excerpt(b, at)


def _excerpt(text: str, at: int) -> str:
    start, stop = max(0, at - _AROUND), at + _AROUND
    if len(text) <= _SHORT:
        return text
    return f"{'...' if start else ''}{text[start:stop]}{'...' if stop < len(text) else ''}"


def _only_in(a: Bench, b: Bench) -> list[str]:
    known = {result.name for result in b.results}
    return [result.name for result in a.results if result.name not in known]


def _table(a: Bench, b: Bench, spoilt: set[str]) -> str:
    headings = [
        "method",
        "NFE",
        "positions computed",
        _SPEEDS,
        _RATIOS,
        "tokens identical",
        "accuracy",
    ]
    rows = []
    by_name = {result.name: result for result in b.results}
    for before in a.results:
        after = by_name.get(before.name)
        if after is None:
            continue
        counts = _COUNTS not in spoilt and _repeats(before, a, b)
        speeds = _SPEEDS not in spoilt
        rows.append(
            [
                before.name,
                _change(quantity(before.nfe), quantity(after.nfe), after.nfe / before.nfe, counts),
                _change(
                    quantity(before.positions_computed),
                    quantity(after.positions_computed),
                    after.positions_computed / before.positions_computed,
                    counts,
                ),
                _change(
                    f"{before.tokens_per_second:.1f}",
                    f"{after.tokens_per_second:.1f}",
                    after.tokens_per_second / before.tokens_per_second,
                    speeds,
                ),
                f"{ratio(a, before.speedup)} -> {ratio(b, after.speedup)}",
                f"{identical(a, before)} -> {identical(b, after)}",
                _accuracies(before, after),
            ]
        )
    return markdown_table(headings, rows) if rows else "No method is in both runs.\n"


def _repeats(result: Result, a: Bench, b: Bench) -> bool:
    """Whether the counts of two runs would be the same, if nothing that matters differed.

    Not those of "auto", which learns from times. "model" learns from what was accepted, which
    repeats, but learns more in more repeats.
    """
    return result.kind != "auto" and (result.kind != "model" or a.data.repeats == b.data.repeats)


def _change(before: str, after: str, ratio: float, comparable: bool) -> str:
    """Both values, and their ratio where it means something."""
    if before == after and comparable:
        return f"{before} (same)"
    return f"{before} -> {after}" + (f" ({ratio:.2f}x)" if comparable else "")


def _accuracies(before: Result, after: Result) -> str:
    if not before.scored and not after.scored:
        return ""
    cells = (f"{r.correct}/{r.scored}" if r.scored else "not scored" for r in (before, after))
    return " -> ".join(cells)
