"""Draft graphs in repositories of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from spiffy.schemas.errors import SpiffyError, said
from spiffy.schemas.notes import note
from spiffy.schemas.records import ModelRecord

#: What a graph is called beside weights, and in a repository of its own.
GRAPH_FILE = "draft_graph.json"


class Snapshot(NamedTuple):
    """A repository at a commit.

    Attributes
    ----------
    files
        Names, and what stands for their content; empty where the hub does not say.
    is_public
        Whether the hub says that anybody may read it.
    """

    commit: str
    files: Mapping[str, str]
    is_public: bool = False

    @property
    def holds_weights(self) -> bool:
        """Whether it is a checkpoint."""
        return "config.json" in self.files

    @property
    def weights(self) -> dict[str, str]:
        """What decides the forward: weights and config."""
        own = ("config.json",)
        return {k: v for k, v in self.files.items() if k in own or k.endswith(".safetensors")}


def is_hub_id(name: str) -> bool:
    """Whether it has the form owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def names_repository(place: str) -> bool:
    """Whether a place is a repository: no file or folder, and not what a missing file is called."""
    return not Path(place).exists() and not place.endswith(".json") and is_hub_id(place)


def cached_commit(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds (snapshots/<commit>); None of others."""
    return folder.name if folder.parent.name == "snapshots" else None


def refuse_revision(name: str, folder: Path, revision: str | None) -> None:
    """Refuse a revision of what is a folder here, unless the folder holds that commit.

    Raises
    ------
    SpiffyError
        Says so, of the place's name.
    """
    if revision not in (None, cached_commit(folder)):
        raise SpiffyError(
            f"{name} is a folder here, which has no revision {revision!r}: drop it, or give a hub "
            "id (owner/name)"
        )


def graph_file(place: str) -> Path:
    """The file of a graph that is given as a file, a folder or a repository.

    Raises
    ------
    SpiffyError
        If a repository has none, or it cannot be had.
    """
    if names_repository(place):
        return download(place, None)
    return Path(place) / GRAPH_FILE if Path(place).is_dir() else Path(place)


def answered(error: BaseException) -> str:
    """What the hub answered; its client wraps that in advice about connections."""
    while not _has_answer(error) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, LookupError | TypeError | AttributeError | json.JSONDecodeError):
        return "it answers what its client cannot read: is HF_ENDPOINT a hub?"
    text = re.sub(r" For more information check: \S+", "", said(error))
    return text[:400] or type(error).__name__


def _has_answer(error: BaseException) -> bool:
    """Whether an error quotes the server, or a check of what it was sent; causes do not."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError | json.JSONDecodeError):
        return False
    return isinstance(error, HfHubHTTPError | ValueError) and bool(said(error))


def status_of(error: BaseException) -> int | None:
    """The status that the hub answered with, of an error or its causes; None: no answer came."""
    found: BaseException | None = error
    while found is not None:
        status = getattr(getattr(found, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        found = found.__cause__
    return None


def snapshot(repo: str, revision: str | None = None, token: str | bool | None = None) -> Snapshot:
    """Ask the hub what a repository holds; its client's exceptions pass through."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    info = api.model_info(repo, revision=revision, files_metadata=True, timeout=10)
    files = {
        file.rfilename: str(getattr(file.lfs, "sha256", None) or file.blob_id or "")
        for file in info.siblings or ()
    }
    return Snapshot(str(info.sha), files, info.private is False)


@cache
def holds_weights(repo: str) -> bool:
    """Whether a repository holds a checkpoint; False also where the hub cannot be asked."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return snapshot(repo).holds_weights
    except Exception:  # the hub's client raises many kinds
        return isinstance(try_to_load_from_cache(repo, "config.json"), str)


def checkpoint_beside(place: str) -> str | None:
    """The checkpoint in the folder or the repository where a graph was found, if there is one.

    Many programs have a config.json: beside a graph by another name than `GRAPH_FILE` it is a
    checkpoint's only if weights lie there too.
    """
    path = Path(place)
    if not path.exists():
        return place if holds_weights(place) else None
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        return None
    shipped = path.is_dir() or path.name == GRAPH_FILE
    return as_folder(folder) if shipped or any(folder.glob("*.safetensors")) else None


def as_folder(folder: Path) -> str:
    """A folder's path, by which it cannot be taken for an alias."""
    return str(folder) if folder.is_absolute() or len(folder.parts) != 1 else f"./{folder}"


def download(
    repo: str,
    revision: str | None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Path of a repository's graph in the hub's cache, downloaded if needed.

    Parameters
    ----------
    token, cache_dir, local_files_only
        As for `huggingface_hub.hf_hub_download`.

    Raises
    ------
    SpiffyError
        If there is none, or it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        found = hf_hub_download(
            repo,
            GRAPH_FILE,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except RemoteEntryNotFoundError:
        raise SpiffyError(f"{repo}: the hub has no {GRAPH_FILE} there") from None
    except Exception as error:  # the hub's client raises many kinds
        raise SpiffyError(f"{repo}: no {GRAPH_FILE} to be had ({answered(error)})") from None
    return Path(found)


def note_other_weights(
    model: ModelRecord, repo: str, revision: str | None, token: str | bool | None
) -> None:
    """Say so if the weights beside a graph are not those that it was calibrated with.

    A commit that changes no weights makes no other model: their content is compared. Nothing is
    said where the hub cannot be asked, or the graph does not name a revision.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    if model.revision is None:
        return
    named = f"the revision that the graph was calibrated with ({model.id} at {model.revision[:12]})"
    try:
        here = snapshot(repo, revision, token)
        if not here.weights:
            return
        own = model.id if is_hub_id(model.id) else repo
        same = snapshot(own, model.revision, token).weights == here.weights
    except RevisionNotFoundError:
        note(f"{repo}: whether its weights are of {named} cannot be told: the hub does not know it")
    except Exception:  # the hub's client raises many kinds
        return
    else:
        if not same:
            note(
                f"{repo}: its weights are not of {named}: no token changes, but drafts may be "
                "accepted less often; calibrate again"
            )
