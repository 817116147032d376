"""What `spiffy-bench` writes: the summary of a run, its rows, and one decode to step through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from spiffy.schemas.decoding import DecodingSettings, first_problem
from spiffy.schemas.errors import SpiffyError
from spiffy.schemas.html import block, inline, page, paragraph, table, visible
from spiffy.schemas.io import canonical_json, read_json, strict_text, write_atomically
from spiffy.schemas.records import CostProfile, ModelRecord, Node, Record

FORMAT = "spiffy.bench"
VERSION = "1.2"
#: Fewer have no 95% interval of their median: even all of their range, from the least to the
#: greatest of n prompts, holds it with a chance of 1 - 2 ** (1 - n) only.
INTERVAL_PROMPTS = 6

MethodKind = Literal[
    "plain", "freedave", "chain", "paper", "pruned", "graph", "model", "order", "auto", "perfect"
]


class Interval(Record):
    """A value and the ends of its 95% bootstrap interval, prompts resampled.

    Of fewer than `INTERVAL_PROMPTS` prompts they are the least and the greatest prompt's value.
    """

    value: float
    low: float
    high: float


class Split(Record):
    """Where the seconds of decoding went.

    Attributes
    ----------
    forward
        The transformer.
    draft
        Ranking candidates and choosing drafts.
    verify
        Unmasking policy at the states of the walk, and finding them among the drafts; on a CPU also
        output head and softmax, which other devices compute with the forward. Plain decoding does
        all but the finding too, once a step.
    rest
        Packing, caches; masks are made within `forward` in part.
    """

    forward: float
    draft: float
    verify: float
    rest: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.forward + self.draft + self.verify + self.rest


class Tally(Record):
    """Drafts of one kind: how many were verified, and how many of them came true."""

    drafted: int = 0
    accepted: int = 0


class RankTally(Tally):
    """Fills of one (position rank, token rank), over all drafts."""

    position_rank: int
    token_rank: int


class Acceptance(Record):
    """Which drafts came true.

    A draft is accepted if a walk passed through it.

    Attributes
    ----------
    by_depth
        Item d: drafts that fill in d + 1 positions.
    by_place
        Item p: fills of the p-th position of the block (of a drafted token: was it in an accepted
        draft).
    by_rank
        Fills by draft coordinates.
    walk_lengths
        Item k: forwards that k drafts were hopped along after.
    """

    by_depth: tuple[Tally, ...] = ()
    by_place: tuple[Tally, ...] = ()
    by_rank: tuple[RankTally, ...] = ()
    walk_lengths: tuple[int, ...] = ()


class Result(Record):
    """One method over all prompts.

    Attributes
    ----------
    name
        Unique in the run, such as "model 8".
    kind
        "plain": no drafts (and no block edges, if its name says so). "freedave": the most confident
        tokens, one more per draft, and nothing at block edges that FreeDave's own loop does not do.
        "chain": the same drafts with what this runtime does there. "paper": the paper's graph, its
        first nodes. "pruned": all of it, pruned at every root by geometric mean. "graph": our
        static graph. "model": drafts chosen at run time. "order": drafts by an order network, our
        reading of SPOT. "auto": what `--budget auto` chose. "perfect": drafts that all come true, a
        bound.
    budget
        Most drafts per forward, None where it does not apply.
    note
        What a reader should know, for example what auto chose.
    nfe, positions_computed, steps, drafted, accepted, tokens
        Sums over prompts; tokens up to and with EOS. They repeat exactly, but for those of "auto",
        which learns from times; of what learns while it decodes ("model" too), they are of the
        repeat with the median NFE.
    tokens_per_second
        Median over repeats of (tokens of all prompts / seconds of all prompts).
    speedup
        Seconds of plain decoding of the same prompt over ours: median over prompts (of the medians
        over repeats). Plain is `Bench.baseline`.
    seconds
        Medians over repeats, summed over prompts.
    peak_bytes
        Peak memory of the process (CPU: resident; GPU: allocated) while decoding this way.
    compared, differing
        Answers compared with plain decoding under the same settings, and those that differ; 0
        compared where other tokens are to be expected (plain decoding by another policy).
    scored, correct
        Answers that could be scored, and that are right.
    """

    name: str
    kind: MethodKind
    budget: int | None = None
    note: str = ""
    nfe: int
    positions_computed: int
    steps: int
    drafted: int
    accepted: int
    tokens: int
    tokens_per_second: float
    speedup: Interval
    seconds: Split
    peak_bytes: int | None = None
    compared: int
    differing: int
    scored: int = 0
    correct: int = 0
    acceptance: Acceptance = Acceptance()

    @property
    def steps_per_forward(self) -> float:
        """Denoising steps per model forward."""
        return self.steps / self.nfe

    @property
    def accepted_per_forward(self) -> float:
        """Drafts hopped to per model forward."""
        return self.accepted / self.nfe


class Draft(Record):
    """One verified draft of a forward.

    Attributes
    ----------
    fill
        (position in the sequence, token text) filled in beyond the root.
    parents
        Numbers of the drafts (from 1; 0 is the root) that it extends by the fewest tokens.
    accepted
        Whether the walk passed through it.
    """

    fill: tuple[tuple[int, str], ...]
    parents: tuple[int, ...]
    accepted: bool


class Turn(Record):
    """One forward of a decode.

    Attributes
    ----------
    block
        Number of the block, from 0.
    span
        First position of the block in the sequence, and the one after its last.
    drafts
        What was verified beside the root.
    steps
        Denoising steps that the forward was worth; each lists (position, token text) committed.
    seconds
        Of this forward, drafting and verification included.
    """

    block: int
    span: tuple[int, int]
    drafts: tuple[Draft, ...]
    steps: tuple[tuple[tuple[int, str], ...], ...]
    seconds: float


class Walkthrough(Record):
    """One decode, forward by forward.

    Attributes
    ----------
    prompt
        As given.
    method
        Name of the result it belongs to.
    answer_start, length
        Positions before `answer_start` are the prompt's tokens; all others start masked.
    plain_nfe
        Forwards of plain decoding for the same answer.
    prompt_tokens
        Texts of the prompt's last tokens, up to `answer_start`, or nothing: what of the prompt lies
        in the first block is shown with it.
    """

    prompt: str
    method: str
    answer_start: int
    length: int
    turns: tuple[Turn, ...]
    plain_nfe: int
    text: str
    prompt_tokens: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """For notebooks: the forwards, each to be opened."""
        steps = sum(len(turn.steps) for turn in self.turns)
        start = min((turn.span[0] for turn in self.turns), default=self.answer_start)
        known = dict(zip(range(start, self.answer_start), self.prompt_tokens, strict=False))
        parts = [
            paragraph(
                f"One answer by {inline(self.method)}: {len(self.turns)} forwards for {steps} "
                f"denoising steps, where plain decoding takes {self.plain_nfe}. A number is the "
                "step of the forward that committed the token; from 2 on, drafts gained it."
            ),
            block(self.prompt),
        ]
        for number, turn in enumerate(self.turns, start=1):
            parts.append(_turn_html(number, turn, known))
            known |= {position: text for step in turn.steps for position, text in step}
        return page(*parts, block(self.text))


def _turn_html(number: int, turn: Turn, known: Mapping[int, str]) -> str:
    """A forward: its block after it, with what it committed by step, and the drafts it verified."""
    fresh = {p: (text, k) for k, step in enumerate(turn.steps, start=1) for p, text in step}
    cells = []
    for position in range(turn.span[0], max([turn.span[1], *(p + 1 for p in fresh)])):
        if position in fresh:
            text, step = fresh[position]
            cells.append(f"<mark>{inline(visible(text))}<sup>{step}</sup></mark>")
        else:
            cells.append(inline(visible(known[position])) if position in known else "_")
    accepted = sum(draft.accepted for draft in turn.drafts)
    rows = [
        [
            " ".join(f"{position}: {visible(text)}" for position, text in draft.fill),
            "accepted" if draft.accepted else "",
        ]
        for draft in turn.drafts
    ]
    drafts = table(["draft (position: token)", ""], rows) if rows else ""
    return (
        f"<details><summary>forward {number}, block {turn.block + 1}: {len(turn.steps)} steps, "
        f"{accepted} of {len(turn.drafts)} drafts accepted</summary>"
        f"<p><code>{' '.join(cells)}</code></p>{drafts}</details>"
    )


class Machine(Record):
    """Where it ran.

    Attributes
    ----------
    load
        Load averages (1 minute) at the start and at the end; None where the system has none.
    versions
        Of this tool and the libraries that decide speed, by name.
    """

    device: str
    dtype: str
    threads: int | None
    system: str
    load: tuple[float, float] | None
    versions: dict[str, str]
    git_revision: str | None = None


class DataRecord(Record):
    """What was decoded.

    Attributes
    ----------
    dataset, sha256, samples, seed
        As for calibration.
    left_out
        Prompts that do not fit the model.
    calibrated_on
        Prompts that the artifact was calibrated on too; above 0 only where that was asked for, and
        None where the artifact does not say what it was calibrated on.
    warm_up
        Decodes of the first prompt by each method that are not counted.
    repeats
        Counted decodes of each prompt by each method.
    stopped
        Whether the run ended early: there are fewer prompts, or repeats, than were asked for.
    raw, system
        How prompts were encoded, if not by themselves and with the chat template.
    """

    dataset: str
    sha256: str
    samples: int
    left_out: int
    seed: int
    calibrated_on: int | None
    warm_up: int
    repeats: int
    stopped: bool = False
    raw: bool = False
    system: str | None = None


class Bench(Record):
    """A whole run.

    Attributes
    ----------
    command
        The exact command line.
    model, weights, adapter
        What decoded: a digest over a sample of the weights tells models of one configuration apart.
        Runs of version 1.0 state the model that the graph was made for.
    edges
        What decoding allowed at the edges of blocks.
    graph_digest, nodes
        The artifact's.
    graph_model
        The model that it was made for, if that is another one.
    compared_with
        Digests of the paper's graph and of the order network, where they were given.
    costs_known
        Whether "auto" began with costs of forwards that were measured before on this machine; None
        where it was not measured.
    baseline
        Name of the result that the others are compared with: plain decoding by the same policy.
    results
        In the order in which they are shown.
    profile
        What a forward costs here by number of drafts, if it was measured.
    """

    command: str
    machine: Machine
    model: ModelRecord
    decoding: DecodingSettings
    edges: tuple[str, ...]
    graph_digest: str
    nodes: tuple[Node, ...]
    roots: int
    data: DataRecord
    baseline: str
    results: tuple[Result, ...] = Field(min_length=1)
    profile: CostProfile | None = None
    walkthrough: Walkthrough | None = None
    weights: str | None = None
    adapter: str | None = None
    graph_model: str | None = None
    compared_with: dict[str, str] = Field(default_factory=dict)
    costs_known: bool | None = None

    def _repr_html_(self) -> str:
        """For notebooks: the table of results."""
        base, settings = self.result(self.baseline), self.decoding
        rows = []
        for result in self.results:
            is_base = result.name == base.name
            same = result.compared - result.differing
            rows.append(
                [
                    result.name,
                    f"{result.nfe:,}"
                    + ("" if is_base else f" ({base.nfe / result.nfe:.2f}x fewer)"),
                    f"{result.positions_computed / base.positions_computed:.2f}x",
                    f"{result.steps_per_forward:.2f}",
                    f"{result.tokens_per_second:,.1f}",
                    "1" if is_base else f"{result.speedup.value:.2f}x",
                    ""
                    if not result.compared or (is_base and not result.differing)
                    else f"{same} of {result.compared}",
                ]
            )
        headings = ["", "NFE", "positions", "steps per forward", "tokens/s", "speed", "identical"]
        return page(
            paragraph(
                f"<strong>{inline(self.model.id)}</strong>, {settings.policy}, cache "
                f"{settings.cache}: {self.data.samples} prompts of {inline(self.data.dataset)} on "
                f"{inline(self.machine.device)}, {inline(self.machine.dtype)}; against "
                f"{inline(self.baseline)}"
            ),
            table(headings, rows),
        )

    @property
    def has_intervals(self) -> bool:
        """Whether there are prompts enough to say how sure a ratio is."""
        return self.data.samples >= INTERVAL_PROMPTS

    def result(self, name: str) -> Result:
        """The result of that name.

        Raises
        ------
        SpiffyError
            If there is none.
        """
        for result in self.results:
            if result.name == name:
                return result
        raise SpiffyError(f"no method {name!r} in this run")

    def save(self, path: Path) -> None:
        """Write the summary as JSON, whole or not at all.

        Raises
        ------
        SpiffyError
            If the file cannot be written.
        """
        head = {"format": FORMAT, "version": VERSION}
        write_atomically(path, canonical_json({**head, **self.model_dump(mode="json")}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Bench:
        """Read a summary.

        Raises
        ------
        SpiffyError
            If it is none, or damaged, or of a newer major version.
        """
        path = Path(path)
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise SpiffyError(f'{path}: not a benchmark summary (no "format": "{FORMAT}")')
        if str(content.get("version")).split(".")[0] != VERSION.split(".")[0]:
            raise SpiffyError(
                f"{path}: version {str(content.get('version'))[:20]} is not one that this program "
                f"reads ({VERSION}): run the benchmark again"
            )
        text = strict_text(path, content)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise SpiffyError(f"{path}: {first_problem(error)}") from None
