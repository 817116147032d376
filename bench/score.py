"""Whether an answer is right, where a dataset says what is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from spiffy.calib.synthetic import final_answer
from spiffy.schemas import SpiffyError

_BYTES = 1 << 30

# Runs before the program: limits that it cannot lift. Files it writes land in a scratch folder.
_LIMITS = f"""import resource
resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
"""
# As a module, so that what is for scripts does not run; one that exits has not come to its tests.
_RUN = """try:
    exec({!r}, {{"__name__": "answer"}})
except SystemExit:
    raise RuntimeError
"""


def score(text: str, record: Mapping[str, Any], execute_code: bool = False) -> bool | None:
    """Judge an answer by its prompt's record; None if it cannot be judged.

    GSM8K's format (`synthetic` has it too): the number after the last "####" is compared. HumanEval
    (`test` and `entry_point`): the tests are run, with `execute_code` only.
    """
    reference = record.get("answer")
    if isinstance(reference, str) and (expected := final_answer(reference)) is not None:
        return same_number(stated_answer(text), expected)
    if execute_code and has_tests(record):
        return passes(program(text, record))
    return None


def has_tests(record: Mapping[str, Any]) -> bool:
    """Whether a prompt's record has tests to run, as HumanEval's have."""
    return all(isinstance(record.get(key), str) for key in ("prompt", "test", "entry_point"))


def stated_answer(text: str) -> str | None:
    """What an answer ends in: after "####", else its last number."""
    if (found := final_answer(text)) is not None:
        return found
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1] if numbers else None


def same_number(ours: str | None, expected: str) -> bool:
    """Whether two numbers as text are equal, whatever their commas, units and zeros."""
    if ours is None:
        return False
    return _number(ours) == _number(expected)


def _number(text: str) -> float | str:
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[0].replace(",", "")) if found else text.strip()


def program(text: str, record: Mapping[str, Any]) -> str:
    """A HumanEval program: the answer's code, behind as much of the prompt as it lacks.

    That is all of it, or what stands before the function: imports, and functions that it calls.
    """
    entry = record["entry_point"]
    whole = re.compile(rf"^def {re.escape(entry)}\b", re.MULTILINE)
    before, fence, behind = text.partition("```")
    if fence and before.strip() and "```" not in behind and not whole.search(behind):
        text = before  # a fence that the prompt opened, if anybody did
    fenced = re.search(r"```[^\n`]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    code = fenced[1] if fenced else text
    prompt, function = record["prompt"], whole.search(code)
    if function is None:
        code = prompt + code
    else:
        if fenced is None:  # there may be prose before it
            imports = re.findall(r"^(?:import|from)\s.*\n", code[: function.start()], re.MULTILINE)
            code = "".join(imports) + code[function.start() :]
        given = whole.search(prompt)
        code = prompt[: given.start() if given else 0] + code
    return f"{code}\n\n{record['test']}\n\ncheck({entry})\n"


def passes(source: str, seconds: float = 10) -> bool | None:
    """Run a program in a process of its own, with limits of time and memory.

    None if this system cannot start one now, which says nothing about the program.

    That stops accidents, not attacks: run answers of a model that you do not trust in a sandbox.

    Raises
    ------
    SpiffyError
        If this system has no such limits.
    """
    if importlib.util.find_spec("resource") is None:
        raise SpiffyError("running answers needs POSIX resource limits, which this system lacks")
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-"],  # on standard input: arguments may not be that long
                cwd=folder,
                env={},
                input=f"{_LIMITS}{_RUN.format(source)}".encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        except OSError:  # no process, no memory for one
            return None
    return done.returncode == 0
