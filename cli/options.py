"""Options that several commands share: declared once and read once.

An option group is a dataclass whose fields are options. A command takes groups as parameters and
`spread` shows typer their fields, so a group's options, help and reading stand in one place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial, wraps
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from spiffy.cli.common import log
from spiffy.cli.streams import write
from spiffy.schemas import DraftGraph, SpiffyError
from spiffy.schemas.decoding import FILTERS, NO_FILTER, check_setting, is_own_policy
from spiffy.schemas.notes import note
from spiffy.schemas.records import MAX_NODES, Budget, Objective

if TYPE_CHECKING:
    from spiffy.calib.prompt_files import Text
    from spiffy.runtime import BlockEdges
    from spiffy.runtime.models import DiffusionLM
    from spiffy.schemas import DecodingSettings

_LARGE = 100_000_000  # parameters

#: Options by the panel of `--help` that they stand in.
model_option = partial(typer.Option, rich_help_panel="Model")
prompt_option = partial(typer.Option, rich_help_panel="Prompts")
decoding_option = partial(typer.Option, rich_help_panel="Decoding")
drafting_option = partial(typer.Option, rich_help_panel="Drafting")
recording_option = partial(typer.Option, rich_help_panel="Recording")
output_option = partial(typer.Option, rich_help_panel="Output")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer see the fields of a command's option groups as options of the command."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if not is_dataclass(parameter.annotation):
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = parameter.annotation
        hints = get_type_hints(parameter.annotation, include_extras=True)
        shown += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(parameter.annotation)
        ]

    @wraps(command)
    def gathered(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{f.name: options.pop(f.name) for f in fields(group)})
        command(**options)

    gathered.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    gathered.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return gathered


def _print_version(wanted: bool) -> None:
    if wanted:
        write(f"spiffy-dllm {version('spiffy-dllm')}\n")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
]
Revision = Annotated[
    str | None,
    model_option(
        help="Commit, tag or branch of a model on the hub. Default: the main branch, or where no "
        "--model is given beside a graph, the graph's commit."
    ),
]
Device = Annotated[str, model_option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, model_option(help="auto, float32, bfloat16, float16, float64.")]
Adapter = Annotated[
    str | None,
    model_option(
        help="Folder or hub id of a LoRA adapter, which is merged into the weights (needs peft)."
    ),
]
Quantize = Annotated[
    str | None,
    model_option(help="int8: linear layers in 8 bits, the output head as it is (needs torchao)."),
]
Compile = Annotated[
    bool,
    model_option(
        "--compile",
        help="Let torch compile the transformer: up to a minute the first time (needs a C++ "
        "compiler, on a GPU Triton).",
    ),
]
Prepack = Annotated[
    bool | None,
    model_option(
        "--prepack/--no-prepack",
        help="Keep weights as a CPU's oneDNN computes with them. Default: if the model is large "
        "and a try shows that it is faster.",
        show_default=False,
    ),
]
Threads = Annotated[
    str,
    model_option(
        help="Threads of the CPU, or auto: as many as this process may use, one where the model is "
        "too small for more."
    ),
]
SkipBad = Annotated[
    bool,
    prompt_option("--skip-bad", help="Leave out broken lines of a file, and say how many."),
]
Field = Annotated[
    str | None,
    prompt_option(
        help="Field or column that holds the prompt. Default: prompt, question, messages, "
        "instruction, problem, text, ..., whichever is there first."
    ),
]
Dataset = Annotated[
    str,
    prompt_option(
        help="synthetic, gsm8k, humaneval, mbpp, math500; a file in JSONL, JSON, CSV or Parquet; "
        "or owner/name of a dataset on the hub."
    ),
]


def is_large(model: DiffusionLM) -> bool:
    """Whether it is no toy."""
    return sum(weight.numel() for weight in model.module.parameters()) >= _LARGE


def tell_of_bfloat16(model: DiffusionLM, dtype: str) -> None:
    """Say that a large model would be faster in another dtype than the one that nobody chose."""
    from spiffy.runtime.budget.cost import multiplies_bfloat16

    how = multiplies_bfloat16()
    if dtype == "auto" and model.device.type == "cpu" and how and is_large(model):
        note(
            f"this processor computes bfloat16 in half to two thirds of the time ({how}): try "
            "--dtype bfloat16; near-ties, and so tokens, may be others than in float32"
        )


def note_toys(dataset: str, model: DiffusionLM) -> None:
    """Say that nobody chose prompts like those that a real model will be asked."""
    if dataset == "synthetic" and is_large(model):
        note(
            "calibrating on generated word problems: give --dataset gsm8k, or a file of prompts "
            "like those that the model will be asked"
        )


@dataclass(frozen=True)
class ModelOfGraph:
    """The model that a draft graph belongs to, or another one."""

    model: Annotated[
        str | None, model_option(help="Alias, hub id or folder. Default: the graph's model.")
    ] = None
    revision: Revision = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    adapter: Adapter = None
    quantize: Quantize = None
    compile: Compile = False
    prepack: Prepack = None
    threads: Threads = "auto"
    any_model: Annotated[
        bool,
        model_option(
            "--any-model",
            help="Take a graph of another model of the same family, such as the one that this was "
            "fine-tuned from. Drafts never change a token; fewer may be accepted.",
        ),
    ] = False

    def load(self, artifact: DraftGraph | None, place: str | None) -> DiffusionLM:
        """Load the model: the one given, else that of the graph (which was found at `place`).

        That is the checkpoint that the graph lies beside, in a folder or a repository, or else the
        one that the graph names.

        Raises
        ------
        SpiffyError
            If the model cannot be loaded.
        """
        from spiffy.runtime import load_model
        from spiffy.runtime.models.source import model_of_graph

        revision = None
        if self.model is not None:
            name = self.model
        else:
            assert artifact is not None  # commands ask for one of the two
            assert place is not None
            name, revision = model_of_graph(artifact, place)
        model = load_model(
            name,
            revision=self.revision or revision,
            device=self.device,
            dtype=self.dtype,
            adapter=self.adapter,
            quantize=self.quantize,
            compile=self.compile,
            prepack="auto" if self.prepack is None else self.prepack,
        )
        tell_of_bfloat16(model, self.dtype)
        return model


#: Options that say nothing to other policies.
_READ_BY = {
    "threshold": ("threshold", "joint"),
    "entropy_bound": ("entropy-bounded",),
    "edit_threshold": ("joint",),
    "max_post_steps": ("joint",),
}


@dataclass(frozen=True)
class Unseeded:
    """How a sequence is decoded; what is not given is the graph's, else the family's default."""

    policy: Annotated[
        str | None,
        decoding_option(
            help="Unmasking policy: static, threshold, sequential, entropy-bounded, joint "
            "(LLaDA2.1: commits by threshold and replaces committed tokens), or one of your own as "
            "module:object, which is imported. Default: the graph's, else static."
        ),
    ] = None
    tokens_per_step: Annotated[
        int | None,
        decoding_option(help="Tokens that a static step commits. Default: the graph's, else 1."),
    ] = None
    threshold: Annotated[
        float | None,
        decoding_option(help="Confidence that commits at once. Default: the graph's, else 0.9."),
    ] = None
    entropy_bound: Annotated[
        float | None,
        decoding_option(
            help="Nats of entropy, without the largest, that positions committed at once may have "
            "together (entropy-bounded). Default: the graph's, else 0.1."
        ),
    ] = None
    edit_threshold: Annotated[
        float | None,
        decoding_option(
            help="Confidence above which a committed token of the block is replaced (joint). "
            "Default: the graph's, else 0.9."
        ),
    ] = None
    max_post_steps: Annotated[
        int | None,
        decoding_option(
            help="Most steps that a full block goes on for while tokens are replaced (joint). "
            "Default: the graph's, else 16."
        ),
    ] = None
    sub_block_length: Annotated[
        int | None,
        decoding_option(
            help="Positions of a block that are finished before the next ones are begun. Default: "
            "the graph's, else 8 for Fast-dLLM v2 and the whole block for others."
        ),
    ] = None
    block_length: Annotated[
        int | None,
        decoding_option(
            help="Positions per block. Default: the graph's, else the model's own (32 where any "
            "works)."
        ),
    ] = None
    gen_length: Annotated[
        int | None,
        decoding_option(help="Positions reserved for the answer. Default: the graph's, else 256."),
    ] = None
    cache: Annotated[
        str | None,
        decoding_option(
            help="none, dual, prefix, prefix-shared (near-lossless: cheaper drafts than with "
            "prefix), or block (SDAR and other block-causal models). Default: the graph's, else "
            "block for those, none for others."
        ),
    ] = None
    temperature: Annotated[
        float | None,
        decoding_option(help="0 decodes greedily. Default: the graph's, else 0."),
    ] = None
    top_k: Annotated[
        int | None,
        decoding_option(
            help="Draw from so many of the likeliest tokens, at temperatures above 0. Default: the "
            "graph's, else from all."
        ),
    ] = None
    top_p: Annotated[
        float | None,
        decoding_option(
            help="Draw from the fewest of the likeliest tokens that have such a share of the "
            "probability, at temperatures above 0; 1: from all. Default: the graph's, else 1."
        ),
    ] = None
    edges: Annotated[
        str,
        decoding_option(
            help="What may happen where a block ends; changes the cost, never the tokens: all, "
            "none, or a list such as fold,first. complete: drafts may complete a block. first: a "
            "block's first forward may carry drafts. fold: it stores the block before (cache "
            "block)."
        ),
    ] = "all"

    def _given(self) -> dict[str, Any]:
        """By the names of `DecodingSettings`; those that are not given are None."""
        given = (each.name for each in fields(Unseeded) if each.name != "edges")
        return {name: getattr(self, name) for name in given}

    def check(self) -> None:
        """Refuse what no model and no graph can make right, before anything is loaded."""
        self.block_edges()
        for name, value in self._given().items():
            if value is not None:
                check_setting(name, value)
        for name in FILTERS:
            value = getattr(self, name)
            if self.temperature == 0 and value not in NO_FILTER[name]:
                raise SpiffyError(
                    f"--{name.replace('_', '-')} {value} filters what is drawn: give a "
                    "--temperature above 0 too"
                )
        if self.policy is not None and is_own_policy(self.policy):
            from spiffy.runtime.step.own_policy import import_policy

            import_policy(self.policy)

    def settings(
        self,
        model: DiffusionLM,
        artifact: DraftGraph | None = None,
        any_model: bool = False,
        compared: Sequence[str] = (),
    ) -> DecodingSettings:
        """Decoding settings of a model, to which the artifact has to belong unless `any_model`.

        `compared` are other unmasking policies that are run beside it.

        Raises
        ------
        SpiffyError
            If an option is invalid or nothing reads it, or the family cannot decode that way.
        """
        from spiffy.runtime import decoding_settings

        found = decoding_settings(model, artifact, any_model=any_model, **self._given())
        for name, policies in _READ_BY.items():
            if getattr(self, name) is not None and not {found.policy, *compared} & {*policies}:
                raise SpiffyError(
                    f"--{name.replace('_', '-')} is read by --policy {' or '.join(policies)}, not "
                    f"by {found.policy}"
                )
        return found

    def block_edges(self) -> BlockEdges:
        """Read what `--edges` allows.

        Raises
        ------
        SpiffyError
            If a word is unknown.
        """
        from spiffy.runtime import BlockEdges

        known = [switch.name for switch in fields(BlockEdges)]
        allowed = [word.strip() for word in self.edges.split(",")]
        if allowed == ["all"] or allowed == ["none"]:
            allowed = known if allowed == ["all"] else []
        for word in allowed:
            if word not in known:
                raise SpiffyError(
                    f"--edges {self.edges!r}: {word!r} does not belong there: give all, none, or a "
                    f"list of {', '.join(known)}"
                )
        return BlockEdges(**{name: name in allowed for name in known})


@dataclass(frozen=True)
class Decoding(Unseeded):
    """The same, and what is drawn."""

    seed: Annotated[int, decoding_option(help="Draws the prompts, and the noise if any.")] = 0


@dataclass(frozen=True)
class Encoding:
    """How prompts become token ids."""

    raw: Annotated[
        bool,
        prompt_option(
            "--raw",
            help="Take prompts as they are: no chat template, and special tokens that they spell "
            "are tokens. For base models, and for prompts that are templated already.",
        ),
    ] = False
    system: Annotated[
        str | None, prompt_option(help="System message to put before every prompt.")
    ] = None

    def check(self) -> None:
        """Refuse options that exclude each other."""
        if self.raw and self.system is not None:
            raise SpiffyError("--raw takes prompts as they are: write the system message into them")

    def note_spelled(self, model: DiffusionLM, prompts: Sequence[Text]) -> None:
        """Say so if prompts spell special tokens that are taken as text."""
        if self.raw or model.tokenizer is None:
            return
        spelling = [words for prompt in prompts if (words := model.codec.spelled(prompt))]
        if spelling:
            some = "the prompt spells" if len(prompts) == 1 else f"{len(spelling)} prompts spell"
            log.print(
                f"{some} special tokens, such as {spelling[0][0]}, which are taken as text: --raw "
                "takes them as tokens, without the chat template",
                soft_wrap=True,
            )


@dataclass(frozen=True)
class Growth:
    """What graph is grown from recorded decodes."""

    budget: Annotated[int, drafting_option(help="Drafts per forward that the graph may hold.")] = 32
    objective: Annotated[
        Objective,
        drafting_option(
            help="expected-steps (steps that drafts save), paper (the published degree-1 "
            "accumulation: count of a node plus counts of its parents), or transitions (counts "
            "along edges)."
        ),
    ] = "expected-steps"

    def check(self) -> None:
        """Refuse a budget that no artifact can hold."""
        if not 1 <= self.budget <= MAX_NODES:
            raise SpiffyError(f"--budget {self.budget}: must be between 1 and {MAX_NODES} drafts")


def read_budget(word: str) -> Budget:
    """What `--budget` asks for.

    Raises
    ------
    SpiffyError
        If it is neither "auto" nor a positive number.
    """
    if word == "auto":
        return "auto"
    if word.removeprefix("-").isdecimal() and len(word) < 10:
        if int(word) < 1:
            raise SpiffyError(f"--budget {word}: must be at least 1 draft")
        return int(word)
    raise SpiffyError(f"--budget {word!r}: give a number of drafts, or auto")
