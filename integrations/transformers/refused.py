"""Arguments, inputs and options of `generate` that have no meaning for a denoising decode."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from transformers import (
    GenerationMixin,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spiffy.schemas import SpiffyError

# What `generate` keeps to itself where it is given a callable (transformers 5.0 to 5.24).
_UNTOLD = (
    "streamer",
    "assistant_model",
    "prefix_allowed_tokens_fn",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "synced_gpus",
)


def untold() -> dict[str, Any]:
    """Arguments of the `generate` that is calling which it does not hand on.

    It has put the prompt into a streamer by then, whose reader waits for the rest; and it drops the
    others without a word. They are in its frame.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return {} if frame is None else {name: frame.f_locals.get(name) for name in _UNTOLD}


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse whatever of these arguments of `generate` is given."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise SpiffyError(f"generate: {name} has no meaning for a denoising decode: drop it")


# Of `forward`, as transformers fills them in for any model.
_PREPARED = (
    *("attention_mask", "position_ids", "logits_to_keep", "use_cache"),
    *("past_key_values", "cache"),
)


def refuse_inputs(model_kwargs: Mapping[str, Any], token_type_ids: Tensor | None) -> None:
    """Refuse inputs of the forward that a decode in blocks does not pass on."""
    for name, value in model_kwargs.items():
        if value is not None and value is not False and name not in _PREPARED:
            raise SpiffyError(f"generate: {name} has no meaning for a denoising decode: drop it")
    for name in ("past_key_values", "cache"):
        held = model_kwargs.get(name)
        if held is not None and held.get_seq_length():
            raise SpiffyError(f"generate: {name} holds positions: every decode starts with none")
    if token_type_ids is not None and token_type_ids.any():
        raise SpiffyError("generate: token_type_ids other than 0 have no meaning here: drop them")


def refuse_positions(
    position_ids: Tensor | None, input_ids: Tensor, prompts: Sequence[Tensor]
) -> None:
    """Refuse positions other than those that transformers fills in: 0, 1, ... after padding."""
    if position_ids is None:
        return
    rows = position_ids if position_ids.ndim > 1 else position_ids[None]
    if rows.shape not in (input_ids.shape, (1, input_ids.shape[1])):
        # A mask of ones is gone by now; they have its shape.
        raise SpiffyError(
            f"attention_mask or position_ids of shape {[*position_ids.shape]} does not fit "
            f"input_ids of shape {[*input_ids.shape]}"
        )
    if any(
        positions[-len(ids) :].tolist() != list(range(len(ids)))
        for ids, positions in zip(prompts, rows.expand(len(prompts), -1), strict=True)
    ):
        raise SpiffyError("generate: position_ids must count from 0 in every row: drop them")


# Options that are followed, or that only describe the tokens.
_FOLLOWED = frozenset(
    (
        *("max_length", "max_new_tokens", "max_time", "stop_strings"),
        *("do_sample", "num_return_sequences", "return_dict_in_generate"),
        *("eos_token_id", "pad_token_id", "bos_token_id", "mask_token_id", "transformers_version"),
    )
)
# Options that are followed where tokens are drawn.
_DRAWING = frozenset(("temperature", "top_k", "top_p"))
# Options that say nothing where nothing is drawn.
_OF_SAMPLING = _DRAWING | {"min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# Options that change how a forward is computed, not what it says.
_OF_SPEED = frozenset(
    ("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile")
)


def refuse_options(config: Any, of_module: Any) -> None:
    """Refuse options of a generation config that would be ignored.

    One is asked for if it is not what transformers fills in. What came with the checkpoint counts
    too, unless it could not change a token.
    """
    usual: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
    for name, value in vars(config).items():
        if name.startswith("_") or value is None or value is False or value == usual.get(name):
            continue
        if name == "min_length" and config.min_new_tokens is not None:
            continue  # transformers made it of that, which is refused by its own name
        if name in _FOLLOWED or (name in _DRAWING and config.do_sample):
            continue  # before it is compared: tokens may be tensors
        came_along = of_module is not None and value == getattr(of_module, name, None)
        harmless = name in _OF_SPEED or (name in _OF_SAMPLING and not config.do_sample)
        if came_along and (harmless or name not in _known_options()):
            continue
        if name == "top_k" and value == 0:
            continue
        if name in _DRAWING:
            raise SpiffyError(f"generate: {name}={value!r} needs do_sample=True")
        off = f"do_sample=False, or {name}=None"
        if name not in _OF_SAMPLING:
            off = f"{name}={usual.get(name)!r}"
        whence = " (of the module's generation_config)" if came_along else ""
        raise SpiffyError(
            f"generate: {name}={value!r}{whence} has no meaning for a denoising decode: "
            + (f"give {off}" if came_along else "drop it")
        )
    if config.use_cache is False and getattr(of_module, "use_cache", None) is not False:
        raise SpiffyError("generate: use_cache=False: give decoding={'cache': 'none'} instead")


@cache
def _known_options() -> frozenset[str]:
    """Options that transformers knows; checkpoints come with others, for their own code."""
    from transformers import GenerationConfig

    return frozenset(vars(GenerationConfig()))


_WARPERS = (
    (TemperatureLogitsWarper, "temperature"),
    (TopKLogitsWarper, "top_k"),
    (TopPLogitsWarper, "top_p"),
)


def refuse_processors(processors: Sequence[Any], config: Any) -> None:
    """Refuse what changes logits, but for what stands for temperature, `top_k` and `top_p`."""
    for processor in processors:
        if config.do_sample and any(
            isinstance(processor, kind) and getattr(processor, name) == getattr(config, name)
            for kind, name in _WARPERS
        ):
            continue
        raise SpiffyError(
            f"generate: a {type(processor).__name__} cannot act here: tokens are committed by the "
            "unmasking policy, not one after the other; drop it"
        )
