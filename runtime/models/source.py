"""Where a checkpoint's files are: in a directory, in the hub's cache, or on the hub."""

from __future__ import annotations

import json
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError

from spiffy.runtime.models.published import ALIASES
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.errors import option
from spiffy.schemas.hub import answered, checkpoint_beside, is_hub_id, refuse_revision
from spiffy.schemas.notes import note

_MAX_BYTES = 64 * 1024 * 1024  # indices of shards have a line per parameter
# How files begin that stand for another, as a clone without git-lfs or git-xet leaves them.
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"# xet version")


@dataclass(frozen=True)
class Source:
    """A checkpoint directory, or a hub id at one commit.

    Attributes
    ----------
    place
        Path of the directory, or the hub id.
    revision
        Hub commit, tag or branch; None is the main branch.
    offline
        Why the hub cannot be asked, only its cache; None if it can.
    asked
        The revision that was asked for, of which `revision` is the commit.
    what
        What it is called where it cannot be had.

    What is missing is absent only where the directory, the hub or a cache that knows the whole
    repository says "not found"; any other answer, for any file, is an error.
    """

    place: str
    revision: str | None = None
    offline: str | None = None
    asked: str | None = None
    what: str = "model"

    @classmethod
    def of(cls, name: str, revision: str | None = None) -> Source:
        """Resolve an alias, a hub id or a directory.

        Raises
        ------
        SpiffyError
            If it is none of them, or is a directory, which has no other revision than its own.
        """
        place = ALIASES.get(name, name)
        if place != name and (Path(name) / "config.json").is_file():
            note(f"{name} is a published checkpoint's name, which is taken; ./{name} is the folder")
        found = cls._at(place, revision)
        if found is None:
            alike = get_close_matches(name, ALIASES, n=3)
            meant = f"; did you mean {' or '.join(alike)}?" if alike else ""
            raise SpiffyError(
                f"unknown model {name!r}: no such directory; give one, a hub id, or a published "
                f"checkpoint's name (docs/checkpoints.md){meant}"
            )
        if found.is_directory and place != name and revision is not None:
            raise SpiffyError(
                f"{name} ships with the package and has no revisions: drop {option('revision')}"
            )
        if found.is_directory:
            refuse_revision(name, Path(place), revision)
        return found

    @classmethod
    def of_adapter(cls, name: str) -> Source:
        """Resolve a hub id or a directory.

        Raises
        ------
        SpiffyError
            If it is neither.
        """
        found = cls._at(name, None)
        if found is None:
            raise SpiffyError(f"unknown adapter {name!r}: no such directory; give one, or a hub id")
        return replace(found, what="adapter")

    @classmethod
    def _at(cls, place: str, revision: str | None) -> Source | None:
        """The directory or the hub id; None if it is neither.

        The hub is asked once for the commit: all files are then of that commit, and without network
        no file waits for the retries of the hub's client.
        """
        try:
            if place and Path(place).is_dir():
                return cls(place)
        except OSError as error:
            raise SpiffyError(f"{place}: cannot be read ({error.strerror or error})") from None
        if not is_hub_id(place):
            return None
        try:
            commit = HfApi().model_info(place, revision=revision, timeout=10).sha
        except Exception as error:  # the hub's client raises many kinds
            return cls(place, revision, offline=answered(error))
        return cls(place, commit, asked=revision)

    @property
    def is_directory(self) -> bool:
        """Whether the files lie in a directory of the user's."""
        return Path(self.place).is_dir()

    @property
    def own_name(self) -> str:
        """What the checkpoint itself is called, without the folders or the owner it is under."""
        place = Path(self.place).resolve() if self.is_directory else Path(self.place)
        if place.parent.name == "snapshots":  # models--<owner>--<name>/snapshots/<commit>
            place = place.parent.parent
        return place.name

    @property
    def hub_id(self) -> str | None:
        """The hub id, also of a folder in the hub's cache; None for a folder of the user's."""
        if not self.is_directory:
            return self.place
        repository = Path(self.place).resolve().parent.parent.name
        kind, _, name = repository.partition("--")
        return name.replace("--", "/", 1) if kind == "models" else None

    def file(self, name: str) -> Path:
        """Path of a file that has to be there, downloaded if needed.

        Raises
        ------
        SpiffyError
            If it is not, or cannot be read.
        """
        path = self.optional_file(name)
        if path is not None:
            return path
        if self.is_directory:
            raise SpiffyError(f"{self.place} has no {name}: is it a complete checkpoint directory?")
        if self.offline is not None:
            raise self._unreachable(self.offline)
        raise SpiffyError(f"{self.place}: the hub says that it has no {name}")

    def optional_file(self, name: str) -> Path | None:
        """Path of a file that may be missing, downloaded if needed.

        Raises
        ------
        SpiffyError
            If it may be there and cannot be had.
        """
        path = Path(self.place) / name if self.is_directory else self._from_hub(name)
        return None if path is None else _readable(path)

    def _from_hub(self, name: str) -> Path | None:
        """Path in the hub's cache, downloaded if needed; None if the hub has no such file."""
        cached = try_to_load_from_cache(self.place, name, revision=self.revision)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None:  # noted there when the hub said "not found"
            return None
        if self.offline is None and not constants.HF_HUB_OFFLINE:
            try:
                return Path(hf_hub_download(self.place, name, revision=self.revision))
            except RemoteEntryNotFoundError:
                return None
            except Exception as error:  # the hub's client raises many kinds
                raise SpiffyError(
                    f"{self.place}: {name} cannot be had from the hub: {answered(error)}"
                ) from None
        listed = self._listed()
        if listed is not None and name not in listed:
            return None
        if listed is None and constants.HF_HUB_OFFLINE:
            # Who sets it says that the cache is all there is.
            config = try_to_load_from_cache(self.place, "config.json", revision=self.revision)
            if isinstance(config, str):
                broken = Path(config).with_name(name)
                if broken.is_symlink() or broken.exists():
                    return broken
                note(
                    f"{self.place}: the hub's cache does not say whether it is complete; what it "
                    f"lacks is taken as absent. `hf download {self.place}` completes it"
                )
            return None
        reason = self.offline or "HF_HUB_OFFLINE is set"
        if name == "config.json":
            raise self._unreachable(reason)
        raise SpiffyError(
            f"{self.place}: {name} is not in the cache folder {constants.HF_HUB_CACHE}, and the "
            f"hub cannot be asked whether there is one ({reason[:200]}): run `hf download "
            f"{self.place}` where there is network, or set HF_HUB_OFFLINE=1 if the cache has all "
            "that the hub has"
        )

    def _listed(self) -> frozenset[str] | None:
        """Names of the repository's files, where a download of all of it has left a list."""
        ask = getattr(huggingface_hub, "get_cached_repo_tree", None)  # huggingface_hub 2
        if ask is None:
            return None
        try:
            entries = ask(self.place, revision=self.revision or "main")
        except Exception:  # no list, or one that cannot be read: nothing is known
            return None
        return frozenset(str(getattr(entry, "path", entry)) for entry in entries)

    def weight_files(self) -> list[Path]:
        """Paths of the safetensors files that hold the weights.

        Raises
        ------
        SpiffyError
            If there are none, or not all that the index names.
        """
        whole = self.optional_file("model.safetensors")
        index = None if whole else self.optional_file("model.safetensors.index.json")
        if whole is None and index is None:
            self.refuse_adapter()
        elif self.optional_file("adapter_config.json") is not None:
            note(
                f"{self.place} holds an adapter (LoRA) beside its weights: it is not applied "
                f"unless {option('adapter')} names it"
            )
        if whole is not None:
            return [whole]
        if index is not None:
            return [self.file(name) for name in _shards(index)]
        if self.is_directory:
            raise SpiffyError(
                f"{self.place} has no model.safetensors and no index of shards; pickled weights "
                "are refused because loading them can run code: convert them to safetensors first"
            )
        raise self._unreachable(f"no weights in safetensors: {self.offline or 'not on the hub'}")

    def remember(self) -> None:
        """Let the hub's cache know which commit the name stands for, for times without network."""
        if not self.is_directory and self.offline is None and not constants.HF_HUB_OFFLINE:
            with suppress(Exception):  # as files are asked for by commit, it does not
                hf_hub_download(self.place, "config.json", revision=self.asked)

    def refuse_adapter(self) -> None:
        """Refuse a LoRA adapter, which has no model of its own.

        Raises
        ------
        SpiffyError
            Names the model that it adapts.
        """
        path = self.optional_file("adapter_config.json")
        if path is not None:
            base = read_json(path).get("base_model_name_or_path") or "its base model"
            raise SpiffyError(
                f"{self.place} is an adapter (LoRA) of {base}, without that model's weights: give "
                f"that model, and --adapter {self.place} (adapter= in Python)"
            )

    def _unreachable(self, reason: str) -> SpiffyError:
        folder = self.place.split("/")[-1]
        return SpiffyError(
            f"{self.what} {self.place!r} is neither in the cache folder {constants.HF_HUB_CACHE} "
            f"nor reachable ({' '.join(reason.split())[:200]}): run `hf download {self.place}` "
            f"where there is network, or pass the directory of a local copy, such as ./{folder}, "
            "instead of the name"
        )


def served_name(name: str) -> str:
    """What others call a model: in the hub's cache the hub id, of a folder its own name."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    own = folder.name if folder.name not in ("", "..") else folder.resolve().name
    return Source(name).hub_id or own


def model_of_graph(graph: DraftGraph, place: str) -> tuple[str, str | None]:
    """Name and revision of the model that a graph belongs to, which was found at `place`.

    That is the checkpoint beside it, in a folder or a repository, or else the one that it names.

    Raises
    ------
    SpiffyError
        If it names neither an alias nor a hub id, nor a folder that is here: of a folder it knows
        the name, not where it is.
    """
    if (beside := checkpoint_beside(place)) is not None:
        return beside, None
    named = graph.model.id
    if named in ALIASES:
        return named, graph.model.revision
    is_here = Path(named).is_dir()
    if not is_here and not is_hub_id(named):
        raise SpiffyError(
            f"{place}: the model that it was calibrated with is only known to be called {named!r}, "
            f"and no such folder is here: give {option('model')}"
        )
    return named, None if is_here else graph.model.revision


def _readable(path: Path) -> Path | None:
    """The path if it leads to a file that can be read, None if there is nothing by that name.

    Raises
    ------
    SpiffyError
        If there is something else, or a pointer that stands for the file.
    """
    try:
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise SpiffyError(f"{path}: not a regular file")  # opening a pipe would wait for ever
        with path.open("rb") as file:
            begin = file.read(64)
    except FileNotFoundError:
        if path.is_symlink():
            raise SpiffyError(f"{path}: a link that leads nowhere") from None
        return None
    except OSError as error:
        raise SpiffyError(f"{path}: cannot be read ({error.strerror or error})") from None
    if begin.startswith(_POINTERS):
        raise SpiffyError(
            f"{path}: a git-lfs pointer, not the file that it stands for: run `git lfs pull` in "
            "its folder, or `hf download`"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises
    ------
    SpiffyError
        If it does not.
    """
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise SpiffyError(f"{path}: {size} bytes are more than a checkpoint's JSON may have")
        content = json.loads(path.read_text(encoding="utf-8"))
    except SpiffyError:
        raise
    except RecursionError:
        raise SpiffyError(f"{path}: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise SpiffyError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise SpiffyError(f"{path}: expected a JSON object")
    return content


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise SpiffyError(f"{index}: expected a weight_map from parameters to files")
    if not where:
        raise SpiffyError(f"{index}: the weight_map is empty")
    for name in where.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise SpiffyError(
                f"{index}: {name!r} is not the name of a safetensors file beside it; other weights "
                "are refused because loading them can run code"
            )
    return sorted(set(where.values()))
