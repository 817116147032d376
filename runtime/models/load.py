"""From an alias, a hub id or a directory to a model; safetensors only, no remote code."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from spiffy.runtime.models.adapter import merge, read_adapter
from spiffy.runtime.models.architecture import checked_architecture
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.compiled import compile_transformer
from spiffy.runtime.models.families import family_of
from spiffy.runtime.models.identity import fingerprint
from spiffy.runtime.models.prepack import check_prepack, prepack_if_faster
from spiffy.runtime.models.prepack import prepack as prepack_layers
from spiffy.runtime.models.quantize import check_quantize, quantize_layers
from spiffy.runtime.models.quiet import loading, quiet_transformers
from spiffy.runtime.models.source import Source, read_json
from spiffy.runtime.models.tokens import (
    check_tokenizer,
    end_tokens,
    generation_config,
    read_tokenizer,
    with_mask_token,
)
from spiffy.runtime.models.weights import empty_module, load_module
from spiffy.schemas import SpiffyError
from spiffy.schemas.hub import cached_commit

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
    compile: bool = False,
    prepack: bool | Literal["auto"] = False,
) -> DiffusionLM:
    """Load a diffusion language model.

    Host memory peaks at the size of the weights in `dtype`, plus the largest tensor or, of a
    mixture, one layer's experts; prepacked, the output head is held twice.

    Parameters
    ----------
    name
        Alias (see `ALIASES`), hub id, or directory in the family's official layout.
    device
        "auto" takes the first GPU, else the CPU. Ignored if `device_map` is given. "meta" reads no
        weights: for an engine that runs the forwards itself (docs/engine.md).
    dtype
        "auto" is bfloat16 on a GPU and float32 elsewhere.
    revision
        Hub commit, tag or branch; of a hub id.
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
    compile
        Let torch compile the transformer, which takes up to a minute and a C++ compiler (on a GPU
        Triton), and less the next time. Forwards of any size take the same code. On a GPU also
        CUDA graphs and FlexAttention are tried, and used if they are right and faster.
    prepack
        Keep the weights of linear layers as oneDNN computes with them on a CPU, which makes
        forwards of large models faster and takes no more memory, but for the output head, which is
        held both ways. The module is then for inference alone: it can be neither trained, saved,
        copied nor pickled. "auto": if it is large, and a try on this machine shows that it is
        faster.

    Raises
    ------
    SpiffyError
        If the model cannot be found, is of no known family, or its parameters do not match; if the
        adapter does not fit it or changes nothing; if a library that is asked for is missing, or
        torch cannot compile it.
    """
    if not isinstance(compile, bool):  # such as "no", which would be taken for True
        raise SpiffyError(f"compile {compile!r}: give True or False")
    if not (isinstance(prepack, bool) or prepack == "auto"):
        raise SpiffyError(f"prepack {prepack!r}: give True, False or 'auto'")
    if device_map is not None and find_spec("accelerate") is None:
        raise SpiffyError("device_map needs accelerate: pip install 'spiffy-dllm[large]'")
    source = Source.of(name, revision)
    config_file = source.optional_file("config.json")
    if config_file is None:
        source.refuse_adapter()
        config_file = source.file("config.json")
    config = read_json(config_file)
    facts = family_of(name, source, config, family)
    device = _device(device)
    dtype = _dtype(dtype, device)
    if quantize is not None:
        check_quantize(name, quantize, facts, config, dtype)
    others = quantize is not None or device_map is not None
    if prepack is True:
        check_prepack(name, device, dtype, others)
    lora = None if adapter is None else read_adapter(adapter)
    with quiet_transformers():
        tokenizer = read_tokenizer(source)
    config = with_mask_token(config, tokenizer, facts.published_mask(config))
    architecture = checked_architecture(name, facts, config)
    check_tokenizer(name, tokenizer, architecture[1].vocab_size)
    holders = (config, generation_config(source))
    eos_token_ids = end_tokens(source.place, holders, tokenizer, architecture[1].vocab_size)
    if device.type == "meta" and device_map is None:
        if others or adapter is not None or compile or prepack:
            raise SpiffyError(
                f"{name}: device meta means no weights: they can be neither adapted, quantized, "
                "compiled nor prepacked"
            )
        module = empty_module(name, architecture, dtype)
    else:
        module = load_module(name, source, facts, config, architecture, dtype, device_map)
    source.remember()
    if (lora or quantize) and any(value.is_meta for value in module.parameters()):
        raise SpiffyError(
            f"{name}: device_map leaves layers off the devices: they can neither take an adapter "
            "nor be quantized"
        )
    if lora is not None:
        with loading(name, "the adapter cannot be merged"):
            module = merge(lora, module, name, facts, config)
    if quantize is not None:
        with loading(name, "weights cannot be quantized"):
            quantize_layers(module, device if device_map is None else None)
    if device_map is None:
        module = module.to(device)
    mask = config["mask_token_id"]
    _tell_generate(module, tokenizer, eos_token_ids)
    model = DiffusionLM(
        module,
        facts,
        config,
        name=name,
        revision=cached_commit(config_file.parent),
        fingerprint=fingerprint(facts, config, architecture[1], mask, eos_token_ids, tokenizer),
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
    )
    if prepack is True:
        prepack_layers(model)
    elif prepack == "auto" and not others:
        prepack_if_faster(model)
    if compile:
        compile_transformer(model)
    return model


def _tell_generate(module: Any, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
    """Let the module's own `generate` know which tokens end and pad, and no other defaults.

    transformers takes the checkpoint's, such as sampling, only where it reads the files itself.
    """
    if hasattr(module, "generation_config"):
        ends, pad = sorted(eos_token_ids) or None, getattr(tokenizer, "pad_token_id", None)
        module.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)


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
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise SpiffyError(f"unknown dtype {dtype!r}: choose auto or one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
