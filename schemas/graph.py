"""The artifact: a calibrated draft graph as versioned JSON."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import FailFast, Field, ValidationError, model_validator

from spiffy.schemas.decoding import FILTERS, DecodingSettings, first_problem
from spiffy.schemas.drawing import svg
from spiffy.schemas.errors import SpiffyError
from spiffy.schemas.html import inline, page, paragraph, table
from spiffy.schemas.hub import (
    GRAPH_FILE,
    download,
    names_repository,
    note_other_weights,
    refuse_revision,
)
from spiffy.schemas.io import MAX_BYTES, canonical_json, read_json, strict_text, write_atomically
from spiffy.schemas.labels import shown_budgets
from spiffy.schemas.notes import note
from spiffy.schemas.records import (
    MAX_NODES,
    MAX_PROFILES,
    AcceptanceModel,
    CalibrationRecord,
    CostProfile,
    ExpectedSteps,
    ModelRecord,
    Node,
    Provenance,
    Record,
    Steps,
    Text,
)

if TYPE_CHECKING:
    import networkx as nx

FORMAT = "spiffy.draft-graph"
MAJOR, MINOR = 1, 6
_PREFIX_EXACT = 4  # the first minor version whose prefix cache is exact
# How fingerprints of a model's meaning begin; older ones were of its files' bytes.
FINGERPRINT = "m1-"
_MAX_PAIRS = 1 << 23  # in the fills of all nodes' parents together: what checking them takes


class DraftGraph(Record):
    """A draft graph and everything needed to use it, to judge it and to make it again.

    Nodes are in growth order and every prefix of the list is a graph connected to the root, so a
    graph calibrated for 32 drafts also serves any smaller budget: take the first nodes.

    Attributes
    ----------
    exact
        Whether decoding with this cache is lossless; false for the cache `prefix-shared` only.
    expected_steps
        Denoising steps per forward at budgets 0, 1, ... len(nodes), replayed on calibration
        prompts that were held out from growing the graph.
    measured_steps
        Denoising steps per forward by who chooses the drafts ("graph", "model"), of held-out
        prompts that were decoded with drafts; not part of the digest, because graphs joined from
        work directories, without the model, state none.
    acceptance
        Chooses the drafts at run time; without one the nodes are the drafts.
    """

    model: ModelRecord
    decoding: DecodingSettings
    calibration: CalibrationRecord
    exact: bool
    nodes: Annotated[tuple[Node, ...], Field(max_length=MAX_NODES), FailFast()]
    expected_steps: Annotated[tuple[Steps, ...], Field(max_length=MAX_NODES + 1), FailFast()] = ()
    acceptance: AcceptanceModel | None = None
    measured_steps: Annotated[
        dict[Text, Annotated[tuple[ExpectedSteps, ...], Field(max_length=256)]],
        Field(max_length=16),
    ] = Field(default_factory=dict)
    cost_profiles: Annotated[
        tuple[CostProfile, ...], Field(max_length=MAX_PROFILES), FailFast()
    ] = ()
    provenance: Provenance | None = None

    @model_validator(mode="after")
    def _is_a_graph(self) -> DraftGraph:
        if self.exact != self.decoding.exact:
            raise ValueError(f"exact: {self.exact} contradicts cache {self.decoding.cache!r}")
        fills: list[frozenset[int]] = [frozenset()]
        seen = {fills[0]}
        work = 0
        for number, node in enumerate(self.nodes, start=1):
            fill = frozenset(i << 10 | j for i, j in node.fill)  # quick to compare
            ranks = [i for i, _ in node.fill]
            if list(node.fill) != sorted(node.fill) or len(set(ranks)) != len(ranks):
                raise ValueError(f"node {number}: position ranks are not distinct and sorted")
            if fill in seen:
                raise ValueError(f"node {number}: the same fill occurs twice")
            if len(set(node.parents)) != len(node.parents):
                raise ValueError(f"node {number}: names a parent twice")
            for parent in node.parents:
                if not 0 <= parent < number:
                    raise ValueError(
                        f"node {number}: parent {parent} does not come before it, so a prefix of "
                        "the list is not connected"
                    )
                work += len(fills[parent])
                if work > _MAX_PAIRS:
                    raise ValueError(f"node {number}: too many parents in all to check")
                if not fills[parent] < fill:
                    raise ValueError(f"node {number}: does not extend its parent {parent}")
            fills.append(fill)
            seen.add(fill)
        if self.expected_steps and len(self.expected_steps) != len(self.nodes) + 1:
            raise ValueError(
                f"expected_steps: {len(self.expected_steps)} values for budgets 0 to "
                f"{len(self.nodes)}"
            )
        for way, points in self.measured_steps.items():
            drafts = [point.drafts for point in points]
            if drafts != sorted(set(drafts)) or 0 in drafts:
                raise ValueError(f"measured_steps.{way}: numbers of drafts must ascend from 1")
        return self

    @property
    def budget(self) -> int:
        """Number of drafts, the root not counted."""
        return len(self.nodes)

    def to_networkx(self) -> nx.DiGraph[int]:
        """The graph for networkx: node 0 is the root, an edge leads to a state one step later.

        Nodes have `fill` (tuple of (position rank, token rank) pairs), `count` (calibration roots
        whose future passed through the state) and, where the artifact states expected steps,
        `expected_gain` (denoising steps per forward that this node adds to those before it).
        """
        import networkx as nx  # not at import: the runtime reads artifacts without it

        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_node(0, fill=(), count=self.calibration.roots)
        for number, node in enumerate(self.nodes, start=1):
            graph.add_node(number, fill=node.fill, count=node.count)
            if self.expected_steps:
                before, after = self.expected_steps[number - 1 : number + 1]
                graph.nodes[number]["expected_gain"] = round(after - before, 6)
            graph.add_edges_from((parent, number) for parent in node.parents)
        return graph

    def _repr_html_(self) -> str:
        """For notebooks: where it comes from, its drawing, and what it is expected to bring."""
        record, settings = self.calibration, self.decoding
        parts = [
            paragraph(
                f"Draft graph of <strong>{inline(self.model.id)}</strong> "
                f"({inline(self.model.family)}): {self.budget} nodes, {settings.policy}, cache "
                f"{settings.cache}, block {settings.block_length}; {record.roots} roots of "
                f"{record.samples} prompts ({inline(record.dataset)})"
            )
        ]
        if self.nodes:
            parts.append(svg(self.nodes, record.roots))
        if self.expected_steps:
            shown = shown_budgets(self.budget)
            steps = [f"{self.expected_steps[n]:.2f}" for n in shown]
            headings = ["drafts", *map(str, shown)]
            parts.append(table(headings, [["expected steps per forward", *steps]]))
        return page(*parts)

    def differences(self, settings: DecodingSettings) -> tuple[str, ...]:
        """Settings, in words, for which the graph's expected steps do not hold.

        Those that decide what a denoising step commits or knows; not how long an answer may be.
        """
        fields = ["policy", "block_length", "sub_block_length", "cache", "score"]
        fields += ["temperature", *FILTERS]
        if settings.steps_per_block is None:
            fields += ["tokens_per_step", "steps_per_block"]
        else:
            fields += ["steps_per_block", "schedule"]
        if settings.policy in ("threshold", "joint"):
            fields.append("threshold")
        if settings.policy == "joint":
            fields += ["edit_threshold", "max_post_steps"]
        if settings.policy == "entropy-bounded":
            fields.append("entropy_bound")
        if settings.plain_cache == self.decoding.plain_cache:  # the steps are plain decoding's
            fields.remove("cache")
        pairs = [(f, getattr(settings, f), getattr(self.decoding, f)) for f in fields]
        return tuple(f"{name} {ours} ({theirs})" for name, ours, theirs in pairs if ours != theirs)

    def digest(self) -> str:
        """SHA-256 over the canonical JSON, without costs, measured steps and provenance.

        What only newer minor versions know is left out where it is not given, so that the digests
        of older files stay what they were.
        """
        content = self.model_dump(
            mode="json", exclude={"cost_profiles", "measured_steps", "provenance"}
        )
        for field in ("prompts", "prompt_digests", "edges"):
            if content["calibration"][field] is None:
                del content["calibration"][field]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def to_json(self) -> str:
        """UTF-8 JSON text, one node a line; the same graph always gives the same bytes."""
        body = self.model_dump(mode="json")
        nodes = body.pop("nodes")
        head = {"format": FORMAT, "version": f"{MAJOR}.{MINOR}", "digest": self.digest(), **body}
        fields = [f"  {canonical_json(key)}: {canonical_json(head[key])}" for key in head]
        lines = ",\n".join(f"    {canonical_json(node)}" for node in nodes)
        fields.append('  "nodes": [\n' + lines + "\n  ]" if nodes else '  "nodes": []')
        return "{\n" + ",\n".join(fields) + "\n}\n"

    def save(self, path: str | Path) -> None:
        """Write the artifact, whole or not at all.

        Raises
        ------
        SpiffyError
            If the file cannot be written, or would be larger than one that can be read.
        """
        text = self.to_json()
        if len(text.encode()) > MAX_BYTES:
            raise SpiffyError(
                f"{path}: the graph takes more than the {MAX_BYTES} bytes an artifact may be: give "
                "it fewer nodes"
            )
        write_atomically(Path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> DraftGraph:
        """Read and validate an artifact.

        Raises
        ------
        SpiffyError
            In one sentence: not JSON, not an artifact, newer than this version reads, damaged, or
            not a graph.
        """
        path = Path(path)
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise SpiffyError(f'{path}: not a draft graph (no "format": "{FORMAT}")')
        minor = _minor_version(path, content.get("version"))
        if isinstance(content.get("decoding"), dict):  # a newer minor version may know more
            known = DecodingSettings.model_fields
            content["decoding"] = {k: v for k, v in content["decoding"].items() if k in known}
        stated = content.get("digest")
        migrated = minor < _PREFIX_EXACT and _is_prefix(content) and content.get("exact") is False
        if migrated:  # it drafted with one suffix for all states, which is `prefix-shared` now
            content["exact"] = True
        known_fields = {key: content[key] for key in content if key in cls.model_fields}
        text = strict_text(path, known_fields)
        try:
            # pydantic's JSON mode stays strict and still takes arrays for tuples.
            graph = cls.model_validate_json(text)
        except ValidationError as error:
            raise SpiffyError(f"{path}: {first_problem(error)}") from None
        written = graph.model_copy(update={"exact": False}) if migrated else graph
        if 1 <= minor <= MINOR and stated not in (None, written.digest()):
            raise SpiffyError(
                f"{path}: content and digest disagree: the file was edited or damaged; calibrate "
                "again, or remove the digest if you edited it on purpose"
            )
        return graph

    @classmethod
    def from_pretrained(
        cls,
        repo_or_dir: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> DraftGraph:
        """Load `draft_graph.json` from a checkpoint directory or a hub repository.

        Where the repository also holds weights, of another revision than those that the graph was
        calibrated with, a note says so, unless only the hub's cache is to be asked.

        Parameters
        ----------
        token, cache_dir, local_files_only
            As for `huggingface_hub.hf_hub_download`; of a repository.

        Raises
        ------
        SpiffyError
            If there is none, or it is invalid, or a directory is asked for another revision.
        """
        folder = Path(repo_or_dir)
        if folder.is_dir():
            refuse_revision(repo_or_dir, folder, revision)
            return cls.load(folder / GRAPH_FILE)
        path = download(
            repo_or_dir,
            revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        graph = cls.load(path)
        if not local_files_only:
            note_other_weights(graph.model, repo_or_dir, revision, token)
        return graph

    @classmethod
    def find(cls, place: str | Path) -> DraftGraph:
        """Load a graph from a file, a checkpoint directory, or a hub repository (owner/name).

        Raises
        ------
        SpiffyError
            If there is none, or it is invalid.
        """
        name = str(place)
        if not name:  # as of an unset variable; a Path would take it for the current folder
            raise SpiffyError("a graph of no name: give a file, a folder or owner/name")
        if names_repository(name) or Path(name).is_dir():
            return cls.from_pretrained(name)
        return cls.load(name)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of the artifact, envelope included."""
        schema = cls.model_json_schema()
        schema["properties"] |= {
            "format": {"const": FORMAT},
            "version": {"type": "string", "pattern": rf"^{MAJOR}\.\d+$"},
            "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        }
        schema["required"] = ["format", "version", *schema["required"]]
        return schema

    def check_fits(
        self, family: str, fingerprint: str, vocab_size: int, any_model: bool = False
    ) -> None:
        """Refuse a graph that was calibrated for another model.

        The fingerprint of an older version of this program cannot be compared: a note says so.

        Parameters
        ----------
        fingerprint
            Empty: not known, and not compared; a note says so.
        any_model
            Take any model of the family, such as a fine-tune: drafts never change a token, and are
            accepted less often the more the models differ.

        Raises
        ------
        SpiffyError
            Names what differs.
        """
        ours = self.model
        facts: list[tuple[str, object, object]] = [("family", ours.family, family)]
        if not any_model:
            facts.append(("vocabulary size", ours.vocab_size, vocab_size))
        older = fingerprint.startswith(FINGERPRINT) and not ours.fingerprint.startswith(FINGERPRINT)
        if not any_model and not older and fingerprint:
            facts.append(
                ("fingerprint of config and tokenizer", ours.fingerprint, fingerprint),
            )
        for what, expected, received in facts:
            if expected != received:
                advice = ", or take this one with --any-model"
                if what == "family":
                    advice = " (--any-model takes those of the same family)" if any_model else ""
                raise SpiffyError(
                    f"the graph was calibrated for {ours.id}: {what} {expected}, this model has "
                    f"{received}; calibrate one for this model{advice}"
                )
        if not fingerprint and not any_model:
            note(
                f"nothing tells whether the graph of {ours.id} is of this very model, whose "
                "tokenizer is not known here: family and vocabulary fit; wrap(module, tokenizer, "
                "family=...) makes it known"
            )
        if older and not any_model:
            note(
                f"the graph of {ours.id} was made by an older version, whose fingerprints cannot "
                "be compared: family and vocabulary fit; calibrate again to be sure"
            )


def _is_prefix(content: dict[str, Any]) -> bool:
    decoding = content.get("decoding")
    return isinstance(decoding, dict) and decoding.get("cache") == "prefix"


def _minor_version(path: Path, version: Any) -> int:
    parts = version.split(".") if isinstance(version, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise SpiffyError(f'{path}: "version" must look like "{MAJOR}.{MINOR}", got {version!r}')
    major = parts[0].lstrip("0")
    if len(major) > 3 or int(major or 0) > MAJOR:
        raise SpiffyError(
            f"{path}: format version {version[:20]} is newer than this program reads ({MAJOR}.x): "
            "upgrade spiffy-dllm"
        )
    if int(major or 0) < MAJOR:
        raise SpiffyError(f"{path}: format version {version[:20]} was never published")
    minor = parts[1].lstrip("0")
    return int(minor or 0) if len(minor) <= 3 else 1000
