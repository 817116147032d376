"""Reports: one HTML file each, that needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spiffy.bench import tables
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.bench import INTERVAL_PROMPTS, Bench, Walkthrough
from spiffy.schemas.html import presentable, visible
from spiffy.schemas.io import write_atomically
from spiffy.schemas.labels import acceptance_in_words, device_in_words, policy_in_words

if TYPE_CHECKING:
    from spiffy.bench.plots.style import Picture


def require_matplotlib() -> None:
    """Fail before hours of work, not after.

    Raises
    ------
    SpiffyError
        If matplotlib is not installed; says how to get it.
    """
    if find_spec("matplotlib") is None:
        raise SpiffyError("pictures need matplotlib: pip install 'spiffy-dllm[report]'")


def write_report(bench: Bench, path: Path) -> None:
    """Write a run as one HTML file: results, pictures, one decode to step through.

    The same run always gives the same bytes. Sections without data are left out.

    Raises
    ------
    SpiffyError
        If matplotlib is missing or the file cannot be written.
    """
    require_matplotlib()
    from spiffy.bench import plots
    from spiffy.bench.plots.style import COLOUR_NAMES

    walkthrough = bench.walkthrough
    page = _render(
        "report.html.j2",
        bench=bench,
        headline=tables.headline(bench),
        tiles=_tiles(bench),
        columns=tables.columns(bench),
        pictures=plots.pictures_of(bench),
        steps=None if walkthrough is None else walkthrough_data(walkthrough),
        conditions=_conditions(bench),
        colours=COLOUR_NAMES,
    )
    write_atomically(path, page)


def write_calibration_report(graph: DraftGraph, path: Path) -> None:
    """Write an artifact as one HTML file: drawing, expected steps, coefficients, costs.

    Raises
    ------
    SpiffyError
        If matplotlib is missing or the file cannot be written.
    """
    require_matplotlib()
    from spiffy.bench import plots

    costs = [
        plots.cost(profile, _predicted(graph, k), f"cost-{k}", predicted=True)
        for k, profile in enumerate(graph.cost_profiles)
    ]
    steps = plots.expected(graph.expected_steps, graph.acceptance)
    drawing = plots.draft_graph(graph.nodes, graph.calibration.roots)
    bars = None if graph.acceptance is None else plots.coefficients(graph.acceptance)
    page = _render(
        "calibration.html.j2",
        graph=graph,
        pictures=[picture for picture in (steps, *costs) if picture is not None],
        drawing=drawing,
        bars=bars,
        tiles=_graph_tiles(graph),
        conditions=_graph_conditions(graph),
    )
    write_atomically(path, page)


def graph_picture(graph: DraftGraph) -> Picture:
    """The drawing of a draft graph.

    Raises
    ------
    SpiffyError
        If matplotlib is missing, or the graph has no nodes.
    """
    require_matplotlib()
    from spiffy.bench import plots

    picture = plots.draft_graph(graph.nodes, graph.calibration.roots)
    if picture is None:
        raise SpiffyError("the graph has no nodes: there is nothing to draw")
    return picture


def _predicted(graph: DraftGraph, profile: int) -> int:
    """Drafts that should pay by a cost profile, `auto` still knowing nothing else; 0: none."""
    # It imports torch, which no other report needs.
    predict = import_module("spiffy.runtime.budget.predict")
    plan = predict.best_plan(predict.steps_by_drafts(graph), graph.cost_profiles[profile])
    drafts: int = plan.drafts
    return drafts


# -- pages ----------------------------------------------------------------------------------------


def _render(template: str, **content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("spiffy.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "picture": _figure, "plain": presentable}
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "walkthrough.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **content,
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        t=tables,
    )


def _figure(picture: Picture) -> Markup:
    return Markup(picture.inline())


def safe_json(content: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def walkthrough_data(walkthrough: Walkthrough) -> dict[str, Any]:
    """What the page needs to step through a decode; `json` is for the script, the rest for all."""
    first = min((turn.span[0] for turn in walkthrough.turns), default=walkthrough.answer_start)
    last = _last(walkthrough, first)
    known = walkthrough.prompt_tokens[-(walkthrough.answer_start - first) :]
    inside = walkthrough.answer_start - first  # tokens of the prompt in the first block
    opening = [""] * (inside - len(known)) + list(known) if inside else []
    turns = []
    for turn in walkthrough.turns:
        turns.append(
            {
                "block": turn.block,
                "span": turn.span,
                "drafts": [
                    {
                        "fill": [[position, visible(token)] for position, token in draft.fill],
                        "parents": draft.parents,
                        "accepted": draft.accepted,
                    }
                    for draft in turn.drafts
                ],
                "steps": [
                    [[position, visible(token)] for position, token in step] for step in turn.steps
                ],
                "ms": round(1000 * turn.seconds, 3),
            }
        )
    data = {
        "first": first,
        "last": last,
        "prompt": [visible(token) if token else "\N{HORIZONTAL ELLIPSIS}" for token in opening],
        "turns": turns,
        "plain": walkthrough.plain_nfe,
    }
    return {
        "json": safe_json(data),
        "turns": turns,
        "steps": sum(len(turn.steps) for turn in walkthrough.turns),
        "drafts": sum(len(turn.drafts) for turn in walkthrough.turns),
        "accepted": sum(d.accepted for turn in walkthrough.turns for d in turn.drafts),
    }


def _last(walkthrough: Walkthrough, first: int) -> int:
    """Where the last block ends that anything was committed in: a draft may complete it whole."""
    turns = walkthrough.turns
    reached = [p + 1 for turn in turns for step in turn.steps for p, _ in step]
    block = max((stop - start for start, stop in (turn.span for turn in turns)), default=1)
    blocks = -((first - max(reached, default=first)) // block)
    ends = [turn.span[1] for turn in turns]
    return max([first, *ends, min(first + blocks * block, walkthrough.length)])


# -- what the pages state -------------------------------------------------------------------------

Pairs = list[tuple[str, str]]


def _tiles(bench: Bench) -> Pairs:
    """The headline in numbers."""
    best = tables.headline(bench).best
    if best is None:
        return []
    ratio = best.speedup
    spread = f"too few prompts for an interval: {INTERVAL_PROMPTS} are needed"
    if bench.has_intervals:
        spread = f"95% interval {ratio.low:.2f} to {ratio.high:.2f}"
    tiles = [
        (f"{tables.fewer_forwards(bench, best):.2f}x", f"fewer forwards (NFE {best.nfe:,})"),
        (f"{tables.more_positions(bench, best):.2f}x", "positions computed"),
        (
            f"{ratio.value:.2f}x",
            f"plain decoding's speed ({spread}), {best.tokens_per_second:,.1f} tokens/s",
        ),
        (
            f"{best.compared - best.differing}/{best.compared}",
            "answers identical, token for token",
        ),
    ]
    if best.scored:
        tiles.append((f"{best.correct / best.scored:.0%}", f"of {best.scored} answers right"))
    return tiles


def _conditions(bench: Bench) -> Pairs:
    """Everything needed to judge the numbers and to measure them again."""
    machine, data, d = bench.machine, bench.data, bench.decoding
    by = "" if d.policy == "entropy-bounded" or d.own_policy else f", by {d.score}"
    part = "" if d.sub_block_length is None else f", {d.sub_block_length} positions at a time"
    load = (
        "not available"
        if machine.load is None
        else f"{machine.load[0]:.2f} at the start, {machine.load[1]:.2f} at the end (1 minute)"
    )
    versions = ", ".join(f"{name} {v}" for name, v in sorted(machine.versions.items()))
    costs = []
    if bench.costs_known is not None:
        began = "costs measured before on this machine" if bench.costs_known else "no known costs"
        costs = [("auto began with", began)]
    if bench.machine.threads is None and any(r.kind == "order" for r in bench.results):
        costs.append(
            ("Order network", "drafts on the host's CPU: its seconds are no measure of it")
        )
    model = bench.model
    data_text = f"{_counted(data.samples, 'prompt')} of {data.dataset}, seed {data.seed}"
    if data.raw:
        data_text += "; taken as they are, without the chat template"
    if data.system is not None:
        data_text += f"; after the system message {data.system!r}"
    if data.left_out:
        data_text += (
            f"; {data.left_out} left out (they cannot be decoded: too long, or not encodable)"
        )
    if data.stopped:
        data_text += "; stopped early, with fewer prompts or repeats than asked for"
    overlap = "none of them was calibrated on"
    if data.calibrated_on is None:
        overlap = "whether any of them was calibrated on is not known: the draft graph does not say"
    elif data.calibrated_on:
        overlap = f"{data.calibrated_on} of them were calibrated on too: not held out"
    edges = ", ".join(bench.edges) or "none"
    if any(result.kind == "freedave" for result in bench.results):
        edges += "; freedave has none, as FreeDave's own loop"
    adapter = "" if bench.adapter is None else f", with the adapter {bench.adapter}"
    graph_model = "" if bench.graph_model is None else f", made for {bench.graph_model}"
    return [
        ("Command", bench.command),
        (
            "Model",
            f"{model.id} ({model.family}), revision {model.revision or 'not recorded'}{adapter}",
        ),
        ("Model fingerprint", model.fingerprint),
        ("Weights digest", bench.weights or "not recorded"),
        (
            "Decoding",
            f"{policy_in_words(d)}{by}; block {d.block_length}{part}, {d.gen_length} "
            f"positions; cache {d.cache}{'' if d.exact else ' (near-lossless)'}; {d.sampling}",
        ),
        ("Block edges", edges),
        (
            "Draft graph",
            f"{len(bench.nodes)} nodes, digest {bench.graph_digest}{graph_model}",
        ),
        ("Data", f"{data_text}; {overlap}"),
        ("Data digest", data.sha256),
        (
            "Repeats",
            f"{_counted(data.repeats, 'counted decode')} of each prompt by each method, after "
            f"{data.warm_up} of the first prompt that {'is' if data.warm_up == 1 else 'are'} not "
            "counted (warm-up)",
        ),
        (
            "Machine",
            f"{device_in_words(machine.device, machine.dtype, machine.threads)}; {machine.system}",
        ),
        *costs,
        ("Load averages", load),
        ("Versions", versions),
        ("Code revision", machine.git_revision or "not recorded"),
        (
            "Ratios",
            f"against {bench.baseline}, prompt by prompt: medians over repeats, then over prompts, "
            f"with 95% bootstrap intervals (prompts resampled, {INTERVAL_PROMPTS} or more). The "
            "fastest method is picked after all were measured, which flatters it a little; auto "
            "had to choose beforehand. Counts (NFE, positions, steps) repeat exactly, but for "
            "those of auto and model, which learn while they decode; seconds do not.",
        ),
    ]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _graph_tiles(graph: DraftGraph) -> Pairs:
    tiles = [(str(graph.budget), "nodes in the draft graph")]
    if graph.expected_steps:
        tiles.append(
            (f"{graph.expected_steps[-1]:.2f}", "steps per forward expected from all of them")
        )
    if graph.acceptance is not None and graph.acceptance.expected_steps:
        best = graph.acceptance.expected_steps[-1]
        tiles.append(
            (f"{best.steps:.2f}", f"with {best.drafts} drafts chosen by the acceptance model")
        )
    return tiles


def _graph_conditions(graph: DraftGraph) -> Pairs:
    record, d, model = graph.calibration, graph.decoding, graph.model
    held_out = (
        f"expected steps replayed on {record.held_out_samples} prompts held out from that"
        if record.held_out_samples
        else "expected steps replayed on the same prompts, none was held out"
    )
    pairs = [
        ("Model", f"{model.id} ({model.family}), revision {model.revision or 'not recorded'}"),
        ("Model fingerprint", model.fingerprint),
        (
            "Decoding",
            f"{d.policy}, block {d.block_length}, cache {d.cache}"
            f"{'' if graph.exact else ' (near-lossless)'}, {d.sampling}",
        ),
        (
            "Calibrated on",
            f"{record.roots} roots of {record.samples} prompts ({record.dataset}, seed "
            f"{record.seed}); {held_out}",
        ),
        ("Objective", record.objective),
        ("Digest", graph.digest()),
        ("Made by", f"spiffy-dllm {record.tool_version}"),
    ]
    if graph.acceptance is not None:
        pairs.append(("Acceptance model", acceptance_in_words(graph.acceptance)))
    return pairs
