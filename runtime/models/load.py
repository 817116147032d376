"""From an alias, a hub id or a directory to a model; safetensors only, no remote code."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version
from transformers.utils import logging as transformers_logging

from spiffy.runtime.models.a2d import A2D_BD3LM, A2D_MDLM
from spiffy.runtime.models.adapter import merge, read_adapter
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.block_size import check_block_sizes
from spiffy.runtime.models.diffcoder import STABLE_DIFFCODER
from spiffy.runtime.models.dream import DREAM
from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fast_dllm import FAST_DLLM
from spiffy.runtime.models.fields import check_entries
from spiffy.runtime.models.identity import fingerprint
from spiffy.runtime.models.illada import ILLADA
from spiffy.runtime.models.llada import LLADA
from spiffy.runtime.models.llada2 import LLADA2
from spiffy.runtime.models.quantise import check_quantise, quantise
from spiffy.runtime.models.sdar import SDAR
from spiffy.runtime.models.source import Source, read_json
from spiffy.runtime.models.stored import refuse_other_forms, stored_parameters
from spiffy.runtime.models.tokens import (
    check_tokenizer,
    end_tokens,
    generation_config,
    read_tokenizer,
    with_mask_token,
)
from spiffy.schemas import SpiffyError
from spiffy.schemas.notes import note

FAMILIES: tuple[Family, ...] = (
    LLADA,
    DREAM,
    SDAR,
    LLADA2,
    ILLADA,
    STABLE_DIFFCODER,
    A2D_MDLM,
    A2D_BD3LM,
    FAST_DLLM,
)

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# transformers changes its own classes, torch's default dtype and its log level while it loads, and
# puts them back: two loads at once would put back what the other had changed.
_ONE_LOAD = threading.RLock()


def load_model(
    name: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    family: str | None = None,
    adapter: str | None = None,
    quantize: str | None = None,
) -> DiffusionLM:
    """Load a diffusion language model.

    Host memory peaks at the size of the weights in `dtype`, plus the largest tensor or, of a
    mixture, one layer's experts.

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
    family
        Name of the family, for checkpoints that neither config nor name tell apart (A2D).
    adapter
        Folder or hub id of a LoRA adapter (peft's files), which is merged into the weights: merged,
        it costs nothing while decoding. Its layers may have the module's names or the official
        code's. Load the model with peft and `wrap` it to keep the adapter apart.
    quantize
        "int8": linear layers in 8 bits, by torchao, after any adapter; the output head stays.

    Raises
    ------
    SpiffyError
        If the model cannot be found, is of no known family, or its parameters do not match; if the
        adapter does not fit it or changes nothing; or if a library that is asked for is missing.
    """
    if device_map is not None and find_spec("accelerate") is None:
        raise SpiffyError("device_map needs accelerate: pip install 'spiffy-dllm[large]'")
    source = Source.of(name, revision)
    config_file = source.optional_file("config.json")
    if config_file is None:
        source.refuse_adapter()
        config_file = source.file("config.json")
    config = read_json(config_file)
    facts = _family(name, source, config, family)
    device = _device(device)
    if quantize is not None:
        check_quantise(name, quantize, facts, config)
    lora = None if adapter is None else read_adapter(adapter)
    with _quiet_transformers():
        tokenizer = read_tokenizer(source)
    config = with_mask_token(config, tokenizer, facts.mask_token_id)
    architecture = checked_architecture(name, facts, config)
    check_tokenizer(name, tokenizer, architecture[1].vocab_size)
    holders = (config, generation_config(source))
    eos_token_ids = end_tokens(source.place, holders, tokenizer, architecture[1].vocab_size)
    module = _module(name, source, facts, config, architecture, _dtype(dtype, device), device_map)
    source.remember()
    if (lora or quantize) and any(value.is_meta for value in module.parameters()):
        raise SpiffyError(
            f"{name}: device_map leaves layers off the devices: they can neither take an adapter "
            "nor be quantised"
        )
    if lora is not None:
        with _loading(name, "the adapter cannot be merged"):
            module = merge(lora, module, name, facts, config)
    if quantize is not None:
        with _loading(name, "weights cannot be quantised"):
            quantise(module, device if device_map is None else None)
    if device_map is None:
        module = module.to(device)
    mask = config["mask_token_id"]
    _tell_ends(module, tokenizer, eos_token_ids)
    return DiffusionLM(
        module,
        facts,
        config,
        name=name,
        revision=_commit(config_file),
        fingerprint=fingerprint(facts, config, architecture[1], mask, eos_token_ids, tokenizer),
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
    )


def _tell_ends(module: Any, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
    """Let the module's own `generate` know which tokens end and pad, not its class's defaults."""
    settings = getattr(module, "generation_config", None)
    if settings is not None:
        settings.eos_token_id = sorted(eos_token_ids) or None
        settings.pad_token_id = getattr(tokenizer, "pad_token_id", None)


def _family(name: str, source: Source, config: Mapping[str, Any], wanted: str | None) -> Family:
    """The family of the config's model type, then its architecture, then the name asked for.

    Where these leave several, the checkpoint's own name has to tell; never a guess.
    """
    kind, listed = config.get("model_type"), config.get("architectures")
    classes = listed if isinstance(listed, list) else []
    if kind in ("lladamoe", "llada_moe") or (kind == "llada" and config.get("num_experts")):
        raise SpiffyError(
            f"{name}: LLaDA-MoE is not supported: transformers has no module that computes its "
            "mixture of experts; LLaDA-8B, LLaDA-1.5 and LLaDA2 are"
        )
    found = [
        family
        for family in FAMILIES
        if kind in family.model_types
        and (not family.architectures or any(a in classes for a in family.architectures))
    ]
    if not found:
        known = dict.fromkeys(
            f"{kind} of {' or '.join(family.architectures)}" if family.architectures else kind
            for family in FAMILIES
            for kind in family.model_types
        )
        raise SpiffyError(
            f"{name}: model_type {kind!r} is not supported as {listed} (known: {', '.join(known)})"
        )
    if wanted is not None:
        asked = [family for family in found if family.name == wanted]
        if not asked:
            ours = ", ".join(family.name for family in found)
            raise SpiffyError(f"{name}: family {wanted!r} does not fit its config.json: {ours}")
        return asked[0]
    told = [family for family in found if family.named in source.own_name.lower()]
    if len(told) != 1:
        words = " or ".join(family.named for family in found)
        ours = " or ".join(family.name for family in found)
        raise SpiffyError(
            f"{name}: config.json does not tell which kind of {kind} it is: give a folder whose "
            f"name says {words}, or family= in Python ({ours})"
        )
    return told[0]


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


def checked_architecture(name: str, family: Family, config: Mapping[str, Any]) -> Architecture:
    """Module class and config of a checkpoint, whose `config.json` is checked as a whole.

    Raises
    ------
    SpiffyError
        If an entry selects what is not computed, is missing, or is absurd.
    """
    check_entries(name, family.name, config, family.entries)
    try:
        _check_sizes(config)
        architecture, module_config = family.architecture(config)
        check_ids(config, module_config.vocab_size)
        _check_turning(module_config)
        for names in (family.merged, family.split):
            names(config)  # what stored parameters are called follows from it too
    except KeyError as error:
        raise SpiffyError(f"{name}: config.json lacks {error.args[0]!r}") from None
    except SpiffyError:
        raise
    except Exception as error:  # transformers' checks of absurd values raise many kinds
        reason = " ".join(str(error).split())
        raise SpiffyError(f"{name}: config.json: {reason}") from None
    return architecture, module_config


def _module(
    name: str,
    source: Source,
    family: Family,
    config: Mapping[str, Any],
    parts: Architecture,
    dtype: torch.dtype,
    device_map: str | Mapping[str, Any] | None,
) -> Any:
    architecture, module_config = parts
    files = source.weight_files()  # a download shows its progress: not below
    with _loading(name):
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
    options: dict[str, Any] = {"device_map": device_map}
    if not from_files:
        options["state_dict"] = stored
    if dtype == torch.float64 and family.merged(config):
        options["experts_implementation"] = "eager"  # torch's grouped_mm knows no float64
    with _loading(name):
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


# Entries of the families' configs that decide how much is built, and the most they may be.
_SIZES = {
    **dict.fromkeys(("n_layers", "num_hidden_layers"), 1 << 10),
    **dict.fromkeys(
        ("n_heads", "n_kv_heads", "num_attention_heads", "num_key_value_heads"), 1 << 12
    ),
    **dict.fromkeys(("num_experts", "num_experts_per_tok", "num_shared_experts"), 1 << 12),
    **dict.fromkeys(("n_group", "topk_group"), 1 << 12),
    **dict.fromkeys(("d_model", "hidden_size", "head_dim", "moe_intermediate_size"), 1 << 20),
    **dict.fromkeys(("mlp_hidden_size", "intermediate_size"), 1 << 20),
    **dict.fromkeys(("vocab_size", "embedding_size"), 1 << 24),
    **dict.fromkeys(("max_sequence_length", "max_position_embeddings"), 1 << 30),
}
# Others that transformers 5.0 takes as they are.
_POSITIVE = ("rms_norm_eps", "routed_scaling_factor")
_FLAGS = (
    *("attention_bias", "multi_query_attention", "norm_topk_prob", "tie_word_embeddings"),
    "weight_tying",
)


def _check_sizes(config: Mapping[str, Any]) -> None:
    for field, most in _SIZES.items():
        value = config.get(field)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{field} {value!r} must be a whole number from 1 to {most}")
    for field in _POSITIVE:
        value = config.get(field, 1)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{field} {value!r} must be a positive number")
    for field in _FLAGS:
        value = config.get(field)
        if value is not None and type(value) is not bool:
            raise ValueError(f"{field} {value!r} must be true or false")


def _check_turning(config: Any) -> None:
    """Refuse heads of which RoPE cannot turn the part that is stated: pairs, at most all."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    part = config.rope_parameters.get("partial_rotary_factor") or 1
    turning = int(head * part)
    if part > 1 or turning < 2 or turning % 2:
        raise ValueError(
            f"RoPE would turn {turning} of the {head} dimensions of a head (partial_rotary_factor "
            f"{part}): it turns pairs, and at most all"
        )


def _check_amount(name: str, architecture: Any, config: Any, stored: Mapping[str, Any]) -> None:
    """Refuse a config of another scale than the weights, before memory is taken for it."""
    with _loading(name), torch.device("meta"):
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
    with _loading(name):
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


@contextmanager
def _loading(name: str, failure: str = "weights cannot be loaded") -> Iterator[None]:
    """Read weights quietly, one tensor at a time, and turn what goes wrong into one line."""
    with _quiet_transformers(), _one_tensor_at_a_time():
        try:
            yield
        except SpiffyError:
            raise
        except Exception as error:  # what safetensors and transformers raise has no end
            reason = " ".join(str(error).split())
            raise SpiffyError(f"{name}: {failure}: {reason}") from None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No load reports, no bars: we raise instead, in one line. One at a time (`_ONE_LOAD`)."""
    with _ONE_LOAD:
        yield from _without_reports()


def _without_reports() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """Without transformers' loader threads.

    They run ahead of the merging of experts and would hold most of a mixture twice.
    """
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


def check_ids(config: Mapping[str, Any], vocab_size: int) -> None:
    """Check the token ids and block sizes that a config states.

    Raises
    ------
    KeyError
        If there is no mask token.
    ValueError
        If a value is none.
    """
    check_block_sizes(config)
    mask = config["mask_token_id"]
    if type(mask) is not int or not 0 <= mask < vocab_size:
        raise ValueError(f"mask_token_id {mask!r} is not a token of {vocab_size}")
    eos = config.get("eos_token_id")
    if not all(isinstance(k, int) for k in (eos if isinstance(eos, list) else [eos or 0])):
        raise ValueError(f"eos_token_id {eos!r} is neither a token id nor a list of them")


def _commit(config_file: Path) -> str | None:
    """The hub keeps files under snapshots/<commit>/."""
    folder = config_file.parent
    return folder.name if folder.parent.name == "snapshots" else None
