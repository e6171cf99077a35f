"""The library's log events: silent by default, never on standard output, the application's way if it has one."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import structlog

from equitie_data._log import get_logger

if TYPE_CHECKING:
    import pytest

CODE = """
import logging, sys
{setup}
from equitie_data._log import get_logger
log = get_logger("equitie_data.x")
log.debug("quiet", n=1)
log.warning("loud", n=2)
"""


def run(setup: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE.format(setup=setup)], capture_output=True, text=True, timeout=30, check=True
    )


def test_an_unconfigured_application_hears_nothing() -> None:
    done = run("")
    assert (done.stdout, done.stderr) == ("", "")


def test_logging_gets_the_events() -> None:
    done = run("logging.basicConfig(level=logging.INFO, format='%(name)s %(message)s')")
    assert done.stdout == ""
    assert done.stderr == "equitie_data.x event='loud' n=2\n"


def test_a_configured_structlog_gets_the_events() -> None:
    done = run("import structlog; structlog.configure(processors=[structlog.processors.JSONRenderer()])")
    assert '"event": "loud"' in done.stdout


def test_events_can_be_captured_by_tests(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("equitie_data.y")
    with structlog.testing.capture_logs() as captured:
        log.warning("one", n=1)
    assert captured == [{"event": "one", "n": 1, "log_level": "warning"}]
    structlog.reset_defaults()
    with caplog.at_level(logging.INFO, "equitie_data.y"):
        log.info("two", n=2)
    assert caplog.messages == ["event='two' n=2"]
