"""From an alias, a hub id or a directory to a model; safetensors only, no remote code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from spiffy.runtime.models.base import DiffusionLM, Family
from spiffy.runtime.models.dream import DREAM
from spiffy.runtime.models.llada import LLADA
from spiffy.runtime.models.sdar import SDAR
from spiffy.schemas import SpiffyError

FAMILIES: tuple[Family, ...] = (LLADA, DREAM, SDAR)

_SHIPPED = Path(__file__).parent.parent / "checkpoints"

# Short names -> directories that ship with the package, or hub ids.
ALIASES: Mapping[str, str] = {
    "tiny-llada": str(_SHIPPED / "tiny-llada"),
    "tiny-sdar": str(_SHIPPED / "tiny-sdar"),
    "llada-8b": "GSAI-ML/LLaDA-8B-Instruct",
    "llada-8b-base": "GSAI-ML/LLaDA-8B-Base",
    "llada-1.5": "GSAI-ML/LLaDA-1.5",
    "dream-7b": "Dream-org/Dream-v0-Instruct-7B",
    "dream-7b-base": "Dream-org/Dream-v0-Base-7B",
    "dream-coder-7b": "Dream-org/Dream-Coder-v0-Instruct-7B",
    "diffucoder-7b": "apple/DiffuCoder-7B-cpGRPO",
    "sdar-1.7b": "JetLM/SDAR-1.7B-Chat",
    "sdar-4b": "JetLM/SDAR-4B-Chat",
    "sdar-8b": "JetLM/SDAR-8B-Chat",
    "sdar-1.7b-b32": "JetLM/SDAR-1.7B-Chat-b32",
    "sdar-8b-b32": "JetLM/SDAR-8B-Chat-b32",
    "sdar-8b-b64": "JetLM/SDAR-8B-Chat-b64",
    "sdar-30b-a3b": "JetLM/SDAR-30B-A3B-Chat",
    "trado-4b": "Gen-Verse/TraDo-4B-Instruct",
    "trado-8b": "Gen-Verse/TraDo-8B-Instruct",
}

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Config entries that say nothing about what the model computes.
_COSMETIC = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}


def load_model(
    name: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> DiffusionLM:
    """Load a diffusion language model.

    Parameters
    ----------
    name
        Alias (see `ALIASES`), hub id, or directory in the family's official layout.
    device
        "auto" takes the first GPU, else the CPU. Ignored if `device_map` is given.
    dtype
        "auto" is bfloat16 on a GPU and float32 elsewhere.
    revision
        Hub commit, tag or branch.
    device_map
        Passed to transformers, for models larger than one device (needs accelerate).

    Raises
    ------
    SpiffyError
        If the model cannot be found, is of no known family, or its parameters do not match.
    """
    source = ALIASES.get(name, name)
    config_file = _find(name, source, "config.json", revision)
    config = _read_json(config_file)
    family = _family(name, config)
    device = _device(device)
    module = _module(name, source, family, config, revision, _dtype(dtype, device), device_map)
    if device_map is None:
        module = module.to(device)
    tokenizer, tokenizer_digest = _tokenizer(source, revision)
    return DiffusionLM(
        module,
        family,
        config,
        name=name,
        revision=_commit(config_file),
        fingerprint=_fingerprint(config, tokenizer_digest),
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(source, revision, config, tokenizer),
    )


def _find(name: str, source: str, filename: str, revision: str | None) -> Path:
    if source and Path(source).is_dir():
        path = Path(source) / filename
        if not path.is_file():
            raise SpiffyError(f"{source} has no {filename}: is it a checkpoint directory?")
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        known = ", ".join(ALIASES)
        raise SpiffyError(
            f"unknown model {name!r}: no such directory; give one, a hub id, or one of {known}"
        )
    try:
        return Path(str(cached_file(source, filename, revision=revision)))
    except OSError:
        raise SpiffyError(
            f"model {source!r} is neither in the cache folder {HF_HUB_CACHE} nor reachable: "
            "download it on a machine with network, or pass the directory of a local copy"
        ) from None


def _optional_file(source: str, filename: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / filename
        return path if path.is_file() else None
    found = cached_file(
        source,
        filename,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(str(found)) if found else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpiffyError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise SpiffyError(f"{path}: expected a JSON object")
    return content


def _family(name: str, config: Mapping[str, Any]) -> Family:
    for family in FAMILIES:
        if config.get("model_type") in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise SpiffyError(
        f"{name}: model_type {config.get('model_type')!r} is not supported (known: {known})"
    )


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise SpiffyError(f"unknown device {device!r}: try cpu or cuda") from None
    try:
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError):
        raise SpiffyError(f"device {device!r} is not available here: try cpu or auto") from None
    return found


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise SpiffyError(f"unknown dtype {dtype!r}: choose auto or one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _module(
    name: str,
    source: str,
    family: Family,
    config: Mapping[str, Any],
    revision: str | None,
    dtype: torch.dtype,
    device_map: str | Mapping[str, Any] | None,
) -> Any:
    try:
        architecture, module_config = family.architecture(config)
        _check_token_ids(config, module_config.vocab_size)
    except KeyError as error:
        raise SpiffyError(f"{name}: config.json lacks {error.args[0]!r}") from None
    except SpiffyError:
        raise
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SpiffyError(f"{name}: config.json: {reason}") from None
    _refuse_pickle(source)
    with _quiet_transformers():
        try:
            module, report = architecture.from_pretrained(
                source,
                config=module_config,
                key_mapping=dict(family.key_mapping),
                dtype=dtype,
                revision=revision or "main",
                device_map=device_map,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise SpiffyError(f"{name}: weights cannot be loaded: {reason}") from None
    # transformers only warns about these; a half-loaded model would decode nonsense.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            first = sorted(str(key) for key in report[problem])[0]
            kind = problem.split("_")[0]
            raise SpiffyError(
                f"{name}: {kind} parameter {first} "
                f"({len(report[problem])} in all): not a {family.name} checkpoint?"
            )
    return module


class _quiet_transformers:  # noqa: N801 (a context manager)
    """transformers prints load reports and bars; we raise instead, in one line."""

    def __enter__(self) -> None:
        self.level = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.level)
        if self.bars:
            transformers_logging.enable_progress_bar()


def _check_token_ids(config: Mapping[str, Any], vocab_size: int) -> None:
    mask = config["mask_token_id"]
    if not isinstance(mask, int) or not 0 <= mask < vocab_size:
        raise ValueError(f"mask_token_id {mask!r} is not a token of {vocab_size}")
    eos = config.get("eos_token_id")
    if not all(isinstance(k, int) for k in (eos if isinstance(eos, list) else [eos or 0])):
        raise ValueError(f"eos_token_id {eos!r} is neither a token id nor a list of them")
    block_size = config.get("block_size", 1)
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size {block_size!r} must be a positive integer")
    if config.get("rope_scaling") is not None:
        raise ValueError("rope_scaling is not supported")


def _refuse_pickle(source: str) -> None:
    folder = Path(source)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise SpiffyError(
            f"{source} has no .safetensors file; pickled weights are refused because loading them "
            "can run code: convert them to safetensors first"
        )


def _tokenizer(source: str, revision: str | None) -> tuple[Any, str]:
    path = _optional_file(source, "tokenizer.json", revision)
    if path is None:
        return _qwen_tokenizer(source, revision)
    settings_path = _optional_file(source, "tokenizer_config.json", revision)
    settings = _read_json(settings_path) if settings_path else {}
    special = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token") and value is not None and not key.startswith("add_")
    }
    template = settings.get("chat_template")
    if template is None:
        template_path = _optional_file(source, "chat_template.jinja", revision)
        template = template_path.read_text(encoding="utf-8") if template_path else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=template, **special)
    return tokenizer, hashlib.sha256(path.read_bytes()).hexdigest()


def _qwen_tokenizer(source: str, revision: str | None) -> tuple[Any, str]:
    """Dream's checkpoints ship Qwen2's two files, and a tokenizer class of their own as code."""
    paths = [_optional_file(source, name, revision) for name in ("vocab.json", "merges.txt")]
    if None in paths:
        return None, ""
    with _quiet_transformers():
        tokenizer = Qwen2Tokenizer.from_pretrained(source, revision=revision or "main")
    content = b"".join(path.read_bytes() for path in paths if path is not None)
    return tokenizer, hashlib.sha256(content).hexdigest()


def _eos_token_ids(
    source: str, revision: str | None, config: Mapping[str, Any], tokenizer: Any
) -> frozenset[int]:
    """Every token that ends an answer: the configs', the tokenizer's, the chat turn's."""
    path = _optional_file(source, "generation_config.json", revision)
    ids: set[int] = set()
    for holder in (config, _read_json(path) if path else {}):
        value = holder.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    if tokenizer is not None:
        ids.update(
            tokenizer.convert_tokens_to_ids(token)
            for token in (tokenizer.eos_token, "<|eot_id|>", "<|im_end|>")
            if token in tokenizer.get_vocab()
        )
    return frozenset(ids)


def _commit(config_file: Path) -> str | None:
    """The hub keeps files under snapshots/<commit>/."""
    folder = config_file.parent
    return folder.name if folder.parent.name == "snapshots" else None


def _fingerprint(config: Mapping[str, Any], tokenizer_digest: str) -> str:
    """Digest of what the model computes from (config without cosmetics) and its tokenizer."""
    facts = {key: value for key, value in config.items() if key not in _COSMETIC}
    text = json.dumps([facts, tokenizer_digest], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
