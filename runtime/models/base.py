"""A model of any family, and its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spiffy.runtime.models.attention import Group, Masked, arranged, attention_of
from spiffy.runtime.models.batch import Batch
from spiffy.runtime.models.block_size import is_published, stated_block_size
from spiffy.runtime.models.device import without_cudnn
from spiffy.runtime.models.family import Family
from spiffy.runtime.models.mask import Mask
from spiffy.runtime.models.rotary import install, reach, whole_lengths
from spiffy.runtime.models.stored import stored_tensors
from spiffy.runtime.models.text import Prompt, TextCodec, given_ids, is_text
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import option
from spiffy.schemas.notes import note

_EXPENSIVE = 1 << 24  # parameters of an output head

# Packages whose layers compute what a family's module does in the usual way.
_OWN = frozenset({"torch", "transformers", "spiffy"})


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


@dataclass(frozen=True)
class Compiled:
    """What torch compiled of a model.

    Attributes
    ----------
    transformer
        Takes and gives what the module's own does.
    masked
        Computes attention under masks; None: torch's usual attention does.
    """

    transformer: Callable[..., Any]
    masked: Masked | None = None


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
    compiled
        What torch compiled of it (`compile_transformer`), or None.
    packed_head
        The output head as oneDNN computes with it (`prepack`), or None.
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
        compiled: Compiled | None = None,
        packed_head: nn.Module | None = None,
    ) -> None:
        self.module = module.eval()
        self.family = family
        self.config = config
        self.name = name
        self.revision = revision
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.compiled = compiled
        self.packed_head = packed_head
        self.mask_token_id = int(config["mask_token_id"])
        head: Any = module.lm_head  # whose weight, if quantized, may have any shape
        self.vocab_size = int(getattr(head, "out_features", None) or head.weight.shape[0])
        weight = getattr(head, "weight", None)  # not of a quantized one
        self._empty = weight is not None and weight.is_meta and not hasattr(head, "_hf_hook")
        self._elsewhere: torch.device | None = None
        settings: Any = getattr(module, "config", None)
        self._attention = attention_of(settings) or "sdpa"
        limits = ("max_sequence_length", "max_position_embeddings")
        stated = next((int(config[k]) for k in limits if config.get(k)), None)
        self.max_length = reach(stated, getattr(settings, "rope_parameters", None) or {})
        install(module)
        self.remember()

    @classmethod
    def of(cls, module: nn.Module) -> DiffusionLM | None:
        """The model that `load_model` or `wrap` made of a module, if they did: the last such."""
        facts = cls._known.get(module)
        if facts is None:
            return None
        return cls(module, **{name: fact for name, fact in facts.items() if name != "attention"})

    def replaced(self, **facts: Any) -> DiffusionLM:
        """The same model, for one use, with other facts, such as `eos_token_ids`."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__ | facts)
        other.__dict__.pop("codec", None)  # made of the end tokens
        return other

    def computed_by(
        self, head: Callable[[Tensor], Tensor], device: torch.device | str
    ) -> DiffusionLM:
        """The same model for an engine that runs its forwards (docs/engine.md).

        Parameters
        ----------
        head
            From hidden states [M, hidden] to logits [M, vocab].
        device
            Where both lie.
        """
        return self.replaced(head=head, _elsewhere=torch.device(device))

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
            "compiled": self.compiled,
            "packed_head": self.packed_head,
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
            If a device map has spread the model, or it is compiled or prepacked: what moves its
            parts about, compiled code, and weights in oneDNN's layout cannot be pickled.
        """
        spread = any(hasattr(part, "_hf_hook") for part in self.module.modules())
        if spread or self.compiled is not None or self.is_prepacked:
            how = "prepacked" if self.is_prepacked else "compiled"
            how = "spread by device_map" if spread else how
            raise SpiffyError(
                f"{self.name}: {how}, a model cannot be pickled or copied: load it in the process "
                "that uses it"
            )
        return self.__dict__

    @property
    def device(self) -> torch.device:
        """Where token ids are expected."""
        if self._elsewhere is not None:
            return self._elsewhere
        head: Any = self.module.lm_head
        weight = getattr(head, "weight", None)
        if weight is None:  # quantized, in buffers
            weight = next(iter((*head.parameters(), *head.buffers())))
        if (
            weight.is_meta and not self._empty
        ):  # offloaded by a device map: accelerate brings it there and back
            return torch.device(head._hf_hook.execution_device)
        return weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights, or of those that are not quantized."""
        head: Any = self.module.lm_head
        own = getattr(head, "weight", None)
        for weight in chain(() if own is None else (own,), self.module.parameters()):
            if weight.is_floating_point() and weight.element_size() > 1:
                return weight.dtype  # type: ignore[no-any-return]
        return torch.get_default_dtype()

    @cached_property
    def arithmetic(self) -> str:
        """The dtype, and what computes that is not torch's or transformers' own.

        Such as "float32", or "bfloat16, torchao.Int8Tensor", and whether torch compiled it;
        recorded decodes go on with the same.
        """
        layers = {type(part) for part in self.module.modules()}
        weights = {type(value) for value in self.module.parameters()} - {nn.Parameter, Tensor}
        foreign = weights | {kind for kind in layers if _package(kind) not in _OWN}
        names = sorted(f"{_package(kind)}.{kind.__name__}" for kind in foreign)
        attention = [] if self._attention == "sdpa" else [self._attention]
        compiled = [] if self.compiled is None else ["compiled"]
        return ", ".join([str(self.dtype).removeprefix("torch."), *attention, *names, *compiled])

    @property
    def kernels(self) -> str:
        """The arithmetic, and whether weights are prepacked for it: costs are remembered by it."""
        return f"{self.arithmetic}, prepacked" if self.is_prepacked else self.arithmetic

    @property
    def is_prepacked(self) -> bool:
        """Whether linear layers keep their weights as oneDNN computes with them."""
        return any(weight.is_mkldnn for weight in self.module.parameters())

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
                f"it was trained with, and {family.name} comes in several: give "
                f"{option('block_length')}"
            )
        note(
            f"{self.name} states no block size: {family.block_size} is taken, as published "
            f"{family.name} checkpoints have; {option('block_length')} gives "
            "another"
        )
        return family.block_size

    @torch.inference_mode()
    def hidden_states(
        self, ids: Tensor, positions: Tensor, groups: Sequence[Group | Batch]
    ) -> Tensor:
        """One forward of the transformer, without the output head.

        Parameters
        ----------
        ids, positions
            int64 [query]: tokens of all rows, one row after the other, and their rotary positions.
        groups
            Which of them are a row, and what each row attends to.

        Returns
        -------
        hidden states [query, hidden]

        Raises
        ------
        SpiffyError
            If the module does not compute its attention as transformers' modules do, where any
            other may be registered; or if the model was loaded without weights.
        """
        if self._empty:
            raise SpiffyError(
                f"{self.name} was loaded without weights (device meta), for an engine that has them"
            )
        module: Any = self.module
        # Has four dimensions, so that transformers makes no mask of it; nothing reads it.
        unread = ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
        # Compiled code takes one position for a special case, which it was not compiled for.
        compiled = self.compiled if len(ids) > 1 else None
        transformer, masked = module.model, None
        if compiled is not None:
            transformer, masked = compiled.transformer, compiled.masked
        with (
            arranged(module.config, groups, masked) as arrangement,
            whole_lengths(groups),
            without_cudnn(ids.device),
        ):
            hidden = transformer(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=unread,
                use_cache=False,
            ).last_hidden_state
        layers = module.config.num_hidden_layers
        if arrangement.layers != layers:
            raise SpiffyError(
                f"{self.name}: {arrangement.layers} of its {layers} layers took their attention "
                "from transformers' register while a forward ran: drafts need all to, and that "
                "nobody sets another attention meanwhile"
            )
        # A device map may put the last layers elsewhere than a head that is tied to the embedding.
        return hidden[0].to(self.device)  # type: ignore[no-any-return]

    @property
    def head_is_expensive(self) -> bool:
        """Whether reading the output head takes long, beside multiplying some rows with it."""
        width: int = self.module.config.hidden_size  # type: ignore[union-attr, assignment]
        return self.vocab_size * width >= _EXPENSIVE

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., hidden], in the model's dtype."""
        head = self.module.lm_head if self.packed_head is None else self.packed_head
        return head(hidden)  # type: ignore[operator, no-any-return]

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
        quantized).
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
        for given, value in (("block_length", block_length), ("first_block", first_block)):
            if value is not None and not self.family.block_causal:
                raise SpiffyError(f"{self.family.name} attends everywhere: it takes no {given}")
        ids = input_ids.to(self.device)
        rows, length = ids.shape
        positions = torch.arange(length, device=self.device)
        mask = None
        if self.family.block_causal:
            size = block_length or self.default_block_length
            first = size if first_block is None else first_block
            if not 1 <= first <= size:
                raise SpiffyError(f"first_block {first} must be 1 to block_length {size}")
            mask = Mask.of(block_causal_mask(positions + size - first, size))
        group = Group(rows, length, mask, whole=length)
        hidden = self.hidden_states(ids.flatten(), positions.repeat(rows), [group])
        hidden = hidden.view(rows, length, -1)
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
            return torch.tensor(self.codec.encode(prompt, raw=raw, system=system), device="cpu")
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
