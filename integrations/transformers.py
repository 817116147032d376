"""`module.generate(**inputs, custom_generate=spiffy.integrations.custom_generate, graph=graph)`.

transformers prepares inputs and generation config as for any decoding, then calls
`custom_generate` in place of its own loop. What a denoising decode cannot do is refused, never
ignored.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
)
from transformers.utils import ModelOutput

from spiffy.runtime.budget.auto import auto_budget
from spiffy.runtime.decode import Task, decoded, make_task, run
from spiffy.runtime.draft import Drafter, Selection, graph_drafter
from spiffy.runtime.generate import Budget, check_drafting, check_seed, decoding_settings
from spiffy.runtime.models import DiffusionLM, wrap
from spiffy.runtime.models.load import FAMILIES
from spiffy.runtime.models.wrapping import check_attention
from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError


@dataclass
class DraftedOutput(ModelOutput):  # type: ignore[misc]
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes
    ----------
    sequences
        int64 [batch, length]: prompts as they were given, answers, padding.
    tokens_per_forward
        float32 [batch]: tokens of each answer over its forwards.
    forwards, positions_computed, steps
        int64 [batch]: model forwards, positions that they ran, denoising steps.
    """

    sequences: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    forwards: Tensor | None = None
    positions_computed: Tensor | None = None
    steps: Tensor | None = None


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
    untold = _untold()
    streamer = streamer or untold.pop("streamer", None)
    _refuse_arguments({**untold, "synced_gpus": synced_gpus or untold.get("synced_gpus")})
    _refuse_inputs(model_kwargs, token_type_ids)
    _refuse_options(generation_config, getattr(model, "generation_config", None))
    _refuse_processors(logits_processor, generation_config)
    if not len(input_ids):
        raise SpiffyError("input_ids holds no row: give one prompt at least")
    if streamer is not None and len(input_ids) > 1:
        raise SpiffyError(f"streamer: it takes one row, the batch has {len(input_ids)}")
    check_drafting(graph, budget, selection)
    check_seed(0 if seed is None else seed)
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
    _refuse_positions(model_kwargs.get("position_ids"), prompts)

    if mask_token_id is None:
        mask_token_id = getattr(generation_config, "mask_token_id", None)
    lm = _ending(_model(model, graph, family, mask_token_id), model, generation_config)
    longest = generation_config.max_length - input_ids.shape[1]
    settings = _settings(lm, graph, any_model, decoding, generation_config, longest)
    sampled = settings.temperature > 0
    drawn = int(torch.randint(1 << 62, ())) if seed is None and sampled else seed or 0
    drafter: Drafter | None = None
    if graph is not None and budget != "auto":
        drafter = graph_drafter(lm, graph, settings, budget, selection)
    rows = []
    for number, (given, prompt) in enumerate(zip(input_ids, prompts, strict=True)):
        task = make_task(lm, prompt, settings, drafter, drawn, number)
        if graph is not None and budget == "auto":
            task.adviser = auto_budget(task, graph, selection)
        rows.append(_Row(task, given, longest, _asked(stopping_criteria, generation_config)))
    pad = generation_config.pad_token_id
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
    return _output(rows, pad, generation_config.return_dict_in_generate)


def generate_with(place: str, model: Any, **options: Any) -> Any:
    """What a hub repository's `custom_generate/generate.py` calls.

    Parameters
    ----------
    place
        Hub id or folder that has the draft graph, unless the options give another.
    options
        Arguments of `generate`, all of them, as transformers hands them to such a file.

    Raises
    ------
    SpiffyError
        As `custom_generate`.
    """
    given = {key: value for key, value in options.items() if key not in _OF_DOWNLOADS}
    if given.get("graph") is None:
        given["graph"] = _graph_of(place, options.get("revision"))
    check_drafting(given["graph"], given.get("budget", "auto"), given.get("selection", "model"))
    tokenizer, strings = given.pop("tokenizer", None), given.pop("stop_strings", None)
    if tokenizer is not None and _unknown(model):
        family = _family(model, given["graph"], given.get("family"))
        wrap(model, tokenizer, family, mask_token_id=given.get("mask_token_id"))
    if strings is not None:
        if tokenizer is None:
            raise SpiffyError("stop_strings are found in text: give tokenizer= too")
        ends = StopStringCriteria(tokenizer, strings)
        given["stopping_criteria"] = [*(given.get("stopping_criteria") or ()), ends]
    # Not model.generate: transformers replaces that by this file's function, where it loads both.
    return type(model).generate(model, custom_generate=custom_generate, **given)


# Arguments that `load_custom_generate` takes for its downloads.
_OF_DOWNLOADS = frozenset(
    (
        *("revision", "token", "cache_dir", "force_download", "proxies", "local_files_only"),
        *("repo_type", "subfolder"),
    )
)


@cache
def _graph_of(place: str, revision: str | None) -> DraftGraph:
    """The graph of a place; one object, because what pays is learned for each."""
    return DraftGraph.from_pretrained(place, revision=revision)


def _unknown(module: Any) -> bool:
    known = DiffusionLM.of(module)
    return known is None or known.tokenizer is None


# -- the model ------------------------------------------------------------------------------------


def _model(
    module: Any, graph: DraftGraph | None, family: str | None, mask_token_id: int | None
) -> DiffusionLM:
    """The model that a module is: known, or found out now and known from here on."""
    known = DiffusionLM.of(module)
    if known is None:
        lm = wrap(module, None, _family(module, graph, family), mask_token_id=mask_token_id)
    else:
        if not known.is_attention_trusted:  # set_attn_implementation was called since
            check_attention(known)
            known.trust_attention()
        own = known.family.name, known.mask_token_id
        wanted = family or own[0], own[1] if mask_token_id is None else mask_token_id
        lm = known if wanted == own else _otherwise(known, *wanted)
    if lm.tokenizer is None and graph is not None and graph.model.fingerprint != lm.fingerprint:
        return lm.but(fingerprint="")  # of the config alone: nothing to compare the graph's with
    return lm


def _otherwise(known: DiffusionLM, family: str, mask_token_id: int) -> DiffusionLM:
    """A known model as one call wants it: of another family, or with another mask token."""
    if mask_token_id not in range(known.vocab_size):
        raise SpiffyError(f"mask_token_id {mask_token_id!r} is not a token of {known.vocab_size}")
    config = known.config if family == known.family.name else None
    lm = wrap(known.module, known.tokenizer, family, config, mask_token_id=mask_token_id)
    known.remember()  # for the calls that want nothing of the kind
    return lm.but(eos_token_ids=known.eos_token_ids)


def _family(module: Any, graph: DraftGraph | None, family: str | None) -> str:
    """The family asked for, else the graph's, else the only one that such a module can be."""
    if family is not None:
        return family
    if graph is not None:
        return graph.model.family
    kind = module.config.model_type
    found = [each.name for each in FAMILIES if kind in (*each.computed_by, *each.model_types)]
    if len(found) != 1:
        raise SpiffyError(
            f"a module of model_type {kind!r} may be of several families, or of none: give family= "
            f"({', '.join(found or [each.name for each in FAMILIES])})"
        )
    return found[0]


def _ending(lm: DiffusionLM, module: Any, generation_config: Any) -> DiffusionLM:
    """The model with the end tokens of this call, where it gives others than the module has."""
    asked = generation_config.eos_token_id
    if asked == getattr(getattr(module, "generation_config", None), "eos_token_id", None):
        return lm
    ends = asked if isinstance(asked, list) else [] if asked is None else [asked]
    return lm.but(eos_token_ids=frozenset(ends))


def _settings(
    lm: DiffusionLM,
    graph: DraftGraph | None,
    any_model: bool,
    decoding: Mapping[str, Any] | None,
    generation_config: Any,
    longest: int,
) -> DecodingSettings:
    """Settings of a call; answers that are no number of whole blocks are decoded so, and cut."""
    if not isinstance(decoding, Mapping | None) or not all(
        isinstance(k, str) for k in decoding or ()
    ):
        raise SpiffyError(
            f"decoding={decoding!r}: give settings by their names, such as "
            "{'policy': 'threshold'}"
        )
    options = dict(decoding or {})
    for name, instead in (
        ("gen_length", "max_new_tokens="),
        ("temperature", "do_sample=True and temperature="),
    ):
        if name in options:
            raise SpiffyError(f"decoding: {name} is generate's own: give {instead}")
    if longest < 1:
        raise SpiffyError(
            f"max_length {generation_config.max_length} leaves no token for the answer: give "
            "max_new_tokens="
        )
    temperature = 1.0 if generation_config.temperature is None else generation_config.temperature
    options["temperature"] = float(temperature) if generation_config.do_sample else 0.0
    block = options.get("block_length")
    if block is None:
        block = lm.default_block_length if graph is None else graph.decoding.block_length
    if not lm.family.block_causal and isinstance(block, int) and block > 0:
        longest = -(-longest // block) * block
    return decoding_settings(lm, graph, any_model=any_model, gen_length=longest, **options)


# -- the rows -------------------------------------------------------------------------------------


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """Rows int64 [length] without their padding, which may be on the left only."""
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise SpiffyError(
            f"attention_mask of shape {[*attention_mask.shape]} does not fit input_ids of shape "
            f"{[*input_ids.shape]}"
        )
    if not torch.isin(attention_mask, attention_mask.new_tensor([0, 1])).all():
        raise SpiffyError("attention_mask holds other values than 0 and 1")
    prompts = []
    for number, (ids, seen) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
        kept = int(seen.sum())
        if not kept:
            raise SpiffyError(f"row {number}: its attention_mask leaves no token")
        if not seen[len(ids) - kept :].all():
            raise SpiffyError(
                f"row {number}: padding must be on the left: give the tokenizer padding_side='left'"
            )
        prompts.append(ids[len(ids) - kept :])
    return prompts


class _Row:
    """A row of the batch: its task, and where its answer ends.

    Parameters
    ----------
    given
        int64 [length]: the row as it came, padding included, which criteria see too.
    longest
        Most tokens of the answer.
    asked
        Stopping criteria.
    """

    def __init__(self, task: Task, given: Tensor, longest: int, asked: Sequence[Any]) -> None:
        self.task = task
        self.given = given
        self.asked = asked
        self._seen = self._streamed = 0
        self._end, self._is_ended = longest, False
        if asked:
            task.until = self._ends

    def _ends(self, answer: list[int]) -> bool:
        """Whether a criterion ends the answer, asked for every token that is new."""
        answer = answer[: self._end]
        fresh = range(self._seen + 1, len(answer) + 1)
        self._seen = max(self._seen, len(answer))
        sequence = torch.cat([self.given, self.given.new_tensor(answer)])[None]
        before = sequence.shape[1] - len(answer)
        for count in fresh:
            # The time is asked for once a block, whose tokens are there by then.
            timed = count == len(answer)
            for criterion in self.asked:
                if isinstance(criterion, MaxTimeCriteria) and not timed:
                    continue
                if bool(torch.as_tensor(criterion(sequence[:, : before + count], None)).all()):
                    self._end, self._is_ended = count, True
                    return True
        return self._is_ended

    def answer(self) -> list[int]:
        """Ids of the answer in finished blocks, as far as it goes."""
        if not self.task.path:
            return []
        cursor = self.task.path[-1]
        ids = decoded(self.task, cursor.ids, self.task.canvas.span(cursor.block).start)
        if self.asked and cursor.finished:  # the last block's tokens were not asked about
            self._ends(ids)
        return ids[: self._end]

    def fresh(self) -> Iterator[list[int]]:
        """Tokens of the answer that came since the last call, if any."""
        ids = self.answer()
        if len(ids) > self._streamed:
            yield ids[self._streamed :]
            self._streamed = len(ids)


def _asked(criteria: Sequence[Any], generation_config: Any) -> list[Any]:
    """Stopping criteria but those that transformers made of length and end tokens: we know them."""
    ends = getattr(generation_config, "_eos_token_tensor", None)

    def is_ours(criterion: Any) -> bool:
        if isinstance(criterion, MaxLengthCriteria):
            return bool(criterion.max_length == generation_config.max_length)
        if not isinstance(criterion, EosTokenCriteria) or ends is None:
            return False
        return torch.equal(criterion.eos_token_id.cpu(), ends.cpu())

    return [criterion for criterion in criteria if not is_ours(criterion)]


def _output(rows: Sequence[_Row], pad: int | None, as_dict: bool) -> Tensor | DraftedOutput:
    answers = [row.answer() for row in rows]
    longest = max(map(len, answers))
    sequences = torch.stack(
        [
            torch.cat([row.given, row.given.new_tensor([*ids, *[pad] * (longest - len(ids))])])
            for row, ids in zip(rows, answers, strict=True)
        ]
    )
    if not as_dict:
        return sequences
    stats = [row.task.stats for row in rows]
    count = sequences.new_tensor
    forwards = count([each.nfe for each in stats])
    return DraftedOutput(
        sequences=sequences,
        tokens_per_forward=count([*map(len, answers)]) / forwards,
        forwards=forwards,
        positions_computed=count([each.positions_computed for each in stats]),
        steps=count([each.steps for each in stats]),
    )


# -- what has no meaning here ---------------------------------------------------------------------

# What `generate` keeps to itself where it is given a callable (transformers 5.0 to 5.24).
_UNTOLD = (
    "streamer",
    "assistant_model",
    "prefix_allowed_tokens_fn",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "synced_gpus",
)


def _untold() -> dict[str, Any]:
    """Arguments of the `generate` that is calling which it does not hand on.

    It has put the prompt into a streamer by then, whose reader waits for the rest; and it drops the
    others without a word. They are in its frame.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return {} if frame is None else {name: frame.f_locals.get(name) for name in _UNTOLD}


def _refuse_arguments(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise SpiffyError(f"generate: {name} has no meaning for a denoising decode: drop it")


# Of `forward`, as transformers fills them in for any model.
_PREPARED = (
    *("attention_mask", "position_ids", "logits_to_keep", "use_cache"),
    *("past_key_values", "cache"),
)


def _refuse_inputs(model_kwargs: Mapping[str, Any], token_type_ids: Tensor | None) -> None:
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


def _refuse_positions(position_ids: Tensor | None, prompts: Sequence[Tensor]) -> None:
    """Refuse positions other than those that transformers fills in: 0, 1, ... after padding."""
    if position_ids is None:
        return
    rows = position_ids if position_ids.ndim > 1 else position_ids[None]
    fits = rows.ndim == 2 and len(rows) in (1, len(prompts))
    if not fits or any(
        positions[-len(ids) :].tolist() != list(range(len(ids)))
        for ids, positions in zip(prompts, rows.expand(len(prompts), -1), strict=True)
    ):
        raise SpiffyError("generate: position_ids must count from 0 in every row: drop them")


# Options that are followed, or that only describe the tokens.
_FOLLOWED = frozenset(
    (
        *("max_length", "max_new_tokens", "max_time", "stop_strings"),
        *("do_sample", "temperature", "num_return_sequences", "return_dict_in_generate"),
        *("eos_token_id", "pad_token_id", "bos_token_id", "mask_token_id", "transformers_version"),
    )
)
# Options that say nothing where nothing is drawn.
_OF_SAMPLING = frozenset(
    ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "temperature")
)
# Options that change how a forward is computed, not what it says.
_OF_SPEED = frozenset(
    ("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile")
)


def _refuse_options(config: Any, of_module: Any) -> None:
    """Refuse options of a generation config that would be ignored.

    One is asked for if it is not what transformers fills in. What came with the checkpoint counts
    too, unless it could not change a token.
    """
    usual: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
    for name, value in vars(config).items():
        if name.startswith("_") or value is None or value is False or value == usual.get(name):
            continue
        came_along = of_module is not None and value == getattr(of_module, name, None)
        harmless = name in _OF_SPEED or (name in _OF_SAMPLING and not config.do_sample)
        if came_along and (harmless or name not in _known_options()):
            continue
        if name == "temperature" and not config.do_sample:
            raise SpiffyError(f"generate: temperature={value!r} needs do_sample=True")
        if name not in _FOLLOWED and not (name == "top_k" and value == 0):
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


def _refuse_processors(processors: Sequence[Any], config: Any) -> None:
    """Refuse what changes logits, but for what stands for the temperature.

    transformers' own default of the 50 best tokens is left out: the noise is added to all logits.
    """
    for processor in processors:
        if config.do_sample and (
            (
                isinstance(processor, TemperatureLogitsWarper)
                and processor.temperature == config.temperature
            )
            or (isinstance(processor, TopKLogitsWarper) and processor.top_k == config.top_k)
        ):
            continue
        raise SpiffyError(
            f"generate: a {type(processor).__name__} cannot act here: tokens are committed by the "
            "unmasking policy, not one after the other; drop it"
        )
