"""The one line of a server's log that an error shows."""

from __future__ import annotations

import pytest

from equitie_data._postgres.process import last_word

STAMP = "2026-11-22 17:14:04.123 UTC [4711] "

MISSING_LIBRARY = f"""\
{STAMP}LOG:  starting PostgreSQL 18.6
{STAMP}FATAL:  could not access file "nothing": No such file or directory
{STAMP}LOG:  database system is shut down
"""

UNKNOWN_SETTING = f"""\
{STAMP}LOG:  unrecognized configuration parameter "nothing" in file "/d/x.conf" line 4
{STAMP}FATAL:  configuration file "/d/x.conf" contains errors
"""

DAMAGED = f"""\
{STAMP}PANIC:  could not locate a valid checkpoint record at 0/1
{STAMP}LOG:  startup process (PID 4712) was terminated by signal 6: Aborted
{STAMP}LOG:  aborting startup due to startup process failure
"""

FULL = """\
initdb: error: could not create directory "/d": No space left on device
initdb: removing contents of data directory "/d"
"""


@pytest.mark.parametrize(
    ("log", "word"),
    [
        (MISSING_LIBRARY, 'could not access file "nothing": No such file or directory.'),
        (UNKNOWN_SETTING, 'unrecognized configuration parameter "nothing" in file "/d/x.conf" line 4.'),
        (DAMAGED, "could not locate a valid checkpoint record at 0/1."),
        (FULL, 'could not create directory "/d": No space left on device.'),
        (
            "postgres: error while loading shared libraries: libx.so: cannot open shared object file\n",
            "postgres: error while loading shared libraries: libx.so: cannot open shared object file.",
        ),
        ("", "it gave no reason."),
        ("\n \n", "it gave no reason."),
    ],
)
def test_last_word(log: str, word: str) -> None:
    assert last_word(log) == word
