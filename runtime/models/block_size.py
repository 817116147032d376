"""Which block size a block-causal checkpoint was trained with: its name says, or its config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spiffy.runtime.models.fields import BLOCK_SIZES
from spiffy.runtime.models.published import ALIASES
from spiffy.runtime.models.source import Source
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import option
from spiffy.schemas.notes import note

_NEAR = 2  # folders above a checkpoint whose names count: others are called for other things
# "-b32" at an end or in the middle of a name, and longer words for it; not the "8b" of a size.
_IN_NAME = re.compile(
    r"(?:^|[-_.])(?:b|bd|blk|block[-_]?(?:size|length)?)[-_]?(\d{1,5})(?=$|[-_.])", re.IGNORECASE
)


def is_published(name: str) -> bool:
    """Whether an alias stands for this checkpoint of the hub, so that its facts are known."""
    return Source(ALIASES.get(name, name)).hub_id in ALIASES.values()


def stated_block_size(name: str, config: Mapping[str, Any]) -> int | None:
    """The block size that a checkpoint's name states, else its config, else the folders above it.

    Configs of published variants do not all say what their names do, so the name goes first. The
    folders above may be of anything: they must not contradict the config.

    Raises
    ------
    SpiffyError
        If entries of the config or words of a name contradict each other, or a folder the config.
    """
    in_config = _of_config(name, config)
    own, *above = _names(name)
    in_name = _of_name(name, own)
    if in_name is not None:
        if in_config not in (None, in_name) and not is_published(name):
            note(
                f"{name}: blocks of {in_name}, as its name says, although config.json says "
                f"{in_config}; {option('block_length')} gives another size"
            )
        return in_name
    in_folder = next((size for part in above if (size := _of_folder(name, part))), None)
    if None not in (in_folder, in_config) and in_folder != in_config:
        raise SpiffyError(
            f"{name}: its folder's name says blocks of {in_folder}, config.json {in_config}: give "
            f"{option('block_length')}"
        )
    if in_folder is not None and in_config is None:
        note(
            f"{name}: blocks of {in_folder}, as a folder's name says, because neither its own name "
            f"nor config.json says it; {option('block_length')} gives another size"
        )
    return in_config if in_folder is None else in_folder


def check_block_sizes(config: Mapping[str, Any]) -> None:
    """Refuse entries that are no sizes of blocks."""
    for entry in BLOCK_SIZES:
        value = config.get(entry)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{entry} {value!r} must be a positive integer")


def _of_config(name: str, config: Mapping[str, Any]) -> int | None:
    stated = {entry: int(config[entry]) for entry in BLOCK_SIZES if config.get(entry) is not None}
    if len(set(stated.values())) > 1:
        said = ", ".join(f"{entry} {value}" for entry, value in stated.items())
        raise SpiffyError(
            f"{name}: config.json contradicts itself ({said}): give {option('block_length')}"
        )
    return next(iter(stated.values()), None)


def _of_name(name: str, part: str) -> int | None:
    sizes = {int(found) for found in _IN_NAME.findall(part)} - {0, 1}
    if len(sizes) > 1:
        raise SpiffyError(
            f"{name}: {part!r} names several block sizes: give {option('block_length')}"
        )
    return next(iter(sizes), None)


def _of_folder(name: str, part: str) -> int | None:
    """As `_of_name`, of a folder that may be called for anything: b200 is a GPU."""
    size = _of_name(name, part)
    return size if size is not None and size & (size - 1) == 0 else None


def _names(name: str) -> list[str]:
    """The checkpoint's own name, then those of the folders above it, the nearest first."""
    source = Source(ALIASES.get(name, name))
    if not source.is_directory or name in ALIASES:  # where the package lies says nothing
        return [source.own_name]
    given, real = Path(source.place).absolute(), Path(source.place).resolve()
    above = [*given.parts[: -_NEAR - 2 : -1], *real.parts[: -_NEAR - 2 : -1]]
    return [source.own_name, *above]
