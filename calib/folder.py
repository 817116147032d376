"""Folders that several processes append records to, under one manifest.

A folder holds `manifest.json` and, for every process that ever recorded into it, a file. What they
decode is numbered; a number counts as recorded as soon as any of the files holds its record.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from pydantic import ValidationError

from spiffy.calib.frames import AppendFile, Place, Scan
from spiffy.schemas import SpiffyError
from spiffy.schemas.decoding import first_problem
from spiffy.schemas.io import canonical_json, read_json, strict_text, write_atomically
from spiffy.schemas.workdir import RunManifest

MANIFEST = "manifest.json"
#: May differ: a repository moves on, and weights and fingerprint tell whether the model did.
PROVENANCE = frozenset({"model.revision"})


class Numbered(Protocol):
    """What every record says of itself: its number, and the digest of its manifest."""

    @property
    def number(self) -> int:
        """Of what it records."""
        ...

    @property
    def run(self) -> str:
        """Under which it was recorded."""
        ...


About = TypeVar("About", bound=Numbered)
Run = TypeVar("Run", bound=RunManifest)


class RecordFolder(Generic[Run, About]):
    """A folder that this process records into.

    Parameters
    ----------
    manifest
        What is recorded; only rank 0 writes it, into a new folder. The one that is there stays.
    rank
        Of several processes that share the folder, each has its own file.

    Attributes
    ----------
    places
        Where the record of every number lies, as seen on opening.
    notes
        What is worth telling: dropped and damaged records.

    Raises
    ------
    SpiffyError
        If another process records there, it was made with other settings, or is not writable.
    """

    file: ClassVar[type[AppendFile]]

    def __init__(self, folder: Path, manifest: Run, rank: int = 0) -> None:
        self.folder, self.manifest = folder, manifest
        self.notes: list[str] = []
        if rank == 0:
            self._make()
        self._file = self.file(folder / f"{self.file.records}-{rank:04}.bin", self.scan)
        try:
            if rank == 0 and not (folder / MANIFEST).exists():
                text = canonical_json(manifest.content())
                write_atomically(folder / MANIFEST, text + "\n")
            begun = read_manifest(folder, type(manifest))
            check_same(folder, begun, manifest, PROVENANCE)
            self.manifest = begun
            if self._file.dropped:
                self.notes.append(
                    f"{self._file.path}: dropped an unfinished record at the end "
                    f"({self._file.dropped} bytes)"
                )
            if self._file.damaged:
                self.notes.append(f"{self._file.path}: damaged records are recorded again")
            self.places = self.recorded(folder, self.manifest, self._file)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @staticmethod
    def scan(path: Path) -> Scan[About]:
        """Find the records of one file."""
        raise NotImplementedError

    @classmethod
    def recorded(
        cls, folder: Path, manifest: Run, own: AppendFile | None = None
    ) -> dict[int, Place[About]]:
        """Where the record of every number lies; what `own` has found is not looked for again.

        Raises
        ------
        SpiffyError
            If a file cannot be read, or was recorded with other settings.
        """
        places: dict[int, Place[About]] = {}
        run = manifest.digest()
        for path in sorted(folder.glob(f"{cls.file.records}-*.bin")):
            seen = own is not None and own.path == path
            found: Scan[About] = own.found if own is not None and seen else cls.scan(path)
            for place in found.places:
                if place.about.run != run:
                    raise SpiffyError(
                        f"{path}: recorded with other settings than {folder / MANIFEST} states: "
                        f"give another {cls.file.option}"
                    )
                places.setdefault(place.about.number, place)
        return places

    def _make(self) -> None:
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            others = [file.name for file in folder.iterdir() if not file.name.startswith(".")]
        except OSError as error:
            raise SpiffyError(f"{folder}: cannot be a work directory ({error.strerror})") from None
        if others and MANIFEST not in others and others != [f"{self.file.records}-0000.bin"]:
            raise SpiffyError(
                f"{folder}: not empty and no work directory: give a new one as {self.file.option}"
            )


def read_manifest(folder: Path, kind: type[Run]) -> Run:
    """Read what a folder was made with.

    Raises
    ------
    SpiffyError
        If it is none, or was made by another version.
    """
    if not (folder / MANIFEST).is_file():
        raise SpiffyError(f"{folder}: not a work directory (it has no {MANIFEST})")
    path = folder / MANIFEST
    text = strict_text(path, read_json(path))
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise SpiffyError(
            f"{path}: {first_problem(error)} (made by another version, or damaged: record again "
            "into another folder)"
        ) from None


def check_same(folder: Path, theirs: RunManifest, ours: RunManifest, free: frozenset[str]) -> None:
    """Refuse a folder of other settings; `free` names those that may differ.

    Raises
    ------
    SpiffyError
        Names the first that differs.
    """
    if difference := theirs.difference(ours, free):
        raise SpiffyError(
            f"{folder}: recorded with {difference}: use the same settings, or another directory"
        )


def check_no_record(path: Path) -> None:
    """Refuse to write over what a folder of records consists of.

    Raises
    ------
    SpiffyError
        If that is what `path` is.
    """
    if (path.name == MANIFEST or path.suffix == ".bin") and (path.parent / MANIFEST).is_file():
        raise SpiffyError(
            f"{path}: belongs to a work directory, which would be lost: give another name"
        )


def parts_of(out: Path) -> Path:
    """The folder in which what a file will hold lies until all is there."""
    return out.with_name(f"{out.name}.parts")


def check_begun_or_new(out: Path) -> None:
    """Refuse a file that is there already, which may hold the work of hours.

    Raises
    ------
    SpiffyError
        Unless what goes into it still lies beside it.
    """
    if out.exists() and not (parts_of(out) / MANIFEST).is_file():
        raise SpiffyError(f"{out}: is there already: remove it, or give another --out")
