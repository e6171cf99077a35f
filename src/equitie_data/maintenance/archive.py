"""Archives of retired partitions: a compressed CSV that any PostgreSQL reads, and a manifest to check it by.

``NAME.csv.gz`` is ``COPY ... TO STDOUT (FORMAT csv, HEADER)``, dates and times in ISO and UTC: `zcat` and psql bring it
back without this library. ``NAME.json`` says what must be in it. Both are written under another name, flushed to the
disk and renamed, the manifest first: where there is an archive, there is what to check it by.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from decimal import Context, Decimal, DecimalException, Inexact, InvalidOperation
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

import attrs
import psycopg
from psycopg import sql

from equitie_data.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from psycopg import Connection

__all__ = [
    "Archive",
    "Column",
    "Manifest",
    "copy_statement",
    "csv_blocks",
    "describe_source",
    "read_manifest",
    "verify_archive",
    "write_archive",
]

_FORMAT: Final = 1
_SUFFIX: Final = ".csv.gz"
_BLOCK: Final = 1 << 20
_EXACT: Final = Context(prec=100_000, traps=[Inexact, InvalidOperation])
"""Sums without rounding: it fails instead."""
_COLUMNS: Final = """
SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod)
FROM pg_catalog.pg_attribute AS a
WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
ORDER BY a.attnum
"""


class SupportsAdvance(Protocol):
    """What shows progress, such as `equitie_data.cli.Progress`."""

    def advance(self, count: int, /) -> object:
        """Take note of ``count`` more bytes."""


@attrs.frozen
class Column:
    """A column of the archive: its name and PostgreSQL's spelling of its type."""

    name: str
    type: str


@attrs.frozen(kw_only=True)
class Manifest:
    """What an archive holds, by which it is checked before anything is dropped or restored.

    Attributes:
        parent: The table, with its schema.
        partition: What the partition was called, without a schema.
        start: Its lower bound, as PostgreSQL writes it, or ``None`` for MINVALUE.
        end: Its upper bound, exclusive.
        columns: The columns, in the order of the file.
        rows: How many rows there are.
        amount_column: The column whose sum is ``amount``; ``None`` for none.
        amount: That sum, exact.
        measures: Smallest and largest key and date, and how many ids carry another day.
        sha256: Of the compressed file, hexadecimal.
        bytes: Size of the compressed file.
        content_sha256: Of the CSV text.
        system_identifier: The cluster it is from.
        database: The database it is from.
        retired_id: Key in that database's ``equitie_private.retired_partitions``.
        server_version: That server's version.
        package_version: This library's version.
    """

    parent: str
    partition: str
    start: str | None
    end: str
    columns: tuple[Column, ...]
    rows: int
    amount_column: str | None
    amount: str | None
    measures: dict[str, Any]
    sha256: str = ""
    bytes: int = 0
    content_sha256: str = ""
    system_identifier: str
    database: str
    retired_id: int
    server_version: str
    package_version: str

    def is_of_same_partition(self, other: Manifest) -> bool:
        """Whether both speak of one retirement, so that one may replace the other."""
        return (self.system_identifier, self.database, self.retired_id) == (
            other.system_identifier,
            other.database,
            other.retired_id,
        )

    def to_json(self) -> str:
        """Return the manifest as JSON."""
        return json.dumps({"format": _FORMAT, **attrs.asdict(self)}, indent=1, ensure_ascii=False) + "\n"


@attrs.frozen
class Archive:
    """A verified archive.

    Attributes:
        path: The compressed file; its manifest stands beside it.
        manifest: What is in it.
    """

    path: Path
    manifest: Manifest


def write_archive(
    conn: Connection[Any],
    table: str,
    expected: Manifest,
    directory: Path,
    progress: SupportsAdvance | None = None,
) -> Archive:
    """Copy a table of equitie_part to an archive, and read it back.

    Args:
        conn: The owner's session, outside of a transaction.
        table: The table, without its schema.
        expected: What must be in it; checksums are filled in.
        directory: Where to put it; it must exist.
        progress: Told how many bytes of CSV were written.

    Raises:
        ArchiveError: It could not be written, or is not what was expected; nothing of it is left.
    """
    path = _free_path(directory, expected)
    # Named after the database, and only one run at a time works on that: what lies there under this name was left by
    # a run that was killed.
    partial = directory / f".{path.name}.{expected.system_identifier}.partial"
    try:
        try:
            content_sha256, columns = _copy_out(conn, table, partial, progress)
            with partial.open("rb") as stream:
                sha256 = _digest(stream)
            manifest = attrs.evolve(
                expected,
                columns=columns,
                sha256=sha256,
                bytes=partial.stat().st_size,
                content_sha256=content_sha256,
            )
            _write_manifest(path, manifest)
            partial.replace(path)
            _flush_directory(directory)
            return Archive(path, verify_archive(path))
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ArchiveError(
            f"The archive {path} could not be written: {error.strerror or error}. Nothing was dropped; make room, then "
            "run maintenance again."
        ) from error


def verify_archive(path: Path, manifest: Manifest | None = None) -> Manifest:
    """Read an archive from its first byte to its last, and compare it with its manifest.

    Raises:
        ArchiveError: It differs, or cannot be read.
    """
    manifest = read_manifest(path) if manifest is None else manifest
    try:
        with path.open("rb") as stream:
            found = _digest(stream)
    except OSError as error:
        raise ArchiveError(f"The archive {path} cannot be read: {error.strerror or error}.") from error
    if found != manifest.sha256:
        raise ArchiveError(
            f"The archive {path} is not what its manifest says: its checksum differs, so it was changed or damaged."
        )
    try:
        rows, amount, content = _read_back(path, manifest)
    except (OSError, EOFError, ValueError, csv.Error, zlib.error, DecimalException) as error:
        raise ArchiveError(f"The archive {path} cannot be read back: {type(error).__name__}.") from error
    wanted = None if manifest.amount is None else Decimal(manifest.amount)
    if rows != manifest.rows or amount != wanted or content != manifest.content_sha256:
        raise ArchiveError(
            f"The archive {path} is not what its manifest says: it holds {rows:,} rows instead of {manifest.rows:,}"
            + ("." if amount == wanted else ", or another sum.")
        )
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read the manifest beside an archive.

    Raises:
        ArchiveError: There is none, or it is not one of ours.
    """
    place = _manifest_of(path)
    try:
        text = json.loads(place.read_text("utf-8"))
        if text.pop("format") != _FORMAT:
            raise ArchiveError(f"{place} was written by a newer release: restore with that one.")
        columns = tuple(Column(**column) for column in text.pop("columns"))
        return Manifest(columns=columns, **text)
    except OSError as error:
        raise ArchiveError(
            f"{place} cannot be read: {error.strerror or error}. An archive without its manifest is not trusted."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArchiveError(f"{place} is not the manifest of an archive.") from error


def csv_blocks(path: Path) -> Iterator[bytes]:
    """Yield the CSV text of an archive in blocks."""
    with gzip.open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            yield block


def copy_statement(verb: str, table: sql.Composable, columns: tuple[Column, ...]) -> sql.Composed:
    """Return the COPY of an archive's columns; ``verb`` is ``TO STDOUT`` or ``FROM STDIN``."""
    names = sql.SQL(", ").join(sql.Identifier(column.name) for column in columns)
    direction = sql.SQL("TO STDOUT") if verb == "TO STDOUT" else sql.SQL("FROM STDIN")
    return sql.SQL("COPY {} ({}) {} (FORMAT csv, HEADER)").format(table, names, direction)


def _copy_out(
    conn: Connection[Any], table: str, partial: Path, progress: SupportsAdvance | None
) -> tuple[str, tuple[Column, ...]]:
    content = hashlib.sha256()
    columns = tuple(Column(*row) for row in conn.execute(_COLUMNS, [f'equitie_part."{table}"']))
    with (
        partial.open("wb") as raw,
        # Without a name and a time in its header, the same rows give the same file.
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as compressed,
        conn.cursor() as cursor,
        cursor.copy(copy_statement("TO STDOUT", sql.Identifier("equitie_part", table), columns)) as copy,
    ):
        for block in copy:
            content.update(block)
            compressed.write(block)
            if progress is not None:
                progress.advance(len(block))
    # Again, since the compressor writes its last block when it is closed.
    with partial.open("r+b") as written:
        os.fsync(written.fileno())
    return content.hexdigest(), columns


def _write_manifest(path: Path, manifest: Manifest) -> None:
    place = _manifest_of(path)
    partial = place.with_name(f".{place.name}.{manifest.system_identifier}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(manifest.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def _read_back(path: Path, manifest: Manifest) -> tuple[int, Decimal | None, str]:
    content = hashlib.sha256()
    amount = None if manifest.amount_column is None else Decimal(0)
    place = [column.name for column in manifest.columns].index(manifest.amount_column) if manifest.amount_column else 0
    rows = -1  # the header
    with gzip.open(path, "rb") as stream:
        hashing = io.BufferedReader(_Hashing(stream, content), _BLOCK)
        text = io.TextIOWrapper(hashing, encoding="utf-8", newline="")
        limit = csv.field_size_limit(1 << 30)
        try:
            for cells in csv.reader(text):
                rows += 1
                if rows and amount is not None and cells[place]:
                    amount = _EXACT.add(amount, Decimal(cells[place]))
        finally:
            csv.field_size_limit(limit)
    return rows, amount, content.hexdigest()


class _Hashing(io.RawIOBase):
    """Reads through to another stream, hashing what passes."""

    def __init__(self, stream: gzip.GzipFile, digest: Any) -> None:
        self._stream = stream
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        self._digest.update(block)
        buffer[: len(block)] = block
        return len(block)


def _digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _free_path(directory: Path, expected: Manifest) -> Path:
    """Return where this archive goes; another database's archive of the same name is never replaced."""
    start = (expected.start or "begin")[:10]
    stem = f"{expected.database}.{expected.parent}.{start}_{expected.end[:10]}".replace(os.sep, "_")
    number = 1
    while True:
        path = directory / f"{stem}{f'-{number}' if number > 1 else ''}{_SUFFIX}"
        if not path.exists() and not _manifest_of(path).exists():
            return path
        # What cannot be told stays as it is.
        with contextlib.suppress(ArchiveError):
            if read_manifest(path).is_of_same_partition(expected):
                return path
        number += 1


def _manifest_of(path: Path) -> Path:
    name = path.name.removesuffix(_SUFFIX) if path.name.endswith(_SUFFIX) else path.stem
    return path.with_name(f"{name}.json")


def _flush_directory(directory: Path) -> None:
    # A rename is on the disk once its directory is. Windows cannot open one.
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_source(conn: Connection[Any]) -> tuple[str, str, str]:
    """Return the cluster's identifier, the database's name and the server's version."""
    row = conn.execute(
        "SELECT (SELECT c.system_identifier::text FROM pg_catalog.pg_control_system() AS c), current_database()::text"
    ).fetchone()
    if row is None:
        raise psycopg.InternalError("the server did not say which it is")
    return row[0], row[1], conn.info.parameter_status("server_version") or ""
