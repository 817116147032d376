"""What a model family is: a handful of facts, and a wrapper that runs its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import chain
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedConfig, PreTrainedModel

from spiffy.runtime.models.block_size import is_published, stated_block_size
from spiffy.runtime.models.fields import Entries
from spiffy.runtime.models.rotary import install, reach, whole_lengths
from spiffy.runtime.models.stored import stored_tensors
from spiffy.runtime.models.text import Prompt, TextCodec, given_ids, is_text
from spiffy.schemas import CacheName, SpiffyError
from spiffy.schemas.notes import note

_DEAR = 1 << 24  # parameters of an output head

Architecture = tuple[type[PreTrainedModel], PreTrainedConfig]

# transformers 5.24 renamed it, for all of its models.
_CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


# Packages whose layers compute what a family's module does in the usual way.
_OWN = frozenset({"torch", "transformers", "spiffy"})


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _none(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a family without such parameters; a function by name, so that families can be pickled."""
    return {}


@dataclass(frozen=True)
class Family:
    """The facts that tell one family of diffusion LMs from another.

    Attributes
    ----------
    name
        Short name, used in artifacts.
    model_types
        `model_type` values of `config.json` that belong to the family.
    architectures
        Names in `architectures` of `config.json`, where the model type alone does not tell.
    named
        What a checkpoint's name has to contain where no field of `config.json` tells (A2D).
    computed_by
        Model types of the transformers modules that compute the family, which `wrap` takes.
    architecture
        From the checkpoint's `config.json` content to transformers' module class and its config;
        the module has `.model` (ids to hidden states) and `.lm_head`.
    key_mapping
        Regular expressions from the checkpoint's parameter names to the module's.
    logit_shift
        1 if raw row k speaks of token k + 1 (Dream), else 0.
    block_causal
        Attention is bidirectional inside a block and causal across blocks (SDAR), instead of
        bidirectional everywhere.
    block_size
        Positions of a block where the checkpoint does not say.
    blocks_end_with_prompt
        The prompt's last block ends where the prompt does and its first one is shorter (bd3lm),
        instead of blocks that count from position 0, where the prompt's tail opens the first
        decoded block (SDAR). Only block-causal families.
    cuts_last_block
        The last block ends with `gen_length` (Stable-DiffCoder, bd3lm), instead of being decoded
        whole (SDAR). Only block-causal families.
    splits_masks
        `steps_per_block` splits the masks that a block starts with (Stable-DiffCoder, bd3lm),
        instead of `block_length` (SDAR). Both are the same but in the first and the last block.
    begins_blocks_alone
        A block's first token is committed alone, by the forward that stores the blocks before it,
        whose last position speaks of it (Fast-dLLM v2). Only shifted block-causal families.
    sub_block_length
        Positions of a block that are finished before the next ones of it are begun, unless asked
        otherwise (Fast-dLLM v2); None: all of them together.
    threshold_strict
        Threshold unmasking commits confidences > tau (SDAR, LLaDA2) instead of >= tau (others).
    caches
        Cache kinds that the family can decode with; the first is the default.
    merged
        From `config.json` content to the names and shapes of stored parameters of which several
        make one of the module's (experts); by default there are none.
    split
        From `config.json` content to the names of stored parameters that hold several of the
        module's, one below the other: for each, the module's names and their rows; by default there
        are none.
    mask_token_id
        Published id of the mask token, for checkpoints where neither config nor tokenizer has it.
    entries
        What becomes of the entries of `config.json`; others are refused.
    block_size_varies
        Checkpoints come in several block sizes, so one that states none has none (SDAR).
    """

    name: str
    model_types: tuple[str, ...]
    computed_by: tuple[str, ...]
    architecture: Callable[[Mapping[str, Any]], Architecture]
    key_mapping: Mapping[str, str]
    logit_shift: Literal[0, 1]
    block_causal: bool
    threshold_strict: bool
    caches: tuple[CacheName, ...]
    merged: Callable[[Mapping[str, Any]], Mapping[str, list[int]]] = _none
    split: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, int]]] = _none
    architectures: tuple[str, ...] = ()
    named: str = ""
    block_size: int = 32
    blocks_end_with_prompt: bool = False
    cuts_last_block: bool = False
    splits_masks: bool = False
    begins_blocks_alone: bool = False
    sub_block_length: int | None = None
    mask_token_id: int | None = None
    entries: Entries = Entries()  # noqa: RUF009 (frozen)
    block_size_varies: bool = False


class KeyValues:
    """Keys and values of some positions, one pair of [1, heads, positions, head_dim] per layer."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        """Number of positions held."""
        return self.layers[0][0].shape[2]

    def without(self, positions: range) -> KeyValues:
        """Copy out all but a run of positions."""
        first, end = positions.start, positions.stop
        return KeyValues(
            [
                (
                    torch.cat((k[:, :, :first], k[:, :, end:]), 2),
                    torch.cat((v[:, :, :first], v[:, :, end:]), 2),
                )
                for k, v in self.layers
            ]
        )

    def narrow(self, positions: range) -> KeyValues:
        """Copy out a run of positions."""
        run = slice(positions.start, positions.stop)
        return KeyValues([(k[:, :, run].clone(), v[:, :, run].clone()) for k, v in self.layers])

    def append(self, other: KeyValues) -> KeyValues:
        """Join two runs of positions."""
        pairs = zip(self.layers, other.layers, strict=True)
        return KeyValues([(torch.cat((a, c), 2), torch.cat((b, d), 2)) for (a, b), (c, d) in pairs])


class _AttentionCache:
    """What transformers' attention takes as its cache: puts frozen positions in front.

    Unlike transformers' caches it never grows: a draft's keys and values must not outlive the
    forward that verified it.
    """

    def __init__(self, frozen: list[tuple[Tensor, Tensor]] | None, keep: bool) -> None:
        self.frozen = frozen
        self.fresh: list[tuple[Tensor, Tensor]] = []
        self.keep = keep

    def get_seq_length(self, *_: object) -> int:
        """Asked for by older transformers 5 releases; positions are always passed explicitly."""
        return 0 if self.frozen is None else self.frozen[0][0].shape[2]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        if self.keep:
            self.fresh.append((key, value))
        if self.frozen is None:
            return key, value
        old_key, old_value = self.frozen[layer_idx]
        return torch.cat((old_key, key), 2), torch.cat((old_value, value), 2)


class DiffusionLM:
    """A masked diffusion language model of any family, ready to decode.

    Attributes
    ----------
    family, config
        Facts of the family; content of the checkpoint's `config.json`.
    name, revision, fingerprint
        What the model was loaded as; hub commit or None; digest of config and tokenizer.
    tokenizer
        The checkpoint's tokenizer, or None if it ships none.
    mask_token_id, eos_token_ids, vocab_size, max_length
        Token ids, number of logits per position, and positions that training and RoPE reach.
    """

    # What is known of a module, for as long as it lives; it does not hold on to the module.
    _known: ClassVar[WeakKeyDictionary[nn.Module, dict[str, Any]]] = WeakKeyDictionary()

    def __init__(
        self,
        module: nn.Module,
        family: Family,
        config: Mapping[str, Any],
        *,
        name: str,
        revision: str | None = None,
        fingerprint: str = "",
        tokenizer: Any = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.module = module.eval()
        self.family = family
        self.config = config
        self.name = name
        self.revision = revision
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.mask_token_id = int(config["mask_token_id"])
        head: Any = module.lm_head  # whose weight, if quantised, may have any shape
        self.vocab_size = int(getattr(head, "out_features", None) or head.weight.shape[0])
        settings: Any = getattr(module, "config", None)
        self._attention = getattr(settings, "_attn_implementation", None) or "sdpa"
        limits = ("max_sequence_length", "max_position_embeddings")
        stated = next((int(config[k]) for k in limits if config.get(k)), None)
        self.max_length = reach(stated, getattr(settings, "rope_parameters", None) or {})
        self._rope_of_length = install(module)
        self.remember()

    @classmethod
    def of(cls, module: nn.Module) -> DiffusionLM | None:
        """The model that `load_model` or `wrap` made of a module, if they did: the last such."""
        facts = cls._known.get(module)
        if facts is None:
            return None
        return cls(module, **{name: fact for name, fact in facts.items() if name != "attention"})

    def but(self, **facts: Any) -> DiffusionLM:
        """The same model, for one use, with other facts, such as `eos_token_ids`."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__ | facts)
        other.__dict__.pop("codec", None)  # made of the end tokens
        return other

    def remember(self) -> None:
        """Make this what `of` gives for its module."""
        before = self._known.get(self.module, {})
        self._known[self.module] = {
            "attention": before.get("attention", self._attention),
            "family": self.family,
            "config": self.config,
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "eos_token_ids": self.eos_token_ids,
        }

    @property
    def is_attention_trusted(self) -> bool:
        """Whether its module still computes the attention that it was made or tried out with."""
        return self._known.get(self.module, {}).get("attention") == self._attention

    def trust_attention(self) -> None:
        """Note that the attention which its module computes now was tried out."""
        self._known[self.module]["attention"] = self._attention

    def forget(self) -> None:
        """Make nothing known of its module, for what turned out not to be usable."""
        self._known.pop(self.module, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From pickle, or a copy."""
        self.__dict__.update(state)
        self.remember()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, weights included, as for processes that are spawned.

        Raises
        ------
        SpiffyError
            If a device map has spread the model: what moves its parts about cannot be pickled.
        """
        if any(hasattr(part, "_hf_hook") for part in self.module.modules()):
            raise SpiffyError(
                f"{self.name}: spread by device_map, a model cannot be pickled or copied: load it "
                "in the process that uses it"
            )
        return self.__dict__

    @property
    def device(self) -> torch.device:
        """Where token ids are expected."""
        head: Any = self.module.lm_head
        weight = getattr(head, "weight", None)
        if weight is None:  # quantised, in buffers
            weight = next(iter((*head.parameters(), *head.buffers())))
        if weight.is_meta:  # offloaded by a device map: accelerate brings it there and back
            return torch.device(head._hf_hook.execution_device)
        return weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights, or of those that are not quantised."""
        head: Any = self.module.lm_head
        own = getattr(head, "weight", None)
        for weight in chain(() if own is None else (own,), self.module.parameters()):
            if weight.is_floating_point() and weight.element_size() > 1:
                return weight.dtype  # type: ignore[no-any-return]
        return torch.get_default_dtype()

    @cached_property
    def arithmetic(self) -> str:
        """The dtype, and what computes that is not torch's or transformers' own.

        Such as "float32", or "bfloat16, torchao.Int8Tensor"; costs are remembered by it.
        """
        layers = {type(part) for part in self.module.modules()}
        weights = {type(value) for value in self.module.parameters()} - {nn.Parameter, Tensor}
        foreign = weights | {kind for kind in layers if _package(kind) not in _OWN}
        names = sorted(f"{_package(kind)}.{kind.__name__}" for kind in foreign)
        attention = [] if self._attention == "sdpa" else [self._attention]
        return ", ".join([str(self.dtype).removeprefix("torch."), *attention, *names])

    @property
    def default_block_length(self) -> int:
        """The block size that the model was trained with, or the family's where any works.

        Raises
        ------
        SpiffyError
            If the family's checkpoints come in several, and nothing says which this one has.
        """
        family = self.family
        if not family.block_causal:
            return family.block_size
        stated = stated_block_size(self.name, self.config)
        if stated is not None:
            return stated
        if is_published(self.name):
            return family.block_size
        if family.block_size_varies:
            raise SpiffyError(
                f"{self.name}: neither its name (as in -b8) nor config.json says which block size "
                f"it was trained with, and {family.name} comes in several: give --block-length"
            )
        note(
            f"{self.name} states no block size: {family.block_size} is taken, as published "
            f"{family.name} checkpoints have; --block-length gives another"
        )
        return family.block_size

    @torch.inference_mode()
    def hidden_states(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        frozen: list[tuple[Tensor, Tensor]] | None = None,
        keep: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, KeyValues | None]:
        """One forward of the transformer, without the output head.

        Parameters
        ----------
        ids, positions
            int64 [batch, query]: tokens and their rotary positions.
        mask
            bool [batch, query, frozen + query], True where the query attends; None attends to all.
        frozen
            Keys and values put in front of every row, [batch or 1, heads, frozen, head_dim] each.
        keep
            Also return the queries' own keys and values.
        lengths
            Lengths of the whole sequences of which the rows are parts, where RoPE depends on them;
            by default up to the furthest position.

        Returns
        -------
        hidden states [batch, query, hidden] and, if asked for, keys and values of the queries.
        """
        if mask is None:
            past = 0 if frozen is None else frozen[0][0].shape[2]
            mask = ids.new_ones((1, ids.shape[1], past + ids.shape[1]), dtype=torch.bool)
        if self._attention == "eager":  # adds its mask to the scores
            hidden_out = torch.finfo(self.dtype).min
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, hidden_out)
        cache = _AttentionCache(frozen, keep)
        if lengths is None:
            lengths = [int(positions.max()) + 1] * len(ids) if self._rope_of_length else ()
        with whole_lengths(lengths):
            hidden = self.module.model(  # type: ignore[operator]
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask[:, None],
                use_cache=False,
                **{_CACHE: cache},
            ).last_hidden_state
        return hidden, KeyValues(cache.fresh) if keep else None

    @property
    def head_is_dear(self) -> bool:
        """Whether reading the output head takes long, beside multiplying some rows with it."""
        width: int = self.module.config.hidden_size  # type: ignore[union-attr, assignment]
        return self.vocab_size * width >= _DEAR

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., hidden], in the model's dtype."""
        return self.module.lm_head(hidden)  # type: ignore[operator, no-any-return]

    @torch.inference_mode()
    def head_of(self, hidden: Tensor, tokens: Tensor) -> Tensor | None:
        """Logits of a few tokens (int64 [M, J]) without a pass over the vocabulary.

        Parameters
        ----------
        hidden
            [..., M, hidden].

        Returns
        -------
        [..., M, J] in the model's dtype, or None if the head's weights are not at hand (offloaded,
        quantised).
        """
        head = self.module.lm_head
        if type(head) is not torch.nn.Linear or type(head.weight) is not nn.Parameter:
            return None
        if head.weight.is_meta:
            return None
        hidden, tokens = hidden.to(head.weight.device), tokens.to(head.weight.device)
        logits = torch.einsum("...mh,mjh->...mj", hidden, head.weight[tokens])
        return logits if head.bias is None else logits + head.bias[tokens]

    def forward_logits(
        self, input_ids: Tensor, block_length: int | None = None, first_block: int | None = None
    ) -> Tensor:
        """Logits of whole sequences; row k is the distribution of the token at position k.

        Parameters
        ----------
        input_ids
            int64 [batch, length].
        block_length
            Only for block-causal families: size of the attention blocks (default: the config's).
        first_block
            Only for block-causal families: size of the first block, where it differs from the
            others, as that of prompts does where blocks end with the prompt.

        Returns
        -------
        float32 [batch, length, vocab]

        Raises
        ------
        SpiffyError
            If one of them is given for a bidirectional family, or the first block is larger than
            the others.
        """
        for option, value in (("block_length", block_length), ("first_block", first_block)):
            if value is not None and not self.family.block_causal:
                raise SpiffyError(f"{self.family.name} attends everywhere: it takes no {option}")
        ids = input_ids.to(self.device)
        positions = torch.arange(ids.shape[1], device=self.device)
        mask = None
        if self.family.block_causal:
            size = block_length or self.default_block_length
            first = size if first_block is None else first_block
            if not 1 <= first <= size:
                raise SpiffyError(f"first_block {first} must be 1 to block_length {size}")
            mask = block_causal_mask(positions + size - first, size)[None]
        hidden, _ = self.hidden_states(ids, positions.expand_as(ids), mask)
        return self.head(hidden[:, self.rows_of(positions)]).float()

    def broken_weights(self) -> str | None:
        """Name of the first parameter with a value that is not finite, if any."""
        for name, parameter in self.module.named_parameters():
            for value in stored_tensors(parameter):
                if not value.is_meta and not value.isfinite().all():  # meta: offloaded
                    return name
        return None

    def rows_of(self, positions: Tensor, first: int = 0) -> Tensor:
        """Rows of a window starting at position `first` that predict the tokens at `positions`.

        A shifted family reads the row before; the window's first position then has only its own
        row to offer (as in the official loops).
        """
        return (positions - self.family.logit_shift - first).clamp_min(0)

    @cached_property
    def codec(self) -> TextCodec:
        """From text to token ids and back.

        Raises
        ------
        SpiffyError
            If the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise SpiffyError(f"{self.name} ships no tokenizer: pass token ids instead of text")
        return TextCodec(self.tokenizer, self.name, {self.mask_token_id, *self.eos_token_ids})

    def encode(self, prompt: Prompt, *, raw: bool = False, system: str | None = None) -> Tensor:
        """Token ids int64 [length] of a prompt.

        Parameters
        ----------
        prompt
            A user's message or a conversation, which the chat template wraps if there is one; or
            token ids, as they are or as a tokenizer returns them (`given_ids`).
        raw
            Text is taken as it is, without template; special tokens that it spells are tokens.
        system
            System message to put in front of the text.

        Raises
        ------
        SpiffyError
            If the prompt is empty or not Unicode, the ids are none of this model, or the checkpoint
            has no tokenizer or a chat template that fails.
        """
        if is_text(prompt):
            return torch.tensor(self.codec.encode(prompt, raw=raw, system=system))
        if system is not None:
            raise SpiffyError("a system message goes with text: this prompt is token ids already")
        return given_ids(prompt, self.vocab_size)

    def decode_text(self, token_ids: list[int]) -> str:
        """Text of an answer, special tokens left out; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.codec.decode(token_ids)


def block_causal_mask(positions: Tensor, block_length: int) -> Tensor:
    """Bool [length, length]: a position sees its own block and the blocks before it."""
    block = positions // block_length
    return block[:, None] >= block[None, :]
