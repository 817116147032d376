"""Prompts in files as people have them: JSON Lines, JSON, CSV, TSV, Parquet."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import option, said
from spiffy.schemas.io import is_unicode

Text = str | list[dict[str, Any]]  # a user's message, or a conversation
Found = list[tuple[Text, Mapping[str, Any]]]  # prompts and their records

#: Fields that hold a prompt, those first that say so most clearly.
FIELDS = (
    "prompt",
    "question",
    "messages",
    "conversations",
    "conversation",
    "instruction",
    "problem",
    "query",
    "input",
    "text",
)
_AMENDED_BY = ("input", "context")  # what an instruction may be about
_TABLES = {".csv": ",\t;", ".tsv": "\t,;"}  # separators, the likeliest first
_LINES = (".jsonl", ".ndjson", ".json")
_PACKED = (".gz", ".bz2", ".xz")
_SUFFIXES = (*_LINES, *_TABLES, ".parquet", ".txt", *_PACKED)
_AS_PYTHON = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)'\s*:")
_SENTENCE = re.compile(r"[?!:]|\.(\s|$)")
_WORDS = 4  # of a column's name
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # beside role and content
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

_COMPRESSED = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
_NO_PROMPTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file: git lfs pull",
    b"PK\x03\x04": "an archive or a spreadsheet: unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it",
    b"ARROW1": "an Arrow file: save it as Parquet",
}

_Records = Iterable[tuple[str, Any]]  # where each stands, and what it is: an error if it is broken


def is_file_name(name: str) -> bool:
    """Whether a name ends as those of prompt files do."""
    return Path(name).suffix.lower() in _SUFFIXES


def read_prompts(name: str, field: str | None, skipped: list[str] | None = None) -> Found:
    """Prompts and records of a file, in order.

    Parameters
    ----------
    name
        What the file holds is told by the end of its name, else by how it begins.
    field
        Field that holds the prompt; None: the first of `FIELDS` that a record has.
    skipped
        Takes what is wrong with broken lines; None: the first one is an error.

    Raises
    ------
    SpiffyError
        If the file cannot be read, or a line is broken: it is named by number. Also with `skipped`,
        where nothing tells where the next one begins.
    """
    content, suffix = _unpacked(name)
    for mark, what in _NO_PROMPTS.items():
        if content.startswith(mark):
            raise SpiffyError(f"{name}: is {what}")
    try:
        records = _records(content, suffix, field)
    except SpiffyError as problem:
        raise SpiffyError(f"{name}: {problem}") from None
    return prompts_of(name, records, field, skipped)


def _unpacked(name: str) -> tuple[bytes, str]:
    """What a file holds, and the end of its name that tells what that is."""
    path = Path(name)
    if path.is_dir():
        raise SpiffyError(f"{name}: is a folder, give a file in it")
    if not (path.is_file() or path.is_fifo()):
        raise SpiffyError(f"{name}: is no file that can be read to its end")
    try:
        content = path.read_bytes()
        for mark, decompress in _COMPRESSED.items():
            if content.startswith(mark):
                packed = path.suffix.lower() in _PACKED
                inner = path.with_suffix("") if packed else path
                return decompress(content), inner.suffix.lower()
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise SpiffyError(f"{name}: cannot be read ({error})") from None
    return content, path.suffix.lower()


def _records(content: bytes, suffix: str, field: str | None) -> _Records:
    if content.startswith(b"PAR1") or suffix == ".parquet":
        return _parquet(content)
    content = _utf8(content)
    if suffix in _TABLES:
        text = content.decode("utf-8", "surrogateescape")
        named = _separator(text, field, _TABLES[suffix])
        return _table(text, named or _TABLES[suffix][0], field)
    begins = content.lstrip()[:1]
    if suffix in _LINES or begins in (b"", b"{", b"[", b'"'):
        return _json(content)
    text = content.decode("utf-8", "surrogateescape")
    separator = None
    if suffix != ".txt" or field is not None:  # texts begin with any word, of columns too
        separator = _separator(text, field, _TABLES[".csv"], guessed=True)
    if separator is None:
        _check_utf8(content)
        known, table = "a table with a known column", ""
        if suffix == ".txt":
            known = "by its name a table"
            table = "; a table is to be called .csv, or its column named (--field)"
        raise SpiffyError(
            f"is neither JSON nor {known}: give plain text to --prompt or to standard input{table}"
        )
    return _table(text, separator, field)


def prompts_of(name: str, records: _Records, field: str | None, skipped: list[str] | None) -> Found:
    """Prompts of all records that have one; what is wrong with others goes into `skipped`."""
    found: Found = []
    for where, record in records:
        try:
            if isinstance(record, SpiffyError):
                raise record
            kept = record if isinstance(record, Mapping) else {}
            found.append((prompt_of(record, field), kept))
        except SpiffyError as problem:
            if skipped is None or isinstance(problem, _LostError):
                raise SpiffyError(f"{name}, {where}: {problem}") from None
            skipped.append(f"{where}: {problem}")
    return found


def prompt_of(record: Any, field: str | None) -> Text:
    """The prompt of a record: an object with one of `FIELDS`, plain text, or a list of messages.

    Raises
    ------
    SpiffyError
        If there is none, or it is blank, malformed or not Unicode.
    """
    if isinstance(record, Mapping):
        if isinstance(record, _Doubled):
            record.check({*FIELDS, *_AMENDED_BY} if field is None else {field})
        value = _value(record, field)
    elif field is None:
        value = record
    else:
        raise SpiffyError(f"is no object with a field {field!r}")
    if isinstance(value, str):
        value = _spelled_out(value)
    if _is_messages(value):
        return _question(value)
    if not isinstance(value, str) or not value.strip():
        fields = repr(field) if field else " or ".join(map(repr, FIELDS))
        has = f"; it has {', '.join(map(repr, record))}" if isinstance(record, Mapping) else ""
        hint = "" if field else f"; {option('field')} names another"
        raise SpiffyError(f"needs a non-empty text field {fields}{hint}{has}")
    _check_unicode(value)
    return value


def question(text: Text) -> str:
    """What is to be answered, of a conversation its last message."""
    return text if isinstance(text, str) else str(text[-1]["content"])


def _value(record: Mapping[str, Any], field: str | None) -> Any:
    if field is not None:
        return record.get(field)
    known = {str(name).lower(): value for name, value in record.items()} | dict(record)
    held = {name: known.get(name) for name in FIELDS}
    name = next((f for f, v in held.items() if isinstance(v, str) or _is_messages(v)), "")
    value = held.get(name)
    if name == "instruction" and isinstance(value, str):
        about = [known.get(other) for other in _AMENDED_BY]
        return "\n\n".join([value, *(a for a in about if isinstance(a, str) and a.strip())])
    return value


def _spelled_out(text: str) -> Any:
    """The conversation that a text is in JSON, as tables hold one; else the text itself."""
    if not text.lstrip().startswith("["):
        return text
    if _AS_PYTHON.match(text):
        raise SpiffyError("holds a conversation as Python writes it: save it as JSON")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if _is_messages(value) else text


def _is_messages(value: Any) -> bool:
    listed = isinstance(value, list | tuple) and bool(value)
    return listed and all(isinstance(part, Mapping) and _role(part) is not None for part in value)


def _role(message: Mapping[str, Any]) -> str | None:
    role = message.get("role", message.get("from"))
    return _ROLES.get(role, role) if isinstance(role, str) else None


def _question(turns: Iterable[Mapping[str, Any]]) -> Text:
    """A conversation up to what is to be answered: data sets for training hold the answer too."""
    messages = [_message(turn) for turn in turns]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise SpiffyError("its messages hold nothing to answer: all are the assistant's")
    last = messages[-1]["content"]
    if not last or not last.strip():
        raise SpiffyError("its last message is empty")
    alone = len(messages) == 1 and messages[0] == {"role": "user", "content": last}
    return str(last) if alone else messages


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it; tables hold every key in every row, often empty."""
    if isinstance(turn, _Doubled):
        turn.check({"content", "value", "role", "from", *_KEPT})
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list | tuple):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        known = [text for text in texts if isinstance(text, str)]
        content = "".join(known) if known and len(known) == len(texts) else 0
    if isinstance(content, str):
        _check_unicode(content)
    elif content is not None:  # or a call of a tool
        raise SpiffyError("holds a message whose content is no text")
    kept = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    try:
        _check_unicode(json.dumps(kept, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise SpiffyError("holds a message with values that are not JSON") from None
    return {"role": _role(turn), "content": content, **kept}


def _check_unicode(text: str) -> None:
    if not is_unicode(text):
        raise SpiffyError("holds half a character (lone surrogate)")


def _utf8(content: bytes) -> bytes:
    """The same text in UTF-8: Windows writes UTF-16, and marks of the byte order."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
    marks |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    for mark, encoding in marks.items():
        if content.startswith(mark):
            try:
                return content.decode(encoding).encode()
            except UnicodeError:
                raise SpiffyError(f"not {encoding.upper()} text, as which it begins") from None
    return content.removeprefix(codecs.BOM_UTF8)


def _json(content: bytes) -> _Records:
    """Records of JSON Lines, or of one JSON value: an array of them, a conversation, a record."""
    text = content.lstrip()
    if text[:1] in (b"[", b"{"):
        blank = content.count(b"\n", 0, len(content) - len(text))
        whole = _parsed(content)
        listed = isinstance(whole, list) and bool(whole)
        if listed and not _is_messages(whole):
            return [(f"record {number}", record) for number, record in enumerate(whole, start=1)]
        if isinstance(whole, Mapping) or _is_messages(whole):
            return [(f"line {blank + 1}", whole)]
        several_lines = text.partition(b"\n")[0].strip() in (b"[", b"{", b"[{")
        if isinstance(whole, _NotJsonError) and several_lines:
            return [(f"line {whole.line}", whole)]
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return (
        (f"line {number}", _parsed(line))
        for number, line in enumerate(lines, start=1)
        if line.removeprefix(codecs.BOM_UTF8).strip()
    )


class _Doubled(dict[str, Any]):
    """An object in which keys stand twice: of those one is lost, which matters if it is read."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self._counts = Counter(key for key, _ in pairs)

    def check(self, read: Collection[str]) -> None:
        """Refuse it if one of the keys that are read stands twice."""
        for key, count in self._counts.items():
            if count > 1 and key in read:
                raise SpiffyError(f"key {key!r} occurs twice")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    return content if len(content) == len(pairs) else _Doubled(pairs)


class _LostError(SpiffyError):
    """What leaves unknown where the next record begins."""


class _NotJsonError(SpiffyError):
    """What is no JSON, and the line on which that shows."""

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


def _parsed(content: bytes) -> Any:
    """The value of a JSON text, or what is wrong with it."""
    try:
        # A mark of the byte order stands within files that were joined, too.
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _NotJsonError("not UTF-8 text", line)
    except json.JSONDecodeError as error:
        return _NotJsonError(f"not valid JSON ({error})", error.lineno)
    except (ValueError, RecursionError) as error:
        return _NotJsonError(f"not valid JSON ({error})")


def _check_utf8(content: bytes) -> None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpiffyError(f"line {line}: not UTF-8 text") from None


def _separator(text: str, field: str | None, separators: str, guessed: bool = False) -> str | None:
    """What separates the names in the first row of a table, if one is the prompt's.

    Spreadsheets write semicolons where commas are decimal. Where it is `guessed` that this is a
    table all have to be such as columns have.
    """
    for separator in separators:
        names = _names(next(_rows(text, separator), ("", []))[1])
        if field in names:
            return separator
        likely = not guessed or all(map(_is_name, names))
        if field is None and likely and any(name.lower() in FIELDS for name in names):
            return separator
    return None


def _is_name(cell: str) -> bool:
    """Whether a column may be called so, and it is no part of a sentence."""
    return len(cell.split()) <= _WORDS and not _SENTENCE.search(cell)


def _names(cells: list[str] | SpiffyError) -> list[str]:
    return [] if isinstance(cells, SpiffyError) else [cell.strip() for cell in cells]


def _table(text: str, separator: str, field: str | None) -> _Records:
    """Records of a table in text; its first row names the columns."""
    rows = _rows(text, separator)
    where, first = next(rows, ("", []))
    if isinstance(first, SpiffyError):
        return [(where, first)]
    twice = [name for name, times in Counter(_names(first)).items() if times > 1]
    if asked := [name for name in twice if name == field or name.lower() in FIELDS]:
        return [(where, _LostError(f"names the column {asked[0]!r} twice"))]
    return ((where, _by_name(_names(first), cells)) for where, cells in rows)


csv.field_size_limit(1 << 30)  # what a cell holds is bounded by what the file does


def _rows(text: str, separator: str) -> Iterator[tuple[str, list[str] | SpiffyError]]:
    """Rows of a table and the lines on which they start; what is wrong ends it."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                whole = is_unicode("".join(cells))  # bytes that are none stand as surrogates
                yield f"line {start}", cells if whole else SpiffyError("not UTF-8 text")
            start = reader.line_num + 1
    except csv.Error as error:
        yield f"line {start}", _LostError(f"not valid CSV ({error})")


def _by_name(names: list[str], cells: list[str] | SpiffyError) -> Any:
    if isinstance(cells, SpiffyError):
        return cells
    if len(cells) > len(names):
        return SpiffyError("has more cells than the first row has names: quote text with commas")
    return dict(zip(names, cells, strict=False))  # cells may be missing at the end


def _parquet(content: bytes) -> _Records:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise SpiffyError("Parquet needs the package datasets: pip install datasets") from None
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        reason = said(error)
        raise SpiffyError(f"not a Parquet file that can be read ({reason})") from None
    return [(f"record {number}", row) for number, row in enumerate(rows, start=1)]
