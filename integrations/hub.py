"""Draft graphs on the hub: a model card, and one commit that brings it there with the graph."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib.resources import files

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError

from spiffy.schemas import CostProfile, DraftGraph, SpiffyError
from spiffy.schemas.errors import said
from spiffy.schemas.hub import GRAPH_FILE, Snapshot, answered, is_hub_id, snapshot, status_of
from spiffy.schemas.labels import device_in_words, policy_in_words, shown_budgets

_BEGIN, _END = "<!-- spiffy draft graph -->", "<!-- /spiffy draft graph -->"
_TAGS = ("draft-graph", "speculative-decoding", "diffusion-language-model", "spiffy")
_CODE, _REQUIREMENTS = "custom_generate/generate.py", "custom_generate/requirements.txt"
# What is found in these where we wrote them; the second was written by earlier versions.
_OURS = {_CODE: "Written by `spiffy-graph push`", _REQUIREMENTS: r"\Aspiffy-dllm>=\S+\s*\Z"}


def card(graph: DraftGraph, repo: str | None = None) -> str:
    """A model card in Markdown, with front matter.

    Parameters
    ----------
    repo
        Where the graph will be found; None: a file.
    """
    title = f"# Draft graph of {_plain(_model_name(graph))}"
    return f"---\n{_metadata(graph).to_yaml()}\n---\n\n{title}\n\n{section(graph, repo)}\n"


def section(graph: DraftGraph, repo: str | None = None, beside: bool = False) -> str:
    """The part of a card that is about the graph, between two comments that mark it."""
    model, settings, record = graph.model, graph.decoding, graph.calibration
    revision = "" if model.revision is None else f" at `{_code(model.revision)}`"
    place = repo or GRAPH_FILE
    lines = [
        _BEGIN,
        f"{_names(_model_name(graph))}{revision}, of the family {_plain(model.family)}: "
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
        f"| sampling | {settings.sampling} |",
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


def _model_name(graph: DraftGraph) -> str:
    """The hub id of a graph's model where it goes by an alias, else what it is called."""
    name = graph.model.id
    if is_hub_id(name):
        return name
    from spiffy.runtime.models import ALIASES  # imports torch

    place = ALIASES.get(name, name)
    return place if is_hub_id(place) else name


def _names(model: str) -> str:
    """How a section begins."""
    return f"A draft graph for {_plain(model)}"


def _metadata(graph: DraftGraph) -> ModelCardData:
    """Front matter; a base model only where its id is one of the hub."""
    name = _model_name(graph)
    data = ModelCardData(library_name="spiffy-dllm", tags=list(_TAGS))
    if is_hub_id(name):
        data["base_model"] = name
        if graph.model.revision is not None:
            data["base_model_revision"] = graph.model.revision
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
    rows = [
        n for n in shown_budgets(graph.budget) if any(n in column for column in columns.values())
    ]
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
        where = _plain(device_in_words(profile.device, profile.dtype, profile.threads))
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
    the graph. There is no requirements.txt: transformers would refuse to load the model, too,
    where what it names is not installed.
    """
    template = files("spiffy.integrations").joinpath("templates/generate.py")
    code = template.read_text(encoding="utf-8").replace('"OWNER/NAME"', json.dumps(repo))
    return {_CODE: code}


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
        Make it private. A repository is otherwise what its owner's new ones are by default.

    Raises
    ------
    SpiffyError
        If there is no token, the repository is of the other kind or has a `custom_generate` that
        is not ours, or the hub refuses.
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
        old = _text(repo, there, "README.md")
        content = {
            GRAPH_FILE: graph.to_json(),
            "README.md": _merged(old, graph, repo, weights_there),
        }
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        if weights_there:
            _check_code(repo, there)
            content |= beside_weights(repo)
            if there is not None and _REQUIREMENTS in there.files:
                operations.append(CommitOperationDelete(_REQUIREMENTS))
        operations += [CommitOperationAdd(name, text.encode()) for name, text in content.items()]
        api = HfApi()
        if there is None:  # False would say public where an organization's default is private
            api.create_repo(repo, private=private or None)
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


def _text(repo: str, there: Snapshot | None, name: str) -> str | None:
    """A file of a repository; None if it has none by that name."""
    if there is None or name not in there.files:
        return None
    path = hf_hub_download(repo, name, revision=there.commit)
    with open(path, encoding="utf-8") as file:
        return file.read()


def _check_code(repo: str, there: Snapshot | None) -> None:
    """Refuse to replace or to join a `custom_generate` that somebody else wrote."""
    for name, pattern in _OURS.items():
        text = _text(repo, there, name)
        if text is not None and not re.search(pattern, text):
            raise SpiffyError(
                f"{repo} has a {name} that is not ours: push to a repository of the graph's own, "
                "without --beside-weights, or remove that file first"
            )


def _merged(old: str | None, graph: DraftGraph, repo: str, weights_there: bool) -> str:
    """A README with the part about the graph: new, replaced where it was, or added at the end."""
    ours, replaced = section(graph, repo, weights_there), ""
    if old is None:
        return card(graph, repo) if not weights_there else f"{ours}\n"
    if _BEGIN in old and _END in old.partition(_BEGIN)[2]:
        before, _, rest = old.partition(_BEGIN)
        replaced, _, after = rest.partition(_END)
        text = before + ours + after
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
    base = written.data.get("base_model")
    said_so = (f"{_names(str(base))}{rest}" for rest in (" at `", ", of the family "))
    if fresh.get("base_model") is not None or any(words in replaced for words in said_so):
        for key in ("base_model", "base_model_revision"):  # of the graph before this one
            if fresh.get(key) is None:
                written.data.pop(key)
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
        status = status_of(error)
        advice = ""
        if status == 401:
            advice = ": the token is not valid; run `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            advice = ": the token may not write there"
        outcome = f"nothing was pushed{advice}"
        if committing and status is None:  # the commit may have been made, and its answer lost
            outcome = "it is not known whether the commit was made: look, or push again"
        raise SpiffyError(f"{repo}: {outcome} ({answered(error)})") from None
