"""Readers and writers at work while the table is converted: nothing lost, doubled, changed or out of sight."""

from __future__ import annotations

import pytest
from tests.migration.flat_table import Ledger, make_flat

from equitie_data import conversion

OPERATIONS = {
    "attach-split-undo": [conversion.convert, conversion.split, conversion.undo],
    "attach-undo": [conversion.convert, conversion.undo],
    "copy-undo": [lambda dsn: conversion.convert(dsn, copy=True), conversion.undo],
}


@pytest.mark.parametrize(
    ("name", "isolation"),
    [
        ("attach-split-undo", "read committed"),
        ("attach-split-undo", "repeatable read"),
        ("attach-undo", "serializable"),
        ("copy-undo", "read committed"),
    ],
)
def test_every_row_is_what_its_writer_committed(empty_dsn: str, name: str, isolation: str) -> None:
    make_flat(empty_dsn, 2000)
    ledger = Ledger(empty_dsn, isolation)
    for operation in OPERATIONS[name]:
        before = ledger.writes
        with ledger.writing():
            report = operation(empty_dsn)
        assert report.outcome == "done"
        assert ledger.writes > before
        ledger.compare()
