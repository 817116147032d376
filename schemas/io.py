"""Reading and writing JSON: canonical bytes, bounded reads, atomic writes."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from spiffy.schemas.errors import SpiffyError

# A graph of 4096 nodes with all its bigrams is about 3 MB; anything far beyond is not an artifact
# of ours. The worst JSON of this size takes some 450 MB and a few seconds to read and refuse.
MAX_BYTES = 8 * 1024 * 1024
_MAX_KEYS = 1 << 16  # if every entry is wrong, each costs a message before the first is shown


def canonical_json(content: Any) -> str:
    """JSON text that is the same for equal content: sorted keys, no spaces, no NaN."""
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (an `object_pairs_hook`): of a key that stands twice one would be lost."""
    if len(pairs) > _MAX_KEYS:
        raise ValueError(f"an object of {len(pairs)} entries, more than {_MAX_KEYS}")
    content = dict(pairs)
    if len(content) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {repeated!r} occurs twice")
    return content


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises
    ------
    SpiffyError
        If the file is missing, unreadable, larger than `MAX_BYTES`, or not strict JSON.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a device or a pipe may never end
            raise SpiffyError(f"{path}: cannot be read (not a regular file)")
        if status.st_size > MAX_BYTES:
            raise SpiffyError(
                f"{path}: {status.st_size} bytes, more than the {MAX_BYTES} an artifact may be"
            )
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except SpiffyError:
        raise
    except FileNotFoundError:
        raise SpiffyError(f"{path}: no such file") from None
    except OSError as error:
        raise SpiffyError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise SpiffyError(f"{path}: not UTF-8 text") from None
    except RecursionError:
        raise SpiffyError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise SpiffyError(f"{path}: not valid JSON: {error}") from None


def strict_text(path: Path, content: Any) -> str:
    """What a file holds, for strict validation: as canonical JSON.

    Raises
    ------
    SpiffyError
        If it is nested too deeply, or holds a number or characters that there is no JSON for.
    """
    try:
        text = canonical_json(content)
    except RecursionError:
        raise SpiffyError(f"{path}: nested too deeply") from None
    except ValueError:
        raise SpiffyError(f"{path}: holds a number that is not finite") from None
    if not is_unicode(text):
        raise SpiffyError(f"{path}: holds half a character (lone surrogate)")
    return text


def is_unicode(text: str) -> bool:
    """Whether text can be encoded: JSON and shells can smuggle in half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_atomically(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write a whole file (text as UTF-8) or nothing: a sibling temporary file, then a rename.

    What is too much for memory comes in pieces; if making one fails, nothing is written either.

    Raises
    ------
    SpiffyError
        If the folder is missing or not writable.
    """
    temporary = path.parent / f".{path.name}.{token_hex(4)}"
    try:
        # As any new file, so that the umask says who may read it; one that is replaced has said so.
        with temporary.open("xb") as file:
            text = content.encode() if isinstance(content, str) else content
            file.writelines([text] if isinstance(text, bytes) else text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException as error:  # whoever interrupts it wants no half of it either
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise SpiffyError(f"{path}: cannot be written ({error.strerror})") from None
        raise


def check_writable(path: Path) -> None:
    """Fail before hours of work, not after.

    Raises
    ------
    SpiffyError
        If `path` is no regular file, is a link to one, or its folder is missing or not writable.
    """
    if path.is_symlink():  # such as /dev/stdout
        raise SpiffyError(f"{path}: a link, and would be replaced by a file: name what it leads to")
    if path.is_dir():
        raise SpiffyError(f"{path}: is a directory, expected a file name")
    if path.exists() and not path.is_file():
        raise SpiffyError(f"{path}: not a regular file, and would be replaced by one")
    if not path.parent.is_dir():
        raise SpiffyError(f"{path}: folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):  # the file is replaced, not written into
        raise SpiffyError(f"{path}: folder {path.parent} is not writable")


def check_folder(path: Path) -> None:
    """Fail before hours of work where a folder cannot be made later on, or be written into.

    Raises
    ------
    SpiffyError
        If the nearest of `path` and the folders above it that is there is none, or not writable.
    """
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise SpiffyError(f"{path}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SpiffyError(f"{path}: folder {there} is not writable")
