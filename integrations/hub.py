"""Draft graphs on the hub: a model card, and one commit that brings it there with the graph."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib.metadata import version
from importlib.resources import files

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError

from spiffy.schemas import CostProfile, DraftGraph, SpiffyError
from spiffy.schemas.errors import said
from spiffy.schemas.hub import GRAPH_FILE, Snapshot, answered, is_hub_id, snapshot
from spiffy.schemas.labels import policy_in_words

_BEGIN, _END = "<!-- spiffy draft graph -->", "<!-- /spiffy draft graph -->"
_TAGS = ("draft-graph", "speculative-decoding", "diffusion-language-model", "spiffy")
_BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128)


def card(graph: DraftGraph, repo: str | None = None) -> str:
    """A model card in Markdown, with front matter.

    Parameters
    ----------
    repo
        Where the graph will be found; None: a file.
    """
    title = f"# Draft graph of {_plain(graph.model.id)}"
    return f"---\n{_metadata(graph).to_yaml()}\n---\n\n{title}\n\n{section(graph, repo)}\n"


def section(graph: DraftGraph, repo: str | None = None, beside: bool = False) -> str:
    """The part of a card that is about the graph, between two comments that mark it."""
    model, settings, record = graph.model, graph.decoding, graph.calibration
    revision = "" if model.revision is None else f" at `{_code(model.revision)}`"
    place = repo or GRAPH_FILE
    lines = [
        _BEGIN,
        f"A draft graph for {_plain(model.id)}{revision}, of the family {_plain(model.family)}: "
        "answers come with fewer forwards of the model, and "
        + ("with the same tokens." if graph.exact else "nearly always with the same tokens."),
        "",
        "```",
        "pip install spiffy-dllm",
        f'spiffy-decode --graph {place} --prompt "..."',
        "```",
        "",
    ]
    if beside:
        lines += [
            "In transformers, for people who have read `custom_generate/generate.py`:",
            "",
            "```python",
            f'model.generate(**inputs, custom_generate="{repo}", trust_remote_code=True)',
            "```",
            "",
        ]
    lines += [
        "| made for | |",
        "| --- | --- |",
        f"| unmasking policy | {policy_in_words(settings)} |",
        f"| block length, cache | {settings.block_length}, {settings.cache} |",
        f"| temperature | {settings.temperature:g} |",
        f"| calibrated on | {_plain(record.dataset)}: {record.samples} prompts, "
        f"{record.roots} roots, seed {record.seed} |",
        f"| held out from that | {record.held_out_samples} prompts |",
        f"| drafts | {graph.budget}, grown for {_plain(record.objective)} |",
        f"| digest | `{graph.digest()[:16]}` |",
        "",
        *_steps_table(graph),
        *_cost_table(graph.cost_profiles),
        _END,
    ]
    return "\n".join(lines)


def _metadata(graph: DraftGraph) -> ModelCardData:
    """Front matter; a base model only where its id is one of the hub."""
    model = graph.model
    data = ModelCardData(library_name="spiffy-dllm", tags=list(_TAGS))
    if is_hub_id(model.id):
        data["base_model"] = model.id
        if model.revision is not None:
            data["base_model_revision"] = model.revision
    return data


def _steps_table(graph: DraftGraph) -> list[str]:
    """Denoising steps per forward by number of drafts, replayed and measured."""
    columns: dict[str, dict[int, float]] = {}
    if graph.expected_steps:
        columns["nodes, replayed"] = dict(enumerate(graph.expected_steps))
    if graph.acceptance is not None and graph.acceptance.expected_steps:
        points = graph.acceptance.expected_steps
        columns["acceptance model, replayed"] = {p.drafts: p.steps for p in points}
    for way, measured in graph.measured_steps.items():
        columns[f"{_plain(way)}, decoded"] = {p.drafts: p.steps for p in measured}
    asked = sorted({n for n in (*_BUDGETS, graph.budget) if n <= graph.budget})
    rows = [n for n in asked if any(n in column for column in columns.values())]
    if not rows:
        return []
    prompts = "held-out prompts" if graph.calibration.held_out_samples else "the same prompts"
    return [
        f"Denoising steps that a forward is worth, on {prompts}; plain decoding: 1.",
        "",
        f"| drafts | {' | '.join(columns)} |",
        f"| ---: |{' ---: |' * len(columns)}",
        *(
            f"| {n} | {' | '.join(f'{c[n]:.2f}' if n in c else '' for c in columns.values())} |"
            for n in rows
        ),
        "",
    ]


def _cost_table(profiles: Sequence[CostProfile]) -> list[str]:
    """What a forward took where it was measured."""
    if not profiles:
        return []
    lines = ["| measured on | drafts | ms per forward |", "| --- | ---: | ---: |"]
    for profile in profiles:
        threads = "" if profile.threads is None else f", {profile.threads} threads"
        where = f"{_plain(profile.device)}, {_plain(profile.dtype)}{threads}"
        ends = (profile.points[0], profile.points[-1])
        lines += [f"| {where} | {point.drafts} | {1000 * point.seconds:.3g} |" for point in ends]
    return [*lines, ""]


def _plain(text: str) -> str:
    """Text as such: an artifact's names must not become links, tables or HTML in a card."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape(text, quote=False))


def _code(text: str) -> str:
    """Text within backticks, in a table or not."""
    return re.sub(r"[`|<>&\\]", "?", text)


def beside_weights(repo: str) -> dict[str, str]:
    """Files beyond the graph for a repository that holds weights, by name.

    With them, transformers' `generate(custom_generate=repo, trust_remote_code=True)` decodes with
    the graph.
    """
    template = files("spiffy.integrations").joinpath("templates/generate.py")
    code = template.read_text(encoding="utf-8").replace('"OWNER/NAME"', json.dumps(repo))
    return {
        "custom_generate/generate.py": code,
        "custom_generate/requirements.txt": f"spiffy-dllm>={version('spiffy-dllm')}\n",
    }


def push(
    graph: DraftGraph, repo: str, *, weights_there: bool = False, private: bool = False
) -> str:
    """Put a graph into a repository of the hub, in one commit; its address.

    The card's part about the graph is written or replaced; what else is in README.md stays.

    Parameters
    ----------
    weights_there
        The repository is a model's: the folder `custom_generate` goes there too, and the model's
        front matter stays as it is. Otherwise the repository is the graph's own, and made if there
        is none.
    private
        Make it private.

    Raises
    ------
    SpiffyError
        If there is no token, the repository is of the other kind, or the hub refuses.
    """
    if not is_hub_id(repo):
        raise SpiffyError(f"{repo!r} is no repository of the hub: give owner/name")
    if get_token() is None:
        raise SpiffyError(f"{repo}: the hub wants a token: run `hf auth login`, or set HF_TOKEN")
    with _errors(repo):
        there = _there(repo)
        if weights_there and (there is None or not there.holds_weights):
            raise SpiffyError(
                f"{repo} holds no weights (no config.json) for the graph to be beside: drop "
                "--beside-weights, or push the model first"
            )
        if not weights_there and there is not None and there.holds_weights:
            raise SpiffyError(
                f"{repo} holds a model: give --beside-weights, or a repository of the graph's own"
            )
        old = None
        if there is not None and "README.md" in there.files:
            path = hf_hub_download(repo, "README.md", revision=there.commit)
            with open(path, encoding="utf-8") as file:
                old = file.read()
        content = {
            GRAPH_FILE: graph.to_json(),
            "README.md": _merged(old, graph, repo, weights_there),
        }
        if weights_there:
            content |= beside_weights(repo)
        operations = [CommitOperationAdd(name, text.encode()) for name, text in content.items()]
        api = HfApi()
        if there is None:
            api.create_repo(repo, private=private)
    with _errors(repo, committing=True):
        done = api.create_commit(
            repo,
            operations,
            commit_message=f"Draft graph, {graph.budget} drafts",
            parent_commit=None if there is None else there.commit,
        )
    return str(done.commit_url)


def _there(repo: str) -> Snapshot | None:
    try:
        return snapshot(repo)
    except RepositoryNotFoundError:
        return None


def _merged(old: str | None, graph: DraftGraph, repo: str, weights_there: bool) -> str:
    """A README with the part about the graph: new, replaced where it was, or added at the end."""
    ours = section(graph, repo, weights_there)
    if old is None:
        return card(graph, repo) if not weights_there else f"{ours}\n"
    if _BEGIN in old and _END in old.partition(_BEGIN)[2]:
        before, _, rest = old.partition(_BEGIN)
        text = before + ours + rest.partition(_END)[2]
    else:
        text = f"{old.rstrip()}\n\n{ours}\n"
    if weights_there:
        return text
    fresh = _metadata(graph)
    try:
        written = ModelCard(text)
        fresh["tags"] = list(dict.fromkeys([*(written.data.get("tags") or ()), *_TAGS]))
    except Exception as error:  # YAML's own, that it is no mapping, and tags that are no list
        reason = said(error, 300)
        raise SpiffyError(
            f"{repo}: the front matter of its README.md cannot be read ({reason}): mend it"
        ) from None
    for key in ("library_name", "tags", "base_model", "base_model_revision"):
        if (value := fresh.get(key)) is not None:
            written.data[key] = value
    return str(written)


@contextmanager
def _errors(repo: str, committing: bool = False) -> Iterator[None]:
    try:
        yield
    except SpiffyError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = ""
        if status == 401:
            advice = ": the token is not valid; run `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            advice = ": the token may not write there"
        outcome = f"nothing was pushed{advice}"
        if committing and status is None:  # the commit may have been made, and its answer lost
            outcome = "it is not known whether the commit was made: look, or push again"
        raise SpiffyError(f"{repo}: {outcome} ({answered(error)})") from None
