"""The harness's model class "spiffy": requests in, answers out, with drafts."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from inspect import signature
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any

from spiffy.integrations.lm_eval import launch
from spiffy.integrations.lm_eval.counts import Counts
from spiffy.schemas import Budget, DecodingSettings, SpiffyError
from spiffy.schemas.decoding import FILTERS
from spiffy.schemas.errors import said

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError:
    raise SpiffyError(
        "lm-evaluation-harness is not installed: pip install 'spiffy-dllm[lm-eval]'"
    ) from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from spiffy.runtime.generate import Output

#: Of generation arguments that are no use here: what leaves an answer as it is.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1}
_ELSEWHERE = {
    "temperature": "give --gen_kwargs do_sample=True,temperature=...",
    "top_k": "give --gen_kwargs do_sample=True,top_k=...",
    "top_p": "give --gen_kwargs do_sample=True,top_p=...",
    "system": "give --system_instruction",
    "trust_remote_code": "no code of a checkpoint is run: drop it",
}
_SAMPLING = (*FILTERS, "min_p", "typical_p")  # without effect on greedy decoding


@dataclass(frozen=True)
class _Job:
    """A request as it is decoded."""

    prompt: Any  # token ids
    settings: DecodingSettings
    stop: tuple[str, ...]
    most: int  # tokens of the answer
    document: int
    where: str  # the task, and the document
    sequence: int  # decides its noise


class _RefusedError(SpiffyError):
    """A request, by its number, that cannot be computed."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Conversation(str):
    """A prompt that the chat template has rendered.

    It remembers its messages, because special tokens that these spell are text, not tokens.

    Attributes
    ----------
    begun
        Whether the last message is the beginning of the answer.
    """

    messages: list[dict[str, str]]
    begun: bool


@register_model("spiffy")
class SpiffyLM(TemplateLM):  # type: ignore[misc]
    """A diffusion language model for the harness, with drafts if it is given a graph.

    Parameters
    ----------
    pretrained, graph, budget, any_model, options
        As for `Loaded`, where the model is not called pretrained.
    batch_size
        Sequences that share forwards; as some finish, others join.
    verify_share
        Share of the answers to decode plainly too, drawn by `seed`; the results tell which differ.
    likelihood_samples
        Masked continuations that a likelihood is estimated from (`likelihood`).
    seed
        Of the noise, where tasks sample, and of the estimates.

    Raises
    ------
    SpiffyError
        If an option is wrong, or the model or the graph cannot be had or do not fit together.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        graph: str | None = None,
        *,
        budget: Budget = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # the harness gives it, for what has batch_size auto
        device: str | None = None,
        verify_share: float = 0.0,
        likelihood_samples: int = 128,
        seed: int = 0,
        any_model: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        from spiffy.integrations.loaded import Loaded

        launched = launch.current.get()
        if launched is not None and launched.verify_share:
            if verify_share:
                raise SpiffyError("give --verify-share, or verify_share among --model_args")
            verify_share = launched.verify_share
        if options.get("cache", "") is None:  # the harness reads its name so
            options["cache"] = "none"
        _check(batch_size, verify_share, likelihood_samples, graph, {"budget": budget, **options})
        self.batch_size, self.verify_share = int(batch_size), verify_share
        self.likelihood_samples = likelihood_samples
        self._gen_length: int | None = options.get("gen_length")
        self.loaded = Loaded(
            pretrained,
            graph,
            budget=budget,
            seed=seed,
            any_model=any_model,
            device=_device(device),
            **options,
        )
        self.counts: dict[str, Counts] = {}
        if launched is not None:
            launched.models.append(self)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to requests, in order; nothing is decoded if one of them cannot be."""
        repeats: Counter[tuple[object, ...]] = Counter()  # the harness repeats requests as they are
        jobs = []
        for request in requests:
            which = (request.task_name, request.doc_id, request.idx)
            jobs.append(self._job(request, _sequence(*which, repeats[which])))
            repeats[which] += 1
        by_task: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_task.setdefault(str(request.task_name), []).append(number)
        texts = [""] * len(jobs)
        with tqdm(total=len(jobs), desc="Decoding answers", disable=disable_tqdm) as bar:
            for name, numbers in by_task.items():
                counts = self.counts.setdefault(name, Counts())
                checked = self._drawn(name, numbers)
                kept: dict[int, Output] = {}
                started = perf_counter()
                for number, output in self._decoded(jobs, numbers):
                    texts[number] = output.text
                    self.cache_hook.add_partial(
                        "generate_until", requests[number].args, output.text
                    )
                    counts.add(output)
                    if number in checked:
                        kept[number] = output
                    bar.update()
                counts.seconds += perf_counter() - started
                self._verify(jobs, kept, counts)
        return texts

    def _job(self, request: Instance, sequence: int) -> _Job:
        context, given = request.args
        kwargs = dict(normalize_gen_kwargs(given, default_max_gen_toks=0))
        most, temperature = kwargs.pop("max_gen_toks"), float(kwargs.pop("temperature", 0.0))
        stop = tuple(word for word in kwargs.pop("until") if word)
        kwargs.pop("do_sample")  # the temperature says it
        # What a task does not name is off, whatever the graph says.
        changes: dict[str, Any] = {"temperature": temperature} | dict.fromkeys(FILTERS)
        if temperature > 0:
            changes |= {name: kwargs.pop(name) for name in FILTERS if name in kwargs}
            if changes.get("top_k") in (0, -1):  # as others spell that it is off
                changes["top_k"] = None
        for name, value in kwargs.items():
            greedy = temperature == 0 and name in _SAMPLING
            if not greedy and _NEUTRAL.get(name) != value:
                raise SpiffyError(
                    f"{request.task_name}: generation argument {name}={value!r} means nothing to "
                    "this decoding; until, max_gen_toks, do_sample, temperature, top_k and top_p do"
                )
        if most and self._gen_length is None:
            changes["gen_length"] = self._room_for(most)
        document = int(request.doc_id or 0)
        with _named(request):
            settings = self.loaded.settings.changed(**changes)
            prompt = self._encoded(context)
            self.loaded.task(prompt, settings, 0, stop)  # refuse it before anything is decoded
        most, where = most or settings.gen_length, _where(request)
        return _Job(prompt, settings, stop, most, document, where, sequence)

    def _room_for(self, tokens: int) -> int:
        """Positions for an answer: whole blocks, but where the last one may be cut."""
        settings = self.loaded.settings
        if settings.cache == "block":
            return tokens
        return math.ceil(tokens / settings.block_length) * settings.block_length

    def _encoded(self, context: str) -> Any:
        """Ids of a prompt: of messages as every command encodes them, of text as it stands."""
        model = self.loaded.model
        if isinstance(context, Conversation) and not context.begun:
            return model.encode(context.messages)
        if isinstance(context, Conversation):
            return model.codec.tokenizer(str(context), add_special_tokens=False)["input_ids"]
        return model.encode(context, raw=True)

    def _decoded(
        self, jobs: Sequence[_Job], numbers: Iterable[int], plain: bool = False
    ) -> Iterator[tuple[int, Output]]:
        """Numbers and outputs of jobs, as they finish.

        Raises
        ------
        SpiffyError
            If one fails; where the harness keeps answers in a cache, after all the others.
        """
        from spiffy.runtime.decode import run
        from spiffy.runtime.generate import collect

        tasks, places = [], {}
        for number in numbers:
            job = jobs[number]
            task = self.loaded.task(job.prompt, job.settings, job.sequence, job.stop, plain=plain)
            tasks.append(task)
            places[id(task)] = number
        model, failed = self.loaded.model, []
        for task in chain.from_iterable(run(model, tasks, self.batch_size, failed_too=True)):
            number = places[id(task)]
            if task.error is not None:
                failed.append(f"{jobs[number].where}: {said(task.error)}")
                if self.cache_hook.dbdict is None:
                    break
                continue
            output, most = collect(task), jobs[number].most
            if len(output.token_ids) > most:
                ids = output.token_ids[:most]
                output = replace(output, text=model.decode_text(ids), token_ids=ids)
            yield number, output
        if failed:  # no answer at all would be scored as a wrong one
            more = f" (and {len(failed) - 1} more failed)" if len(failed) > 1 else ""
            raise SpiffyError(failed[0] + more)

    def _drawn(self, name: str, numbers: Sequence[int]) -> set[int]:
        """Which answers to verify: the same ones whenever this is run."""
        count = math.ceil(self.verify_share * len(numbers))
        return set(random.Random(f"{self.loaded.seed} {name}").sample(numbers, count))

    def _verify(self, jobs: Sequence[_Job], ours: Mapping[int, Output], counts: Counts) -> None:
        """Decode answers plainly too, and note which differ."""
        for number, plain in self._decoded(jobs, sorted(ours), plain=True):
            output = ours[number]
            counts.verified += 1
            counts.verified_nfe += output.stats.nfe
            counts.plain_nfe += plain.stats.nfe
            if (output.text, output.token_ids) != (plain.text, plain.token_ids):
                counts.differing.append(jobs[number].document)
        counts.differing.sort()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into `config` of its results, beside model and arguments."""
        loaded = self.loaded
        content: dict[str, Any] = {
            "version": version("spiffy-dllm"),
            "model": loaded.model.name,
            "dtype": loaded.model.kernels,
            "graph": None if loaded.graph is None else loaded.graph.digest(),
            "budget": None if loaded.graph is None else loaded.budget,
            "decoding": loaded.settings.model_dump(mode="json"),
            "verify_share": self.verify_share,
            "likelihood_samples": self.likelihood_samples,
            "tasks": {name: counts.record() for name, counts in self.counts.items()},
        }
        return {"spiffy": content}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's template renders it; see `Conversation`."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template is a program that came with the checkpoint
            reason = said(error)
            raise SpiffyError(f"{self.loaded.model.name}: its chat template: {reason}") from None
        conversation = Conversation(text)
        conversation.messages, conversation.begun = chat_history, not add_generation_prompt
        return conversation

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return self.loaded.model.codec.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness caches requests."""
        return self.loaded.model.name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return min(self.loaded.model.eos_token_ids)

    @property
    def max_length(self) -> int | None:
        """Positions that the model can have."""
        return self.loaded.model.max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text as it stands."""
        ids = self.loaded.model.codec.tokenizer(string, add_special_tokens=False)["input_ids"]
        return list(ids)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Likelihoods of continuations, in order; nothing is computed if one of them cannot be.

        Raises
        ------
        SpiffyError
            Names the task and the document.
        """
        try:
            return super().loglikelihood(requests, disable_tqdm)  # type: ignore[no-any-return]
        except _RefusedError as problem:
            with _named(requests[problem.number]):
                raise

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Estimates of log-likelihoods, and whether greedy decoding gives the continuation."""
        from spiffy.integrations.likelihood import check_likelihood, is_greedy, log_likelihood

        model, found = self.loaded.model, []
        for number, (_, context, continuation) in enumerate(requests):
            try:
                check_likelihood(model, context, continuation)
            except SpiffyError as problem:
                raise _RefusedError(number, str(problem)) from None
        for texts, context, continuation in tqdm(
            requests, desc="Estimating likelihoods", disable=disable_tqdm
        ):
            estimate = log_likelihood(
                model,
                context,
                continuation,
                self.likelihood_samples,
                self.batch_size,
                self.loaded.seed,
            )
            answer = estimate, is_greedy(model, context, continuation)
            self.cache_hook.add_partial("loglikelihood", texts, answer)
            found.append(answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Refused: the estimate is of a continuation.

        Raises
        ------
        SpiffyError
            Always.
        """
        raise SpiffyError(
            f"{requests[0].task_name}: likelihoods of whole texts (loglikelihood_rolling) are not "
            "supported: choose tasks that generate, or choose among answers"
        )


def _sequence(task: object, document: object, index: int, repeat: int) -> int:
    """Which noise a request has: its own, whatever is cached or asked beside it."""
    digest = hashlib.sha256(repr((task, document, index, repeat)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _device(asked: str | None) -> str:
    """The harness asks for its default, a GPU, whether there is one or not."""
    import torch

    default = asked is None or (asked == "cuda:0" and not torch.cuda.is_available())
    return "auto" if default else str(asked)


@contextmanager
def _named(request: Instance) -> Iterator[None]:
    """Say whose prompt it is that cannot be."""
    try:
        yield
    except SpiffyError as problem:
        raise SpiffyError(f"{_where(request)}: {problem}") from None


def _where(request: Instance) -> str:
    return f"{request.task_name}, document {request.doc_id}"


def _may_be_none() -> set[str]:
    """Options for which None says what leaving them out says."""
    from spiffy.runtime import load_model

    loading = signature(load_model).parameters.values()
    return {"gen_length", *(each.name for each in loading if each.default is None)}


def _check(
    batch_size: int | str,
    verify_share: float,
    likelihood_samples: int,
    graph: str | None,
    options: Mapping[str, Any],
) -> None:
    """Refuse options that cannot be, before anything is loaded."""
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise SpiffyError(f"batch_size {batch_size}: give a number of sequences from 1")
    if not isinstance(verify_share, int | float) or not 0 <= verify_share <= 1:
        raise SpiffyError(f"verify_share {verify_share!r}: give a number from 0 to 1")
    if type(likelihood_samples) is not int or likelihood_samples < 1:
        raise SpiffyError(f"likelihood_samples {likelihood_samples!r}: give a number from 1")
    if verify_share and graph is None:
        raise SpiffyError("verify_share compares drafting with plain decoding: give graph=FILE")
    for name, instead in _ELSEWHERE.items():
        if name in options:
            raise SpiffyError(f"model argument {name}: {instead}")
    for name, value in options.items():
        if value is None and name not in _may_be_none():
            raise SpiffyError(f"model argument {name}: None is no value of it: drop it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SpiffyError("several ranks: start one process; --batch_size shares its forwards")
