"""From a checkpoint's weight files to a module whose parameters are all theirs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import __version__ as transformers_version

from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.quiet import loading
from spiffy.runtime.models.source import Source
from spiffy.runtime.models.stored import refuse_other_forms, stored_parameters
from spiffy.schemas import SpiffyError
from spiffy.schemas.notes import note


def load_module(
    name: str,
    source: Source,
    family: Family,
    config: Mapping[str, Any],
    parts: Architecture,
    dtype: torch.dtype,
    device_map: str | Mapping[str, Any] | None,
) -> Any:
    """The module of a checkpoint, with its weights.

    Parameters
    ----------
    name
        As the user named the checkpoint, for messages.
    parts
        What `checked_architecture` made of `config`.
    dtype, device_map
        Of the module's parameters, as for transformers.

    Raises
    ------
    SpiffyError
        If the files cannot be read, or hold other parameters than the module has.
    """
    architecture, module_config = parts
    files = source.weight_files()  # a download shows its progress: not below
    with loading(name):
        stored = stored_parameters(files)
    refuse_other_forms(name, stored)
    _check_merged(name, family, config, stored)
    split = family.split(config)
    stored = _in_parts(name, family, stored, split)
    _check_amount(name, architecture, module_config, stored)
    if module_config.tie_word_embeddings and _stores_another_head(name, family, stored):
        note(
            f"{name}: config.json says that the output head is the embedding (tied), and the "
            "weights hold another one: the one stored is computed, as transformers 5 does"
        )
        module_config.tie_word_embeddings = False
    # A device map may offload to disk, for which transformers has to know the files; but of those
    # it reads whole parameters.
    from_files = device_map is not None and not split
    # transformers would apply an adapter that lies there; it looks for one in this subfolder only.
    options: dict[str, Any] = {
        "device_map": device_map,
        "adapter_kwargs": {"subfolder": "no-adapter"},
    }
    if not from_files:
        options["state_dict"] = stored
    if dtype == torch.float64 and family.merged(config):
        options["experts_implementation"] = "eager"  # torch's grouped_mm knows no float64
    with loading(name):
        module, report = architecture.from_pretrained(
            files[0].parent if from_files else None,
            config=module_config,
            key_mapping=dict(family.key_mapping),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    # transformers only warns about these; a half-loaded model would decode nonsense.
    for problem in ("missing", "unexpected", "mismatched"):
        _refuse(name, family, problem, report.get(f"{problem}_keys") or ())
    if module.lm_head.weight.is_meta and not hasattr(module.lm_head, "_hf_hook"):
        raise SpiffyError(
            f"{name}: transformers {transformers_version} cannot leave a whole model on disk: "
            "upgrade it, or let device_map name a device for a part"
        )
    return module


def empty_module(name: str, parts: Architecture, dtype: torch.dtype) -> Any:
    """The module of a checkpoint without its weights; see `load_module`."""
    architecture, module_config = parts
    with loading(name), torch.device("meta"):
        return architecture(module_config).to(dtype)


def _refuse(name: str, family: Family, problem: str, parameters: Iterable[object]) -> None:
    """Raise if there are parameters with a problem; the first one is named."""
    keys = sorted(map(str, parameters))
    if keys:
        raise SpiffyError(
            f"{name}: {problem} parameter {keys[0]} ({len(keys)} in all): "
            f"not a {family.name} checkpoint?"
        )


class _Rows:
    """Some rows of a stored tensor, read when they are taken (`[...]`); looks like a slice."""

    def __init__(self, stored: Any, first: int, count: int) -> None:
        self.stored = stored
        self.first = first
        self.count = count

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows: torch.Tensor = self.stored[self.first : self.first + self.count]
        return rows[index]

    def get_shape(self) -> list[int]:
        return [self.count, *self.stored.get_shape()[1:]]

    def get_dtype(self) -> str:
        return str(self.stored.get_dtype())


def _in_parts(
    name: str,
    family: Family,
    stored: Mapping[str, Any],
    split: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """Stored tensors, those that hold several parameters in parts, of which none is read yet."""
    parts = {key: value for key, value in stored.items() if key not in split}
    for key in stored.keys() & split.keys():
        if stored[key].get_shape()[0] != sum(split[key].values()):
            _refuse(name, family, "mismatched", [key])
        first = 0
        for part, rows in split[key].items():
            parts[part] = _Rows(stored[key], first, rows)
            first += rows
    return parts


def _check_amount(name: str, architecture: Any, config: Any, stored: Mapping[str, Any]) -> None:
    """Refuse a config of another scale than the weights, before memory is taken for it."""
    with loading(name), torch.device("meta"):
        module = architecture(config)
    described = sum(parameter.numel() for parameter in module.parameters())
    held = sum(math.prod(part.get_shape()) for part in stored.values())
    if described > 4 * held:
        raise SpiffyError(
            f"{name}: config.json describes {described} parameters, the weights hold {held}: one "
            "of them belongs to another model"
        )


def _stores_another_head(name: str, family: Family, stored: Mapping[str, Any]) -> bool:
    """Whether an output head is stored that is not the embedding."""
    found = {_module_name(key, family.key_mapping): key for key in stored}
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return False
    with loading(name):
        return not torch.equal(stored[head][...], stored[embedding][...])


def _module_name(key: str, mapping: Mapping[str, str]) -> str:
    """What a stored parameter is called in the module."""
    for pattern, words in mapping.items():
        key, count = re.subn(pattern, words, key)
        if count:
            break
    return key


def _check_merged(
    name: str, family: Family, config: Mapping[str, Any], stored: Mapping[str, Any]
) -> None:
    """Check the names and shapes of parameters that transformers merges, such as experts.

    It stacks what it finds in the order of their numbers: one missing and one too many would load
    as another model.
    """
    expected = family.merged(config)
    found = {key for key in stored if ".experts." in key}
    wrong = {key for key in found & expected.keys() if stored[key].get_shape() != expected[key]}
    _refuse(name, family, "missing", expected.keys() - found)
    _refuse(name, family, "unexpected", found - expected.keys())
    _refuse(name, family, "mismatched", wrong)
