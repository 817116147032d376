"""Compare an order network, our reading of SPOT, with every other way of drafting: `make results`.

SPOT (arXiv 2610.22543) trains a small network to say which position is committed next. Ours of
that description (`bench/order.py`) learns from the very decodes that graph and acceptance model are
calibrated on: the prompts that the graph is grown on train it, those that are held out stop it.
Then every tiny model decodes other generated problems and prompts of another dataset, with static
unmasking. With the dual cache plain decodes are replayed, exactly but for what rejected drafts
would say; with a block cache all is decoded for real and every answer compared with plain decoding.

A second table decodes for real what the first has replayed. Counts repeat; only training is timed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from losslessness import ON, decode_all, differing, enough, fitting, versions
from pages import add_into, at_least, command, expect, fill, start
from rich.progress import Progress

from spiffy.bench.methods import Method, methods
from spiffy.bench.order import RANKS, OrderNetwork, OrderShape, load_order, save_order
from spiffy.bench.order_training import Report, Training, train
from spiffy.calib.pipeline import Traces, build_graph, prepare, record
from spiffy.calib.prompts import PromptSet, load_prompts
from spiffy.calib.record import Recorder, Trace
from spiffy.calib.replay_drafts import replay_drafter
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.draft import Drafter, way_of
from spiffy.runtime.draft.acceptance import TOKEN_RANKS
from spiffy.runtime.generate import Output
from spiffy.schemas import CacheName, DecodingSettings, DraftGraph
from spiffy.schemas.bench import MethodKind

LAYOUTS: tuple[tuple[str, CacheName], ...] = (
    ("tiny-sdar", "block"),
    ("tiny-llada", "dual"),
    ("tiny-dream", "dual"),
)
KINDS: tuple[MethodKind, ...] = ("freedave", "chain", "paper", "graph", "model", "order", "perfect")
ALONE, CHOSEN, ORDER = "acceptance model", "`--budget N`", "order network"
#: Columns by kind; what a fixed number of drafts takes leaves a forward to the best of three ways.
WAYS = {
    "freedave": "FreeDave's chain",
    "chain": "FreeDave's chain",
    "paper": "paper's graph",
    "graph": "our graph",
    "alone": ALONE,
    "model": CHOSEN,
    "order": ORDER,
    "perfect": "perfect drafts",
}
#: Of the second table.
COMPARED = (ALONE, CHOSEN, ORDER)
CHECKED_DRAFTS = (8, 32)
COLUMNS = tuple(dict.fromkeys(WAYS.values()))
_DRAWS = 2000


@dataclass(frozen=True)
class Count:
    """Forwards by prompt, denoising steps, positions computed, answers not plain decoding's."""

    nfe: tuple[int, ...]
    steps: int
    positions: int
    differing: int = 0

    @property
    def forwards(self) -> int:
        """Of all prompts."""
        return sum(self.nfe)


@dataclass(frozen=True)
class Trained:
    """A network and how it came about."""

    network: OrderNetwork
    report: Report


@dataclass(frozen=True)
class Calibrated:
    """All that ways of drafting need to know of a model."""

    model: DiffusionLM
    settings: DecodingSettings
    graph: DraftGraph
    paper: DraftGraph
    trained: Trained


def recorded(model: DiffusionLM, prompts: PromptSet, settings: DecodingSettings) -> Traces:
    """Plain decodes with as many tokens of each position as the network reads."""
    tasks = prepare(model, prompts, settings)
    for task in tasks:
        task.drafter = Recorder(RANKS)
    return record(model, tasks)


def narrow(traces: Traces) -> Traces:
    """The same with as many as calibration records."""
    some = tuple(trace.narrowed(TOKEN_RANKS) for trace in traces.prompts)
    return Traces(some, traces.nfe, traces.positions_computed)


def made_of(
    model: DiffusionLM, settings: DecodingSettings, prompts: PromptSet, training: Training
) -> dict[str, Any]:
    """All that a network depends on: made of something else it is another one."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.module.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} ".encode())
        weights.update(tensor.numpy().tobytes())
    return {
        "model": model.fingerprint,
        "weights": weights.hexdigest(),
        "prompts": prompts.sha256,
        "settings": settings.model_dump(mode="json"),
        "training": asdict(training),
    }


def order_network(
    model: DiffusionLM,
    settings: DecodingSettings,
    prompts: PromptSet,
    traces: Traces,
    training: Training,
    place: Path | None,
) -> Trained:
    """Train one, or take what lies at `place` (without an ending) if it is made of the same."""
    weights, about = (
        (None, None) if place is None else (_at(place, "safetensors"), _at(place, "json"))
    )
    made = made_of(model, settings, prompts, training)
    if weights is not None and about is not None and weights.exists():
        found = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
        if found.get("made_of") == made:
            report = {**found["report"], "losses": tuple(found["report"]["losses"])}
            return Trained(load_order(weights), Report(**report))
        print(f"{weights} is of other weights, prompts or options: training anew", flush=True)
    shape = OrderShape(settings.block_length, model.fingerprint)
    with Progress() as bar:
        line = bar.add_task(f"training on {model.name}", total=None)
        network, report = train(
            traces.growing,
            traces.held_out,
            shape,
            model.mask_token_id,
            training,
            lambda done, total: bar.update(line, completed=done, total=total),
        )
    if weights is not None and about is not None:
        weights.parent.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)  # whatever comes now, it is not of the weights before
        save_order(network, weights)
        kept = {"made_of": made, "report": asdict(report)}
        about.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return Trained(network, report)


def _at(place: Path, ending: str) -> Path:
    return place.with_name(f"{place.name}.{ending}")


def all_ways(known: Calibrated, budgets: Sequence[int]) -> Iterator[tuple[str, int, Method]]:
    """Every way of drafting, with its column."""
    model, settings, graph = known.model, known.settings, known.graph
    for n in budgets:
        drafter = way_of(model, graph, settings, n, "model")
        yield ALONE, n, Method("", "model", settings, lambda path, d=drafter: d, n)  # type: ignore[misc]
    found = methods(
        model, settings, graph, KINDS, budgets, known.paper, order=known.trained.network
    )
    kinds = {method.kind for method in found}
    for method in found:
        if method.budget is not None and not (method.kind == "chain" and "freedave" in kinds):
            yield WAYS[method.kind], method.budget, method


def replayed(traces: Traces, block_length: int, method: Method) -> Count:
    """Replay plain decodes with the dual cache: there every forward that is saved ran a block."""
    found = [replay_drafter([trace], drafter_of(method, trace)) for trace in traces.prompts]
    nfe = tuple(each.forwards for each in found)
    blocks = sum(each.drafts for each in found) - (traces.nfe - sum(nfe))
    positions = traces.positions_computed + block_length * blocks
    return Count(nfe, sum(each.steps for each in found), positions)


def drafter_of(method: Method, trace: Trace) -> Drafter:
    """The drafter of one prompt, of which the path of plain decoding is known."""
    drafter = method.drafter(trace.path[1:])
    assert drafter is not None
    return drafter


def decoded(
    known: Calibrated,
    texts: Sequence[str],
    traces: Traces,
    plain: Sequence[Output],
    method: Method,
) -> Count:
    """Decode for real, and compare the answers."""
    outputs = []
    edges = ON if method.edges is None else method.edges
    for text, trace in zip(texts, traces.prompts, strict=True):
        drafter = drafter_of(method, trace)
        (ours,) = decode_all(known.model, known.settings, [text], drafter, edges)
        outputs.append(ours)
    return replace(count_of(outputs), differing=differing(outputs, plain))


def count_of(outputs: Sequence[Output]) -> Count:
    """What decodes cost."""
    stats = [output.stats for output in outputs]
    return Count(
        tuple(each.nfe for each in stats),
        sum(each.steps for each in stats),
        sum(each.positions_computed for each in stats),
    )


def counted(
    known: Calibrated, prompts: PromptSet, budgets: Sequence[int]
) -> tuple[Count, dict[tuple[str, int], Count]]:
    """Plain decoding of some prompts, and every way by (column, drafts)."""
    model, settings = known.model, known.settings
    traces = recorded(model, prompts, settings)
    found: dict[tuple[str, int], Count] = {}
    if settings.cache == "dual":
        nfe = tuple(len(trace.path) - 1 for trace in traces.prompts)
        plain = Count(nfe, sum(nfe), traces.positions_computed)
        for way, n, method in all_ways(known, budgets):
            found[way, n] = replayed(traces, settings.block_length, method)
        return plain, found
    texts = [str(text) for text in prompts.texts]
    outputs = decode_all(model, settings, texts, None, ON)
    for way, n, method in all_ways(known, budgets):
        found[way, n] = decoded(known, texts, traces, outputs, method)
    return count_of(outputs), found


def checked(known: Calibrated, prompts: PromptSet, n: int) -> tuple[str, int]:
    """A line of the second table: what the first one has replayed, decoded for real.

    And how many answers are not plain decoding's.
    """
    model, settings = known.model, known.settings
    traces = recorded(model, prompts, settings)
    texts = [str(text) for text in prompts.texts]
    plain = decode_all(model, settings, texts, None, ON)

    def compared() -> list[Method]:
        # Fresh ones each time: what a drafter has learned from a replay is not the next one's.
        ways = all_ways(known, [n])
        return [method for way, _, method in ways if way in COMPARED]

    counts = [replayed(traces, settings.block_length, method) for method in compared()]
    counts += [decoded(known, texts, traces, plain, method) for method in compared()]
    cells = " | ".join(str(count.forwards) for count in counts)
    line = f"| {model.name} | {len(texts)} of {prompts.dataset} | {n} | {cells} |"
    return line, sum(count.differing for count in counts)


def line_of(dataset: str, n: int, plain: Count, found: dict[tuple[str, int], Count]) -> str:
    """A line of the first table."""
    cells = [
        f"{count.forwards} ({count.steps / count.forwards:.2f}, "
        f"{count.positions / plain.positions:.2f}x)"
        for count in (found[way, n] for way in COLUMNS)
    ]
    change = against(found[ORDER, n].nfe, found[CHOSEN, n].nfe)
    return f"| {dataset} | {n} | {plain.forwards} | {' | '.join(cells)} | {change} |"


def against(ours: Sequence[int], others: Sequence[int]) -> str:
    """Forwards more, in percent, with the ends of a 95% bootstrap interval over prompts."""
    generator = random.Random(0)
    pairs = list(zip(ours, others, strict=True))

    def more(some: Sequence[tuple[int, int]]) -> float:
        return sum(a for a, _ in some) / sum(b for _, b in some) - 1

    draws = sorted(more(generator.choices(pairs, k=len(pairs))) for _ in range(_DRAWS))
    low, high = draws[_DRAWS // 40], draws[-1 - _DRAWS // 40]
    return f"{more(pairs):+.1%} ({low:+.1%} to {high:+.1%})"


def training_line(name: str, trained: Trained) -> str:
    """A line of the table of trainings."""
    report = trained.report
    return (
        f"| {name} | {trained.network.parameter_count:,} | {report.prompts} "
        f"| {report.checked_prompts} | {report.roots} | {report.best} of {len(report.losses)} "
        f"| {report.seconds:.0f} | {report.accuracy:.1%} | {report.by_confidence:.1%} |"
    )


TRAINING_HEAD = (
    "| model | parameters | prompts | stopped by | roots | epoch kept | seconds "
    "| next position right | by confidence |\n"
    "| --- |" + " ---: |" * 8
)
CHECKED_HEAD = (
    "| model | prompts | drafts "
    + "".join(f"| {done}: {way} " for done in ("replayed", "decoded") for way in COMPARED)
    + "|\n| --- | --- |"
    + " ---: |" * 7
)
HEAD = (
    f"| prompts | drafts | plain NFE | {' | '.join(COLUMNS)} | {ORDER} against {CHOSEN} |\n"
    f"| --- |{' ---: |' * (len(COLUMNS) + 3)}"
)


def calibrated(name: str, cache: CacheName, args: argparse.Namespace) -> Calibrated:
    """Calibrate and train, on the same decodes."""
    model = load_model(name, device="cpu", dtype="float32")
    settings = decoding_settings(model, gen_length=args.gen_length, cache=cache)
    prompts = load_prompts("synthetic", args.calibrate)
    traces = recorded(model, prompts, settings)
    few, most = narrow(traces), max(args.drafts)
    graph = build_graph(model, prompts, settings, few, most)
    paper = build_graph(model, prompts, settings, few, most, objective="paper")
    for made in (graph, paper):
        enough(made, most)
    place = None if args.save is None else args.save / name
    training = Training(epochs=args.epochs, seed=args.seed)
    trained = order_network(model, settings, prompts, traces, training, place)
    return Calibrated(model, settings, graph, paper, trained)


def main() -> None:
    """Print the tables, or put them into Markdown files between their markers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", nargs="*", default=["humaneval"], help="other prompts")
    parser.add_argument("--samples", type=at_least(1), default=40, help="prompts of each dataset")
    parser.add_argument("--calibrate", type=at_least(2), default=400, help="calibration problems")
    parser.add_argument("--drafts", type=at_least(1), nargs="+", default=[1, 3, 8, 32])
    parser.add_argument("--gen-length", type=at_least(1), default=64)
    parser.add_argument("--epochs", type=at_least(1), default=10, help="of training, at most")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--checked", type=at_least(1), default=40, help="prompts, decoded too")
    parser.add_argument("--save", type=Path, help="folder to keep networks in, and take these from")
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, "rival")
    if args.into and args.only:
        parser.error("--only: the page holds all models, leave out --into")
    if not any(args.only in name for name, _ in LAYOUTS):
        parser.error(f"--only {args.only}: no model has this in its name")
    names = ("synthetic", *args.dataset)
    tables, trainings, again, wrong = [], [TRAINING_HEAD], [CHECKED_HEAD], 0
    for name, cache in LAYOUTS:
        if args.only not in name:
            continue
        known = calibrated(name, cache, args)
        datasets, few = (
            [fitting(name, samples, known.model, known.settings) for name in names]
            for samples in (args.samples, args.checked)
        )
        trainings.append(training_line(name, known.trained))
        print(trainings[-1], flush=True)
        table = [f"#### {name}, {cache}, static\n", HEAD]
        for prompts in datasets:
            plain, found = counted(known, prompts, args.drafts)
            wrong += sum(count.differing for count in found.values())
            for n in args.drafts:
                table.append(line_of(prompts.dataset, n, plain, found))
                print(table[-1], flush=True)
        if cache == "dual":
            for prompts, n in product(few, sorted({*CHECKED_DRAFTS} & {*args.drafts})):
                line, differ = checked(known, prompts, n)
                again.append(line)
                wrong += differ
                print(again[-1], flush=True)
        tables.append("\n".join(table))
    note = (
        f"`{command(args)}` ({args.samples} prompts of each; {versions()}; answers that differ "
        f"from plain decoding's: {wrong}; 'next position right' is of the prompts that stopped the "
        "training)"
    )
    block = "\n\n".join([note, *tables, "\n".join(again), "\n".join(trainings)])
    print(f"\n{block}")
    fill(args.into, "rival", block)


if __name__ == "__main__":
    start(main)
