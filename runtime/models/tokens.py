"""A checkpoint's tokenizer, its mask token, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from spiffy.runtime.models.source import Source, read_json
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import said
from spiffy.schemas.notes import note

# Tokens that end a turn of a chat: they always end an answer.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
# What end-of-sequence tokens are called, for checkpoints of which no file says.
_USUAL_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


def read_tokenizer(source: Source) -> Any:
    """The checkpoint's tokenizer, or None if it ships none.

    Raises
    ------
    SpiffyError
        If one of its files cannot be read, or it cannot encode text.
    """
    does = "be read"
    try:
        tokenizer = _read_tokenizer(source)
        does = "encode text"
        if tokenizer is not None:
            tokenizer("a")  # what is wrong with settings that transformers only keeps shows here
    except SpiffyError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = said(error)
        raise SpiffyError(f"{source.place}: its tokenizer cannot {does}: {reason}") from None
    return tokenizer


def _read_tokenizer(source: Source) -> Any:
    path = source.optional_file("tokenizer.json")
    if path is None:
        return _qwen_tokenizer(source)
    read_json(path)  # for its errors, which say more than those of tokenizers
    settings = _optional_json(source, "tokenizer_config.json")
    special = _named_tokens(_optional_json(source, "special_tokens_map.json"))
    special |= _named_tokens(settings)
    template = _chat_template(source, settings)
    return PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=template, **special)


def _optional_json(source: Source, name: str) -> dict[str, Any]:
    path = source.optional_file(name)
    return read_json(path) if path else {}


def _named_tokens(content: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their role, such as `eos_token`."""
    return {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in content.items()
        if key.endswith("_token") and value is not None and not key.startswith("add_")
    }


def _chat_template(source: Source, settings: Mapping[str, Any]) -> Any:
    """The chat template; a file of its own goes before what tokenizer_config.json says."""
    path = source.optional_file("chat_template.jinja")
    if path is None:
        return settings.get("chat_template")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SpiffyError(f"{path}: not readable as text ({error})") from None


def _qwen_tokenizer(source: Source) -> Any:
    """Dream's checkpoints ship Qwen2's two files, and a tokenizer class of their own as code."""
    paths = [source.optional_file(name) for name in ("vocab.json", "merges.txt")]
    if paths[0] is None or paths[1] is None:
        return None
    # What transformers reads beside them, in the same folder from here on.
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        _optional_json(source, name)
    source.optional_file("chat_template.jinja")
    return Qwen2Tokenizer.from_pretrained(str(paths[0].parent), local_files_only=True)


def check_tokenizer(name: str, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for.

    Raises
    ------
    SpiffyError
        Names the largest such token, or says that there is none at all.
    """
    if tokenizer is None:
        return
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise SpiffyError(f"{name}: its tokenizer holds no token")
    token, largest = max(vocabulary.items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise SpiffyError(
            f"{name}: the tokenizer is larger than the embedding: {token!r} has id {largest}, and "
            f"there are {rows} rows: it belongs to another model, or tokens were added without "
            "resize_token_embeddings()"
        )


def with_mask_token(
    config: Mapping[str, Any], tokenizer: Any, published: int | None
) -> dict[str, Any]:
    """The config with a mask token: its own, else the tokenizer's, else the published one."""
    found = config.get("mask_token_id")
    if found is None and tokenizer is not None:
        # As SDAR's own generation does; not by `mask_token_id`, which for a token that is none is
        # another one's, the unknown token's.
        found = tokenizer.get_vocab().get(tokenizer.mask_token)
    if found is None:
        found = published
    rest = {key: value for key, value in config.items() if key != "mask_token_id"}
    return rest if found is None else {**rest, "mask_token_id": found}


def generation_config(source: Source) -> dict[str, Any]:
    """Content of `generation_config.json`, empty without one."""
    return _optional_json(source, "generation_config.json")


def end_tokens(
    name: str, holders: Iterable[Mapping[str, Any]], tokenizer: Any, rows: int
) -> frozenset[int]:
    """Every token that ends an answer: those that are stated, and those that end a chat's turn.

    Where none of the `rows` tokens is stated, one by a usual name is taken; a model without any is
    said to have none.

    Parameters
    ----------
    holders
        Contents of configs that may have an `eos_token_id`.

    Raises
    ------
    SpiffyError
        If an entry is no token id.
    """
    ids: set[int] = set()
    for holder in holders:
        value = holder.get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int for token_id in listed):
            raise SpiffyError(
                f"{name}: eos_token_id {value!r} is neither a token id nor a list of them"
            )
        ids.update(token_id for token_id in listed if 0 <= token_id < rows)
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    named = None if tokenizer is None else tokenizer.eos_token
    if named in vocabulary:
        ids.add(vocabulary[named])
    if not ids:
        usual = next((token for token in _USUAL_ENDS if token in vocabulary), None)
        if usual is not None:
            ids.add(vocabulary[usual])
            note(f"{name} names no end-of-sequence token: {usual} is taken as one")
    ids.update(vocabulary[token] for token in _TURN_ENDS if token in vocabulary)
    if not ids:
        note(f"{name} has no end-of-sequence token: every answer fills its whole length")
    return frozenset(ids)
