"""CSV files of any length, plain or gzip, read in flat memory.

Bytes become physical lines, lines become records. Every buffer is bounded: a line, a record or a field without end
costs an error and not the memory.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import zlib
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, cast

import attrs

from equitie_data.errors import ImportFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["RECORD_CHARACTERS", "CsvFile", "Record"]

RECORD_CHARACTERS: Final = 131_072  # as csv.field_size_limit(): one bound for the field and for the row it stands in

_CHUNK_BYTES = 65_536
# Strict UTF-8 never decodes to a surrogate, so this one can stand for NUL, which csv refuses before Python 3.11.
_NUL_MARK = "\udc00"


class Record(NamedTuple):
    """One record of the file.

    Attributes:
        line: The physical line it starts in, from 1.
        cells: Its fields as they stand in the file, NUL characters shown as U+2400.
        problem: Why it cannot even be split into fields; ``None`` when it can.
    """

    line: int
    cells: list[str]
    problem: str | None


@attrs.define(eq=False)
class CsvFile:
    """A CSV file, plain or gzip, from any binary stream; only read forwards.

    Attributes:
        stream: Where the bytes come from; needs `read` alone.
        name: What to call it in errors.
        on_bytes: Told how many bytes were read from ``stream``, for progress.
        line: The physical line read last, from 1.
    """

    stream: BinaryIO
    name: str
    on_bytes: Callable[[int], object] = attrs.field(default=lambda _count: None)
    line: int = 0
    _digest: hashlib._Hash = attrs.field(factory=hashlib.sha256, init=False)
    _head: bytes = attrs.field(default=b"", init=False)
    _offset: int = attrs.field(default=0, init=False)
    _record_characters: int = attrs.field(default=0, init=False)
    _last_line: str = attrs.field(default="", init=False)
    _nul_seen: bool = attrs.field(default=False, init=False)
    _exhausted: bool = attrs.field(default=False, init=False)

    def records(self) -> Iterator[Record]:
        """Yield the file's records, the header first; empty lines are none.

        Raises:
            ImportFileError: The file is empty, cut off, unreadable, not UTF-8, or a record is out of bounds.
        """
        reader = csv.reader(self._lines(), strict=True)
        while True:
            start = self.line + 1
            self._record_characters = 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield self._broken_record(start)
                continue
            if not cells:
                continue
            if self._nul_seen and any(_NUL_MARK in cell for cell in cells):
                cells = [cell.replace(_NUL_MARK, "\u2400") for cell in cells]
                yield Record(start, cells, "holds a NUL character")
                continue
            yield Record(start, cells, None)

    def sha256(self) -> bytes:
        """Return the digest of the bytes read so far, as they came: of the whole file once `records` has ended."""
        return self._digest.digest()

    def _broken_record(self, start: int) -> Record:
        """Keep a record whose quotes are wrong if it is one line, otherwise give up.

        Over several lines nobody can say which of them it swallowed: the next quote may have closed it.
        """
        if self._exhausted:
            raise self._error(f"ends inside the quoted field of the row in line {start}; is the file cut off?")
        if self.line > start:
            raise self._error(
                f"the row in line {start} goes on to line {self.line} and its quotes do not match there; "
                "is a closing quote missing?"
            )
        text = self._last_line.rstrip("\r\n").replace(_NUL_MARK, "\u2400")
        return Record(start, [text], "quotes do not match")

    def _lines(self) -> Iterator[str]:
        first = True
        for block in self._blocks():
            text = self._decode(block)
            if first:
                first = False
                text = text.removeprefix("\ufeff")
            if "\0" in text:
                self._nul_seen = True
                text = text.replace("\0", _NUL_MARK)
            # newline="" splits at LF, CR and CRLF and keeps them, as csv wants its lines.
            for line in io.StringIO(text, newline=""):
                self.line += 1
                self._record_characters += len(line)
                if self._record_characters > RECORD_CHARACTERS:
                    raise self._error(
                        f"line {self.line}: a row is longer than {RECORD_CHARACTERS:,} characters; "
                        "is a closing quote or a line break missing?"
                    )
                self._last_line = line
                yield line
        self._exhausted = True

    def _blocks(self) -> Iterator[bytes]:
        """Yield the file in pieces that end where a line ends."""
        read = self._open()
        rest = b""
        while chunk := self._read(read):
            buffer = rest + chunk
            # A lone CR ends a line too, but the last byte may be the first half of a CRLF.
            cut = buffer.rfind(b"\n") + 1 or buffer.rfind(b"\r", 0, -1) + 1
            if cut:
                yield buffer[:cut]
                self._offset += cut
            elif len(buffer) > 4 * RECORD_CHARACTERS:
                raise self._error(
                    f"line {self.line + 1} is longer than {RECORD_CHARACTERS:,} characters; this is no CSV file, "
                    "or its line breaks are missing"
                )
            rest = buffer[cut:]
        if rest:
            yield rest
        elif not self._offset:
            raise self._error("is empty: a header with the column names is the least it must have")

    def _open(self) -> Callable[[int], bytes]:
        head = b""
        while len(head) < 4 and (more := self._read(self.stream.read, 4 - len(head))):
            head += more
        self._head = head
        if head.startswith(b"PK\x03\x04"):
            raise self._error("is a ZIP archive or a spreadsheet; save it as CSV")
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise self._error("is UTF-16; save it as UTF-8")
        if head.startswith(b"\x1f\x8b"):
            return gzip.GzipFile(fileobj=cast("BinaryIO", _Reader(self.read_raw)), mode="rb").read
        return self.read_raw

    def read_raw(self, size: int = -1) -> bytes:
        """Return the next bytes of the stream, digested and counted."""
        size = min(size, _CHUNK_BYTES) if size > 0 else _CHUNK_BYTES
        head, self._head = self._head[:size], self._head[size:]
        chunk = head or self.stream.read(size)
        self._digest.update(chunk)
        self.on_bytes(len(chunk))
        return chunk

    def _read(self, read: Callable[[int], bytes], size: int = _CHUNK_BYTES) -> bytes:
        try:
            return read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._error(f"its gzip data is damaged or cut off after line {self.line}") from error
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror or type(error).__name__}") from error

    def _decode(self, block: bytes) -> str:
        try:
            return block.decode()
        except UnicodeDecodeError as error:
            line = self.line + 1 + block.count(b"\n", 0, error.start)
            raise self._error(
                f"line {line}: byte {self._offset + error.start + 1} is not UTF-8; save the file as UTF-8"
            ) from None

    def _error(self, what: str) -> ImportFileError:
        return ImportFileError(f"{self.name}: {what}.")


@attrs.frozen
class _Reader:
    """The least of a file that `gzip.GzipFile` needs."""

    read: Callable[[int], bytes]
