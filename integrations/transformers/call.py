"""What transformers' `generate` calls in place of its own loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StopStringCriteria

from spiffy.integrations.transformers.model import family_of, known_model, settings_of, with_ends
from spiffy.integrations.transformers.refused import (
    refuse_arguments,
    refuse_inputs,
    refuse_options,
    refuse_positions,
    refuse_processors,
    untold,
)
from spiffy.integrations.transformers.rows import (
    DraftedOutput,
    Row,
    asked_criteria,
    output_of,
    prompts_of,
)
from spiffy.runtime.decode import make_task, run
from spiffy.runtime.draft import Selection
from spiffy.runtime.generate import Drafts, check_drafting, check_seed
from spiffy.runtime.models import DiffusionLM, wrap
from spiffy.schemas import Budget, DraftGraph, SpiffyError


def custom_generate(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    graph: DraftGraph | None = None,
    budget: Budget = "auto",
    selection: Selection = "model",
    decoding: Mapping[str, Any] | None = None,
    seed: int | None = None,
    family: str | None = None,
    mask_token_id: int | None = None,
    any_model: bool = False,
    token_type_ids: Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor | DraftedOutput:
    """Decode a batch for `transformers`' `generate`, which calls this with what it prepared.

    The rows share forwards, and each ends by itself. Prompts may be padded on the left.

    Parameters
    ----------
    graph, budget, selection, any_model
        As for `spiffy.runtime.generate`; without a graph: plain decoding.
    decoding
        Fields of `DecodingSettings` that are not the graph's, such as `{"policy": "threshold"}`.
        Length and temperature are `generate`'s own `max_new_tokens`, and `temperature` together
        with `do_sample`.
    seed
        With `do_sample`: decides the noise. Default: drawn by torch's generator, so that
        `torch.manual_seed` decides it.
    family, mask_token_id
        Of a module that neither `load_model` nor `wrap` has seen. Default: the graph's family, and
        what the module's config says.
    streamer
        Gets the tokens of every block once it is finished; for one row.
    stopping_criteria
        Asked after every finished block, token by token, one row at a time and without scores; the
        answer ends with the first token for which one says so.

    Raises
    ------
    SpiffyError
        If an option has no meaning here, or model, graph and inputs do not fit together.
    """
    kept = untold()
    streamer = streamer or kept.pop("streamer", None)
    refuse_arguments({**kept, "synced_gpus": synced_gpus or kept.get("synced_gpus")})
    refuse_inputs(model_kwargs, token_type_ids)
    refuse_options(generation_config, getattr(model, "generation_config", None))
    refuse_processors(logits_processor, generation_config)
    if not len(input_ids):
        raise SpiffyError("input_ids holds no row: give one prompt at least")
    if streamer is not None and len(input_ids) > 1:
        raise SpiffyError(f"streamer: it takes one row, the batch has {len(input_ids)}")
    drafts = Drafts(graph, budget, selection)
    check_seed(0 if seed is None else seed)
    prompts = prompts_of(input_ids, model_kwargs.get("attention_mask"))
    refuse_positions(model_kwargs.get("position_ids"), input_ids, prompts)

    if mask_token_id is None:
        mask_token_id = getattr(generation_config, "mask_token_id", None)
    lm = with_ends(known_model(model, graph, family, mask_token_id), model, generation_config)
    longest = generation_config.max_length - input_ids.shape[1]
    settings = settings_of(lm, graph, any_model, decoding, generation_config, longest)
    sampled = settings.temperature > 0
    drawn = int(torch.randint(1 << 62, ())) if seed is None and sampled else seed or 0
    rows = []
    for number, (given, prompt) in enumerate(zip(input_ids, prompts, strict=True)):
        task = make_task(lm, prompt, settings, None, drawn, number)
        task.keeps_path = False
        drafts.give(task)
        rows.append(Row(task, given, longest, asked_criteria(stopping_criteria, generation_config)))
    pad = None if generation_config.pad_token_id is None else int(generation_config.pad_token_id)
    if pad is None and len(rows) > 1:
        pad = min(lm.eos_token_ids, default=None)
        if pad is None and any(row.asked for row in rows):
            raise SpiffyError("rows may end apart, and nothing says what pads them: pad_token_id=")
    for _ in run(lm, [row.task for row in rows], len(rows)):
        if streamer is not None:
            for tokens in rows[0].fresh():
                streamer.put(torch.tensor(tokens))
    if streamer is not None:
        streamer.end()
    return output_of(rows, pad, generation_config.return_dict_in_generate)


def generate_with(place: str, model: Any, *args: Any, **options: Any) -> Any:
    """What a hub repository's `custom_generate/generate.py` calls.

    Parameters
    ----------
    place
        Hub id or folder that has the draft graph, unless the options give another.
    args, options
        Arguments of `generate`, as transformers or a caller hands them to such a file.

    Raises
    ------
    SpiffyError
        As `custom_generate`.
    """
    given = {key: value for key, value in options.items() if key not in _OF_DOWNLOADS}
    given |= signature(GenerationMixin.generate).bind(model, *args, **given).arguments
    given |= given.pop("kwargs", {})
    del given["self"]
    if given.get("graph") is None:
        download = {key: options[key] for key in _OF_GRAPHS if options.get(key) is not None}
        given["graph"] = _graph_of(place, **download)
    check_drafting(given["graph"], given.get("budget", "auto"), given.get("selection", "model"))
    tokenizer, strings = given.pop("tokenizer", None), _stop_strings(given)
    if tokenizer is not None and _unknown(model):
        family = family_of(model, given["graph"], given.get("family"))
        wrap(model, tokenizer, family, mask_token_id=given.get("mask_token_id"))
    if strings is not None:
        if tokenizer is None:
            raise SpiffyError("stop_strings are found in text: give tokenizer= too")
        ends = StopStringCriteria(tokenizer, strings)
        given["stopping_criteria"] = [*(given.get("stopping_criteria") or ()), ends]
    # Not model.generate, which transformers replaces by this file's function where it loads both,
    # nor that of the model's class, which may be another function by that name.
    return GenerationMixin.generate(model, custom_generate=custom_generate, **given)


# Arguments of loading: `load_custom_generate` takes them for its downloads.
_OF_DOWNLOADS = frozenset(
    (
        *("revision", "token", "cache_dir", "force_download", "proxies", "local_files_only"),
        *("repo_type", "subfolder", "custom_generate", "trust_remote_code"),
    )
)
# Of these, what the graph is downloaded with too.
_OF_GRAPHS = ("revision", "token", "cache_dir", "local_files_only")


@cache
def _graph_of(place: str, **download: Any) -> DraftGraph:
    """The graph of a place; one object, because what pays is learned for each."""
    return DraftGraph.from_pretrained(place, **download)


def _stop_strings(given: dict[str, Any]) -> Any:
    """Take the stop strings out of the arguments, or out of a copy of a config among them.

    transformers would look for the tokenizer, which it hands to no callable.
    """
    strings, config = given.pop("stop_strings", None), given.get("generation_config")
    if config is None or config.stop_strings is None:
        return strings
    given["generation_config"] = without = copy.deepcopy(config)
    without.stop_strings = None
    return config.stop_strings if strings is None else strings


def _unknown(module: Any) -> bool:
    known = DiffusionLM.of(module)
    return known is None or known.tokenizer is None
