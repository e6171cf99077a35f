"""The file of rejected rows, safe to open in a spreadsheet and there only when the import has committed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Final

from equitie_data.errors import ImportFileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Self

__all__ = ["RejectsFile"]

# What a spreadsheet takes for the beginning of a formula; some take the full-width forms for the same.
_FORMULA_STARTS: Final = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


class RejectsFile:
    """Written beside its place, moved there by `publish`, gone otherwise.

    Args:
        path: Its place; a file that stands there is replaced by `publish`.
        source: What is imported, so that it is not replaced.

    Raises:
        ImportFileError: It cannot be written there.
    """

    def __init__(self, path: Path, source: object) -> None:
        self._path = path
        self._partial: Path | None = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        if path.is_dir():
            raise ImportFileError(f"{path}: the rejects file cannot be written: it is a directory.")
        if isinstance(source, (str, Path)) and path.exists() and path.samefile(source):
            raise ImportFileError(f"{path}: the rejects file would replace the file that is imported; name another.")
        try:
            # 0600: it holds names, addresses and amounts. O_EXCL follows no link somebody has laid out.
            handle = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise ImportFileError(
                f"{path}: the rejects file cannot be written: {error.strerror or type(error).__name__}."
            ) from error
        self._file = os.fdopen(handle, "w", encoding="utf-8", newline="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)

    def write(self, header: Sequence[str], rows: Iterable[tuple[int, str, Sequence[str]]]) -> None:
        """Write every rejected row: line, reason and the columns as read."""
        self._file.write(_line(["line", "reason", *header]))
        for line, reason, cells in rows:
            self._file.write(_line([str(line), reason, *cells]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Move it to its place.

        Raises:
            ImportFileError: It could not be moved; the message says where it is.
        """
        if self._partial is None:
            return
        # From here on the import has committed: whatever happens, the rejected rows must stay to be found.
        partial, self._partial = self._partial, None
        try:
            partial.replace(self._path)
        except OSError as error:
            raise ImportFileError(
                f"{self._path}: the import was committed, but its rejects file could not be moved there "
                f"({error.strerror or type(error).__name__}); it is {partial}."
            ) from error


def _line(cells: Iterable[str]) -> str:
    return ",".join([_cell(cell) for cell in cells]) + "\r\n"


def _cell(cell: str) -> str:
    # A cell that starts like a formula, behind apostrophes or not, gets one more: taking one away gives the original.
    if cell.lstrip("'")[:1] in _FORMULA_STARTS:
        cell = f"'{cell}"
    if any(mark in cell for mark in ',"\r\n'):
        cell = '"' + cell.replace('"', '""') + '"'
    return cell
