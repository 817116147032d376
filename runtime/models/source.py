"""Where a checkpoint's files are: in a directory, in the hub's cache, or on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from transformers.utils.hub import cached_file, cached_files

from spiffy.schemas import SpiffyError

_MAX_BYTES = 64 * 1024 * 1024  # indices of shards have a line per parameter
_SHIPPED = Path(__file__).parent.parent / "checkpoints"

# Short names -> directories that ship with the package, or hub ids.
ALIASES: Mapping[str, str] = {
    "tiny-llada": str(_SHIPPED / "tiny-llada"),
    "tiny-dream": str(_SHIPPED / "tiny-dream"),
    "tiny-sdar": str(_SHIPPED / "tiny-sdar"),
    "tiny-llada2": str(_SHIPPED / "tiny-llada2"),
    "llada-8b": "GSAI-ML/LLaDA-8B-Instruct",
    "llada-8b-base": "GSAI-ML/LLaDA-8B-Base",
    "llada-1.5": "GSAI-ML/LLaDA-1.5",
    "dream-7b": "Dream-org/Dream-v0-Instruct-7B",
    "dream-7b-base": "Dream-org/Dream-v0-Base-7B",
    "dream-coder-7b": "Dream-org/Dream-Coder-v0-Instruct-7B",
    "dream-coder-7b-base": "Dream-org/Dream-Coder-v0-Base-7B",
    "diffucoder-7b": "apple/DiffuCoder-7B-cpGRPO",
    "diffucoder-7b-instruct": "apple/DiffuCoder-7B-Instruct",
    "diffucoder-7b-base": "apple/DiffuCoder-7B-Base",
    "sdar-1.7b": "JetLM/SDAR-1.7B-Chat",
    "sdar-1.7b-b32": "JetLM/SDAR-1.7B-Chat-b32",
    "sdar-4b": "JetLM/SDAR-4B-Chat",
    "sdar-4b-b16": "JetLM/SDAR-4B-Chat-b16",
    "sdar-4b-b32": "JetLM/SDAR-4B-Chat-b32",
    "sdar-8b": "JetLM/SDAR-8B-Chat",
    "sdar-8b-b16": "JetLM/SDAR-8B-Chat-b16",
    "sdar-8b-b32": "JetLM/SDAR-8B-Chat-b32",
    "sdar-8b-b64": "JetLM/SDAR-8B-Chat-b64",
    "sdar-30b-a3b": "JetLM/SDAR-30B-A3B-Chat",
    "sdar-30b-a3b-b32": "JetLM/SDAR-30B-A3B-Chat-b32",
    "sdar-30b-a3b-sci": "JetLM/SDAR-30B-A3B-Sci",
    "llada2-mini": "inclusionAI/LLaDA2.0-mini",
    "llada2-flash": "inclusionAI/LLaDA2.0-flash",
    "illada-8b": "GSAI-ML/iLLaDA-8B-Instruct",
    "illada-8b-base": "GSAI-ML/iLLaDA-8B-Base",
    "stable-diffcoder-8b": "ByteDance-Seed/Stable-DiffCoder-8B-Instruct",
    "stable-diffcoder-8b-base": "ByteDance-Seed/Stable-DiffCoder-8B-Base",
    "qwen3-0.6b-mdlm": "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
    "qwen3-0.6b-bd3lm": "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
    "qwen2.5-coder-0.5b-mdlm": "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1",
    "qwen2.5-coder-0.5b-bd3lm": "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
    "trado-4b": "Gen-Verse/TraDo-4B-Instruct",
    "trado-8b": "Gen-Verse/TraDo-8B-Instruct",
    "trado-8b-thinking": "Gen-Verse/TraDo-8B-Thinking",
}


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
    """

    place: str
    revision: str | None = None
    offline: str | None = None

    @classmethod
    def of(cls, name: str, revision: str | None = None) -> Source:
        """Resolve an alias, a hub id or a directory.

        The hub is asked once for the commit: all files are then of that commit, and without network
        no file waits for the retries of the hub's client.

        Raises
        ------
        SpiffyError
            If it is none of them.
        """
        place = ALIASES.get(name, name)
        if place and Path(place).is_dir():
            return cls(place)
        if place.count("/") != 1 or place.startswith((".", "/", "~")):
            known = ", ".join(ALIASES)
            raise SpiffyError(
                f"unknown model {name!r}: no such directory; give one, a hub id, or one of {known}"
            )
        try:
            commit = HfApi().model_info(place, revision=revision, timeout=10).sha
        except Exception as error:  # the hub's client raises many kinds
            return cls(place, revision, offline=" ".join(str(error).split()))
        return cls(place, commit)

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

    def file(self, name: str) -> Path:
        """Path of a file that has to be there, downloaded if needed.

        Raises
        ------
        SpiffyError
            If it is not.
        """
        return self.files([name])[0]

    def files(self, names: list[str]) -> list[Path]:
        """Paths of several files, in the order given; see `file`."""
        if self.is_directory:
            paths = [Path(self.place) / name for name in names]
            for path in paths:
                if not path.is_file():
                    raise SpiffyError(
                        f"{self.place} has no {path.name}: is it a complete checkpoint directory?"
                    )
            return paths
        try:
            found = cached_files(
                self.place, names, revision=self.revision, local_files_only=self.offline is not None
            )
        except OSError as error:
            raise self._unreachable(self.offline or str(error)) from None
        return [Path(path) for path in found]

    def optional_file(self, name: str) -> Path | None:
        """Path of a file that may be missing."""
        if self.is_directory:
            path = Path(self.place) / name
            return path if path.is_file() else None
        found = cached_file(
            self.place,
            name,
            revision=self.revision,
            local_files_only=self.offline is not None,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(str(found)) if found else None

    def weight_files(self) -> list[Path]:
        """Paths of the safetensors files that hold the weights.

        Raises
        ------
        SpiffyError
            If there are none, or not all that the index names.
        """
        whole = self.optional_file("model.safetensors")
        if whole is not None:
            return [whole]
        index = self.optional_file("model.safetensors.index.json")
        if index is not None:
            return self.files(_shards(index))
        if self.is_directory:
            raise SpiffyError(
                f"{self.place} has no model.safetensors and no index of shards; pickled weights "
                "are refused because loading them can run code: convert them to safetensors first"
            )
        raise self._unreachable(f"no weights in safetensors: {self.offline or 'not on the hub'}")

    def _unreachable(self, reason: str) -> SpiffyError:
        model = self.place.split("/")[-1]
        return SpiffyError(
            f"model {self.place!r} is neither in the cache folder {constants.HF_HUB_CACHE} nor "
            f"reachable ({' '.join(reason.split())[:200]}): run `hf download {self.place}` "
            f"where there is network, or pass the directory of a local copy, such as ./{model}, "
            "instead of the name"
        )


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
