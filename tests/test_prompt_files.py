"""Prompt files as people have them: what is in them is read, and what is wrong is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from spiffy.calib import prompt_files, prompts
from spiffy.calib.prompts import load_prompts, prompt_digest
from spiffy.schemas import SpiffyError

ONE, TWO = "Tom has 3 apples, how many?", "caf\u00e9 \U0001f34e\u2028two"
LINES = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in (ONE, TWO))
ARRAY = json.dumps([{"prompt": ONE}, {"prompt": TWO}], indent=2)
TABLE = f'id,prompt\n1,"{ONE}"\n\n2,{TWO}\n'

ENCODINGS: dict[str, tuple[str, bytes]] = {
    "lines": ("p.jsonl", LINES.encode()),
    "no suffix": ("p", LINES.encode()),
    "byte-order mark": ("p.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "a mark in every line": ("p.jsonl", LINES.replace("{", "\ufeff{").encode()),
    "windows": ("p.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
    "old mac": ("p.jsonl", LINES.replace("\n", "\r").encode()),
    "utf-16": ("p.jsonl", LINES.encode("utf-16")),
    "big-endian": ("p.jsonl", "\ufeff".encode("utf-16-be") + LINES.encode("utf-16-be")),
    "utf-32": ("p.jsonl", LINES.encode("utf-32")),
    "blank lines": ("p.jsonl", LINES.replace("\n", "\n \t\n\n").encode()),
    "gzip": ("p.jsonl.gz", gzip.compress(LINES.encode())),
    "gzip by another name": ("p.jsonl", gzip.compress(LINES.encode())),
    "array": ("p.json", ARRAY.encode()),
    "array in one line": ("p.jsonl", json.dumps(json.loads(ARRAY)).encode()),
    "array with a mark": ("p.json", b"\xef\xbb\xbf" + ARRAY.replace("\n", "\r\n").encode()),
    "lines called json": ("p.json", LINES.encode()),
    "texts": ("p.jsonl", f"{json.dumps(ONE)}\n{json.dumps(TWO)}\n".encode()),
    "array of texts": ("p.json", json.dumps([ONE, TWO]).encode()),
    "csv": ("p.csv", TABLE.encode()),
    "csv of windows": ("p.CSV", b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode()),
    "semicolons": ("p.csv", f"id;prompt\n1;{ONE}\n2;{TWO}\n".encode()),
    "tabs": ("p.tsv", f"prompt\tid\n{ONE}\t1\n{TWO}\t2\n".encode()),
    "one column": ("p.tsv", f"prompt\n{ONE}\n{TWO}\n".encode()),
    "capitals": ("p.csv", f'Id,Prompt\n1,"{ONE}"\n2,{TWO}\n'.encode()),
    "bzip2": ("p.jsonl.bz2", bz2.compress(LINES.encode())),
    "xz": ("p.json.xz", lzma.compress(ARRAY.encode())),
    "csv without suffix": ("p", TABLE.encode()),
    "csv with gzip": ("p.csv.gz", gzip.compress(TABLE.encode())),
    "quoted csv with gzip by another name": (
        "p.csv",
        gzip.compress(TABLE.replace("id,prompt", '"id","prompt"').encode()),
    ),
    "array of conversations": (
        "p.json",
        json.dumps([[{"role": "user", "content": text}] for text in (ONE, TWO)], indent=1).encode(),
    ),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_a_file_is_read_however_it_is_written(tmp_path: Path, case: str) -> None:
    name, content = ENCODINGS[case]
    (tmp_path / name).write_bytes(content)
    found = load_prompts(str(tmp_path / name))
    assert found.texts == (ONE, TWO)
    assert found.dataset == name


def test_parquet_is_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": ONE, "name": None}]
    rows = [{"prompt": None, "messages": turns}, {"prompt": TWO, "messages": None}]
    path = tmp_path / "p.parquet"
    Dataset.from_list(rows).to_parquet(path)
    assert load_prompts(str(path)).texts == (ONE, TWO)


SYSTEM = {"role": "system", "content": "Answer briefly."}
USER, ANSWER = {"role": "user", "content": ONE}, {"role": "assistant", "content": "3"}
RECORDS: dict[str, tuple[Any, Any]] = {
    "gsm8k": ({"question": ONE, "answer": "#### 3"}, ONE),
    "math500": ({"problem": ONE, "solution": "3", "answer": "3", "level": 1}, ONE),
    "mbpp": ({"task_id": 1, "text": ONE, "code": "x", "test_list": ["assert 1"]}, ONE),
    "mbpp sanitized": ({"source_file": "x", "prompt": ONE, "code": "x"}, ONE),
    "humaneval": ({"task_id": "HumanEval/0", "prompt": ONE, "test": "x"}, ONE),
    "alpaca": ({"instruction": ONE, "input": "", "output": "3"}, ONE),
    "alpaca with input": ({"instruction": ONE, "input": "apples"}, f"{ONE}\n\napples"),
    "dolly": ({"instruction": ONE, "context": "apples"}, f"{ONE}\n\napples"),
    "null": ({"prompt": None, "question": ONE}, ONE),
    "ids": ({"prompt": [1, 2], "text": ONE}, ONE),
    "messages": ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
    "one message": ({"messages": [USER]}, ONE),
    "messages as prompt": ({"prompt": [USER]}, ONE),
    "answered": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER]),
    "second turn": ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": ONE}, {"from": "gpt", "value": "3"}]},
        ONE,
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ONE}]}]},
        ONE,
    ),
    "bare conversation": ([SYSTEM, USER], [SYSTEM, USER]),
}


@pytest.mark.parametrize("case", RECORDS)
@pytest.mark.parametrize("lines", [1, 2])
def test_the_prompt_of_a_record_is_found(tmp_path: Path, case: str, lines: int) -> None:
    record, prompt = RECORDS[case]
    path = tmp_path / "p.jsonl"
    path.write_text((json.dumps(record) + "\n") * lines)
    found = load_prompts(str(path))
    assert found.texts == (prompt,) * lines
    assert found.digests == (prompt_digest(prompt),)


def test_a_field_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "no", "goal": ONE, "instruction": "i", "input": "j"}))
    assert load_prompts(str(path), field="goal").texts == (ONE,)
    assert load_prompts(str(path), field="instruction").texts == ("i",)
    (tmp_path / "p.csv").write_text("prompt;goal, short\nno;yes\n")
    assert load_prompts(str(tmp_path / "p.csv"), field="goal, short").texts == ("yes",)


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "line": ("p.jsonl", LINES.encode() + b'{"prompt"\n', "line 3: not valid JSON"),
    "first line": ("p.jsonl", b'{"prompt\n' + LINES.encode(), "line 1: not valid JSON"),
    "blank lines count": ("p.jsonl", b'\n\r\n{"prompt": 3}', "line 3: needs a non-empty text"),
    "array": ("p.json", b'[\n{"prompt": "a"},\n{"prompt" "b"}\n]', "line 3: not valid JSON"),
    "record": ("p.json", b'[{"prompt": "a"}, {"prompt": ""}]', "record 2: needs a non-empty"),
    "latin-1": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', "line 2: not UTF-8 text"),
    "half utf-16": ("p.jsonl", b"\xff\xfea", "not UTF-16 text"),
    "other fields": ("p.jsonl", b'{"goal": "a"}', "it has 'goal'"),
    "only answers": ("p.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 1"),
    "picture": ("p.jsonl", b'{"messages": [{"role": "user", "content": [{"url": "a"}]}]}', "no te"),
    "blank turn": ("p.jsonl", b'{"messages": [{"role": "user", "content": " "}]}', "is empty"),
    "csv latin-1": ("p.csv", b"prompt\na\ncaf\xe9", "line 3: not UTF-8 text"),
    "csv commas": ("p.csv", b"prompt\na\nb, c\n", "line 3: has more cells"),
    "csv without": (
        "p.csv",
        b"a,b\n1,2\n",
        "line 2: needs a non-empty text field.*it has 'a', 'b'",
    ),
    "csv quotes": ("p.csv", b'prompt\na\n"b\n', "line 3: not valid CSV"),
    "array of nothing": ("p.json", b"[null]", "record 1: needs a non-empty"),
    "python's conversation": (
        "p.csv",
        b"messages\n\"[{'role': 'user', 'content': 'a'}]\"\n",
        "line 2: holds a conversation as Python writes it",
    ),
    "parquet": ("p.parquet", b"PAR1....", "not a Parquet file that can be read"),
    "gzip": ("p.jsonl.gz", b"\x1f\x8b....", "cannot be read"),
    "broken xz": ("p.jsonl.xz", lzma.compress(b"{}")[:9], "cannot be read"),
    "plain text": ("p.txt", b"Tom has 3 apples.\n", "give plain text to --prompt"),
    "text with a word of tables": (
        "p.txt",
        b"Text, please: what is 2+2?\nAnd 3+3?\n",
        "neither JSON nor by its name a table: give plain text to --prompt.*is to be called .csv",
    ),
    "the same by no name": ("p", b"Text, please: what is 2+2?\nAnd 3+3?\n", "known column"),
    "a sentence before it": ("p", b"Is this it?,text\nAnd 3+3?,x\n", "known column"),
    "a key twice": (
        "p.jsonl",
        b'{"prompt": "a", "prompt": "b"}',
        "line 1: .*'prompt' occurs twice",
    ),
    "a column twice": ("p.csv", b"id,prompt,prompt\n1,a,b\n", "line 1: .*'prompt' twice"),
    "pointer": ("p.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "spreadsheet": ("p.csv", b"PK\x03\x04....", "save it as CSV"),
    "empty": ("p.csv", b"", "holds no prompts"),
    "only names": ("p.csv", b"prompt\n", "holds no prompts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path: Path, case: str) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpiffyError, match=message) as caught:
        load_prompts(str(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert str(caught.value).isprintable()


def test_a_broken_first_line_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "half\n' + LINES)
    found = load_prompts(str(tmp_path / "p.jsonl"), skip_bad=True)
    assert (found.texts, found.skipped) == ((ONE, TWO), 1)


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
def test_a_conversation_may_be_json_in_a_cell(tmp_path: Path, name: str) -> None:
    turns = [{"role": "user", "content": ONE}, {"role": "assistant", "content": "3"}]
    quoted = json.dumps(turns).replace('"', '""')
    table = f'id,messages\n1,"{quoted}"\n'
    lines = json.dumps({"messages": json.dumps(turns)})
    (tmp_path / name).write_text(table if name == "p.csv" else lines)
    assert load_prompts(str(tmp_path / name)).texts == (ONE,)
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "[1, 2] are the numbers of what?"}))
    assert load_prompts(str(tmp_path / "q.jsonl")).texts == ("[1, 2] are the numbers of what?",)


def test_rows_behind_a_broken_quote_are_not_left_out_unsaid(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('id,prompt\n1,a\n2,"He said "hi" to me"\n3,b\n4,c\n')
    with pytest.raises(SpiffyError, match="line 3: not valid CSV"):
        load_prompts(str(tmp_path / "p.csv"), skip_bad=True)
    (tmp_path / "p.csv").write_text("id,prompt\n1,a\n2,b,c\n3,d\n")  # it ends where its line does
    found = load_prompts(str(tmp_path / "p.csv"), skip_bad=True)
    assert (found.texts, found.skipped) == (("a", "d"), 1)


def test_a_row_that_is_not_utf8_is_left_out_like_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"prompt\na\ncaf\xe9\n\xc3\xa9t\xc3\xa9\n")
    found = load_prompts(str(tmp_path / "p.csv"), skip_bad=True)
    assert (found.texts, found.skipped) == (("a", "\u00e9t\u00e9"), 1)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f"context,prompt\n{'x' * 200_000},a\n")
    assert load_prompts(str(tmp_path / "p.csv")).texts == ("a",)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpiffyError, match="is a folder"):
        load_prompts(str(tmp_path))
    with pytest.raises(SpiffyError, match="no file that can be read"):
        load_prompts("/dev/null")
    with pytest.raises(SpiffyError, match="synthetic prompts have none"):
        load_prompts("synthetic", field="text")


def test_datasets_of_the_hub_are_named_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, str]]:
            asked.append((path, name, split))
            return [{"question": ONE, "text": TWO}]

    monkeypatch.setattr(prompts, "import_module", lambda name: Datasets)
    assert load_prompts("gsm8k").texts == (ONE,)
    assert load_prompts("gsm8k", field="text").texts == (TWO,)
    for name in ("owner/set", "owner/set:test", "owner/set/main:test"):
        assert load_prompts(name).dataset == name
    assert asked[2:] == [
        ("owner/set", None, "train"),
        ("owner/set", None, "test"),
        ("owner/set", "main", "test"),
    ]
    with pytest.raises(SpiffyError, match="no such file"):
        load_prompts("folder/p.jsonl")


def test_a_dataset_of_the_hub_is_drawn_from_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = [{"question": f"question {k}"} for k in range(40)]
    records[7] = {"question": ""}  # drawn by no seed below
    read: list[int] = []

    class Rows:
        def __init__(self, numbers: list[int]) -> None:
            self.numbers = numbers

        def __len__(self) -> int:
            return len(self.numbers)

        def __iter__(self) -> Iterator[dict[str, str]]:
            for number in self.numbers:
                read.append(number)
                yield records[number]

        def select(self, numbers: list[int]) -> Rows:
            return Rows([self.numbers[k] for k in numbers])

    def load(*_: object, **__: object) -> Rows:
        return Rows([*range(40)])

    monkeypatch.setattr(prompts, "import_module", lambda name: SimpleNamespace(load_dataset=load))
    path = tmp_path / "p.jsonl"
    good = [record if record["question"] else {"question": "-"} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in good))
    for seed, split in ((0, "calibration"), (1, "test")):
        read.clear()
        found = load_prompts("owner/set", 5, seed, split)  # type: ignore[arg-type]
        assert found.texts == load_prompts(str(path), 5, seed, split).texts  # type: ignore[arg-type]
        assert len(read) == 5
    with pytest.raises(SpiffyError, match="record 8: needs a non-empty"):
        load_prompts("owner/set", 40)
    skipping = load_prompts("owner/set", 40, skip_bad=True)
    assert (len(skipping.texts), skipping.skipped) == (39, 1)


def test_what_is_nested_too_deeply_is_refused() -> None:
    """As Parquet may hold it, which no reader of JSON has looked at."""
    deep: list[object] = []
    for _ in range(200_000):
        deep = [deep]
    turn = {"role": "user", "content": "x", "tool_calls": deep}
    with pytest.raises(SpiffyError, match="values that are not JSON"):
        prompt_files.prompt_of({"messages": [turn]}, None)


def test_columns_of_other_words_may_stand_twice(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("note,prompt,note\na,b,c\n")
    assert load_prompts(str(tmp_path / "p.csv")).texts == ("b",)


def test_a_dataset_whose_pictures_cannot_be_decoded_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"question": ONE}
        raise ImportError("To support decoding images, please install 'Pillow'.")

    monkeypatch.setattr(prompts, "import_module", lambda name: SimpleNamespace(load_dataset=rows))
    with pytest.raises(SpiffyError, match=r"could not be read: .*Pillow"):
        load_prompts("owner/set")


@pytest.mark.parametrize("value", ["[1e400]", "[NaN]", '"\\ud800"'])
def test_what_a_message_holds_besides_is_json_too(tmp_path: Path, value: str) -> None:
    file = tmp_path / "p.jsonl"
    good = '{"prompt": "one"}\n'
    turn = '{"role": "user", "content": "x", "tool_calls": ' + value + "}"
    file.write_text(good + '{"messages": [' + turn + "]}\n")
    with pytest.raises(SpiffyError, match=r"line 2|:2"):
        load_prompts(str(file), 2)


def test_a_key_that_nobody_reads_may_stand_twice(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(
        '[{"prompt": "one"},\n {"prompt": "two", "meta": {"a": 1, "a": 2}, "id": 1, "id": 2},\n'
        ' {"prompt": "three", "prompt": "four"}]'
    )
    with pytest.raises(SpiffyError, match=r"p.json, record 3: key 'prompt' occurs twice"):
        prompt_files.read_prompts(str(path), None)
    skipped: list[str] = []
    assert [text for text, _ in prompt_files.read_prompts(str(path), None, skipped)] == [
        "one",
        "two",
    ]
    assert len(skipped) == 1
    twice = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    path.write_text(twice)
    with pytest.raises(SpiffyError, match="key 'content' occurs twice"):
        prompt_files.read_prompts(str(path), None)
