"""What has expired goes: detached, archived, verified, dropped, each step audited; and it comes back exactly once."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from equitie_data.errors import ArchiveError, MaintenanceError
from equitie_data.maintenance import archive, command, maintain, restore
from equitie_data.maintenance.period import Period, add_months, month_of

if TYPE_CHECKING:
    from tests.migration.conftest import Platform
    from typing_extensions import Self

TRANSACTIONS = "public.transactions_clean"
TODAY = dt.datetime.now(dt.timezone.utc).date()
OLD = month_of(add_months(TODAY, -90))
NOW_OR_NEVER = dt.timedelta(0)
IMAGE = "SELECT to_jsonb(t)::text FROM {} AS t ORDER BY transaction_id"


def name_of(month: dt.date) -> str:
    return f"transactions_clean_{month:%Y_%m}"


def add_month(platform: Platform, month: dt.date, rows: int = 5, person: str = "investor_a") -> None:
    """Make a month of the past with rows of an investor, one with an id of before ids carried days."""
    platform.owner.execute(
        "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', %s, %s)", [month, month]
    )
    deal = platform.ids[person.replace("investor", "deal")]
    platform.owner.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount, units, unit_price)"
        " SELECT %s, %s, %s::date + g %% 28, g + 0.123456789012345678901234567890, NULLIF(g, 2), g / 3.0"
        " FROM generate_series(1, %s) AS g",
        [deal, platform.ids[person], month, rows - 1],
    )
    platform.owner.execute(
        "INSERT INTO transactions_clean (transaction_id, deal_id, investor_id, transaction_date, amount)"
        " VALUES (%s, %s, %s, %s, 1)",
        [int(f"{month:%Y%m}"), deal, platform.ids[person], month],
    )


def states(platform: Platform) -> list[tuple[str, str]]:
    return platform.rows("SELECT partition_name, state FROM equitie_private.retired_partitions ORDER BY retired_id")


def audited(platform: Platform, mark: int) -> list[tuple[str, str | None, int | None]]:
    return [
        (action, metadata.get("step"), metadata.get("rows"))
        for action, metadata in platform.events_after(mark, "action", "metadata")
        if metadata and ("step" in metadata or "reason" in metadata)
    ]


def test_an_expired_month_is_archived_dropped_and_comes_back_exactly_once(
    platform: Platform, owner_dsn: str, tmp_path: Path
) -> None:
    add_month(platform, OLD)
    name, image = f"equitie_part.{name_of(OLD)}", platform.rows(IMAGE.format(f"equitie_part.{name_of(OLD)}"))
    total = platform.one(f"SELECT sum(amount) FROM {name}")
    strays = platform.rows("SELECT * FROM equitie_private.stray_transactions ORDER BY 1")
    mark = platform.mark()

    first = maintain(owner_dsn, archive_dir=tmp_path)
    assert [step.kind for step in first.steps if step.table == TRANSACTIONS] == [
        "detach",
        "settle",
        "archive",
        "analyze",
    ]
    assert states(platform) == [(name_of(OLD), "archived")]
    assert platform.one("SELECT count(*) FROM transactions_clean WHERE amount < 100") == 0
    assert platform.rows(IMAGE.format(f"equitie_part.retired_{name_of(OLD)}")) == image
    assert platform.one("SELECT count(*) FROM equitie_private.stray_transactions") == len(strays) - 1
    # Deleting the investor does not reach into what is archived.
    with platform.owner.transaction(force_rollback=True):
        platform.owner.execute("DELETE FROM investors_clean")
        assert platform.rows(IMAGE.format(f"equitie_part.retired_{name_of(OLD)}")) == image

    assert maintain(owner_dsn, archive_dir=tmp_path).steps == ()
    last = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    assert [step.kind for step in last.steps if step.kind != "analyze"] == ["drop"]
    assert states(platform) == [(name_of(OLD), "dropped")]
    assert platform.one("SELECT to_regclass(%s)", f"equitie_part.retired_{name_of(OLD)}") is None
    assert audited(platform, mark) == [
        ("ARCHIVE", "detached", 5),
        ("ARCHIVE", "settled", 5),
        ("ARCHIVE", "archived", 5),
        ("DELETE", "dropped", 5),
    ]
    assert platform.one("SELECT metadata ->> 'amount' FROM audit_logs WHERE metadata ->> 'step' = 'dropped'") == str(
        total
    )

    (file,) = tmp_path.glob("*.csv.gz")
    manifest = archive.verify_archive(file)
    assert (manifest.rows, Decimal(manifest.amount or 0), manifest.amount_column) == (5, total, "amount")
    assert manifest.measures["strays"] == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gz", ".json"]

    mark = platform.mark()
    report = restore(owner_dsn, file, hold_reason="case 7", placed_by="counsel")
    assert (report.rows, report.partition, report.loaded) == (5, f'equitie_part."{name_of(OLD)}"', True)
    assert platform.rows(IMAGE.format(name)) == image
    assert platform.rows("SELECT * FROM equitie_private.stray_transactions ORDER BY 1") == strays
    assert platform.one("SELECT count(*) FROM get_transaction(%s)", int(f"{OLD:%Y%m}")) == 1
    assert states(platform) == [(name_of(OLD), "restored")]
    assert [event[:2] for event in audited(platform, mark)] == [("CREATE", None), ("RESTORE", "restored")]
    with pytest.raises(MaintenanceError, match="with 5 rows, is the partition"):
        restore(owner_dsn, file, hold_reason="case 7", placed_by="counsel")

    # Under the hold it stays; without it, it goes the same way again.
    kept = maintain(owner_dsn, archive_dir=tmp_path)
    assert [step.kind for step in kept.steps if step.kind != "analyze"] == []
    assert any(f"kept by legal hold {report.hold_id}" in note for note in kept.notes)
    platform.owner.execute("SELECT equitie_private.release_legal_hold(%s, 'counsel')", [report.hold_id])
    again = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    assert [step.kind for step in again.steps if step.kind != "analyze"] == ["detach", "settle", "archive", "drop"]
    assert len(list(tmp_path.glob("*.csv.gz"))) == 2, "an archive is never replaced by another retirement's"


def test_an_archive_is_readable_without_the_library(platform: Platform, owner_dsn: str, tmp_path: Path) -> None:
    add_month(platform, OLD)
    maintain(owner_dsn, archive_dir=tmp_path)
    (file,) = tmp_path.glob("*.csv.gz")
    text = gzip.decompress(file.read_bytes()).decode()
    manifest = json.loads(file.with_name(file.name.removesuffix(".csv.gz") + ".json").read_text())
    assert text.splitlines()[0].split(",") == [column["name"] for column in manifest["columns"]]
    platform.owner.execute("CREATE TABLE public.copied (LIKE transactions_clean)")
    with platform.owner.cursor().copy("COPY public.copied FROM STDIN (FORMAT csv, HEADER)") as copy:
        copy.write(text)
    assert platform.rows(IMAGE.format("public.copied")) == platform.rows(
        IMAGE.format(f"equitie_part.retired_{name_of(OLD)}")
    )


def test_without_an_archive_directory_nothing_is_dropped(platform: Platform, owner_dsn: str) -> None:
    add_month(platform, OLD)
    report = maintain(owner_dsn, drop_after=NOW_OR_NEVER)
    assert states(platform) == [(name_of(OLD), "settled")]
    assert any("pass --archive-dir" in note for note in report.notes)
    assert not report.needs_attention
    assert maintain(owner_dsn, drop_after=NOW_OR_NEVER).steps == ()


def test_the_audit_log_keeps_two_years(platform: Platform, owner_dsn: str, tmp_path: Path) -> None:
    cutoff = Period(days=730).before(TODAY)
    kept, gone = month_of(cutoff), add_months(month_of(cutoff), -1)
    for month in (kept, gone):
        platform.owner.execute(
            "SELECT equitie_private.ensure_month_partitions('public.audit_logs', %s, %s)", [month, month]
        )
        platform.owner.execute(
            'INSERT INTO audit_logs ("timestamp", source, actor_type, action, entity_type, changes)'
            " VALUES (%s, 'sdk', 'database', 'READ', 'x', '{\"a\": \"b\\nc, \\\"d\\\"\"}')",
            [month],
        )
    report = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    assert not report.needs_attention, report
    assert states(platform) == [(f"audit_logs_{gone:%Y_%m}", "dropped")]
    assert platform.one("SELECT count(*) FROM audit_logs WHERE entity_type = 'x'") == 1
    (file,) = tmp_path.glob("*.csv.gz")
    assert restore(owner_dsn, file, hold_reason="case", placed_by="me").rows == 1
    assert platform.one("SELECT count(*) FROM audit_logs WHERE entity_type = 'x'") == 2
    assert platform.one("SELECT count(DISTINCT changes) FROM audit_logs WHERE entity_type = 'x'") == 1
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        platform.owner.execute("DELETE FROM audit_logs WHERE entity_type = 'x'")


# Holds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hold", "keeps"),
    [
        ({}, "both"),
        ({"parent": TRANSACTIONS}, "both"),
        ({"parent": "public.audit_logs"}, "none"),
        ({"investor_id": "investor_a"}, "first"),
        ({"investor_id": "investor_b"}, "second"),
        ({"deal_id": "deal_b", "parent": TRANSACTIONS}, "second"),
        ({"last_day": OLD}, "first"),
        ({"first_day": OLD, "last_day": OLD}, "first"),
        ({"first_day": add_months(OLD, 1)}, "second"),
        ({"last_day": OLD - dt.timedelta(days=1)}, "none"),
        ({"investor_id": "investor_a", "first_day": add_months(OLD, 1)}, "none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "everything",
)
def test_a_hold_keeps_what_it_is_about(
    platform: Platform, owner_dsn: str, hold: dict[str, Any], keeps: str, tmp_path: Path
) -> None:
    second = add_months(OLD, 1)
    add_month(platform, OLD)
    add_month(platform, second, person="investor_b")
    values = {name: platform.ids.get(value, value) if isinstance(value, str) else value for name, value in hold.items()}
    platform.owner.execute(
        "SELECT equitie_private.place_legal_hold('case 1', 'counsel', %(parent)s, %(first_day)s, %(last_day)s,"
        " %(investor_id)s, %(deal_id)s)",
        dict.fromkeys(("parent", "first_day", "last_day", "investor_id", "deal_id")) | values,
    )
    report = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    gone = {"both": [], "first": [second], "second": [OLD], "none": [OLD, second]}[keeps]
    assert states(platform) == [(name_of(month), "dropped") for month in gone]
    assert not report.needs_attention
    assert len([note for note in report.notes if "legal hold 1" in note]) == 2 - len(gone)
    platform.owner.execute("SELECT equitie_private.release_legal_hold(1, 'counsel')")
    maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    assert len(states(platform)) == 2


def test_a_hold_placed_after_the_detach_keeps_the_table(platform: Platform, owner_dsn: str, tmp_path: Path) -> None:
    add_month(platform, OLD)
    maintain(owner_dsn, archive_dir=tmp_path)
    platform.owner.execute(
        "SELECT equitie_private.place_legal_hold('case', 'me', NULL, NULL, NULL, %s, NULL)",
        [platform.ids["investor_a"]],
    )
    report = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    assert states(platform) == [(name_of(OLD), "archived")]
    assert any("retired_" in note and "legal hold 1" in note for note in report.notes)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="kept by legal hold 1"):
        platform.owner.execute("SELECT equitie_private.drop_retired(1, 50)")


def test_a_hold_counts_even_for_a_run_that_has_not_seen_it(platform: Platform, owner_dsn: str) -> None:
    add_month(platform, OLD)
    platform.owner.execute("SELECT equitie_private.place_legal_hold('case', 'me', NULL, NULL, NULL, NULL, NULL)")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="is kept by legal hold 1"):
        platform.owner.execute(
            "SELECT equitie_private.detach_month(%s, %s::regclass, %s, 50)",
            [TRANSACTIONS, f"equitie_part.{name_of(OLD)}", TODAY],
        )


def test_a_hold_cannot_come_between_the_look_and_the_detach(platform: Platform, owner_dsn: str) -> None:
    add_month(platform, OLD)
    with psycopg.connect(owner_dsn) as placing:
        placing.execute("SELECT equitie_private.place_legal_hold('case', 'me', NULL, NULL, NULL, NULL, NULL)")
        report = maintain(owner_dsn, patience=0.2)
        assert any(step.kind == "detach" for step in report.steps) is False
        assert any("detach" in each for each in report.not_done)
        placing.commit()
    assert maintain(owner_dsn).not_done == ()
    assert states(platform) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "'  ', 'me', NULL, NULL, NULL, NULL, NULL",
        "'r', 'me', 'public.companies_clean', NULL, NULL, NULL, NULL",
        "'r', 'me', NULL, '2024-02-01', '2024-01-01', NULL, NULL",
        "'r', 'me', NULL, NULL, NULL, 1, 1",
    ],
)
def test_a_hold_that_cannot_be_meant_is_refused(platform: Platform, arguments: str) -> None:
    with pytest.raises((psycopg.errors.CheckViolation, psycopg.errors.InvalidParameterValue)):
        platform.owner.execute(f"SELECT equitie_private.place_legal_hold({arguments})")


# What goes wrong --------------------------------------------------------------------------------------------------


def test_a_month_that_others_refer_to_stays_and_the_foreign_key_is_named(
    platform: Platform, owner_dsn: str, tmp_path: Path
) -> None:
    add_month(platform, OLD)
    add_month(platform, add_months(OLD, 1))
    platform.owner.execute(
        "CREATE TABLE public.settlements (transaction_id bigint, transaction_date date,"
        " CONSTRAINT fk_settled FOREIGN KEY (transaction_id, transaction_date)"
        "  REFERENCES transactions_clean (transaction_id, transaction_date) ON DELETE CASCADE);"
        f"INSERT INTO public.settlements VALUES ({OLD:%Y%m}, '{OLD}')"
    )
    report = maintain(owner_dsn, archive_dir=tmp_path)
    (failure,) = report.failures
    assert f"equitie_part.{name_of(OLD)} cannot be retired" in failure
    assert "fk_settled of public.settlements" in failure
    assert states(platform) == [(name_of(add_months(OLD, 1)), "archived")]
    platform.owner.execute("DELETE FROM public.settlements")
    assert not maintain(owner_dsn, archive_dir=tmp_path).needs_attention
    assert len(states(platform)) == 2


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, stream: Any, room: int) -> None:
        self._stream = stream
        self._room = room

    def write(self, block: bytes) -> int:
        if len(block) > self._room:
            raise OSError(28, "No space left on device")
        self._room -= len(block)
        return int(self._stream.write(block))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def test_a_disk_that_fills_up_costs_nothing(
    platform: Platform, owner_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_month(platform, OLD, rows=400)
    real = Path.open

    def opening(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        stream = real(self, mode, *arguments, **options)
        return FullDisk(stream, 3000) if mode == "wb" and self.suffix == ".partial" else stream

    monkeypatch.setattr(Path, "open", opening)
    report = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    monkeypatch.undo()
    (failure,) = report.failures
    assert "could not be written: No space left on device. Nothing was dropped" in failure
    assert report.outcome == "failed"
    assert list(tmp_path.iterdir()) == []
    assert states(platform) == [(name_of(OLD), "settled")]
    assert maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER).failures == ()
    assert states(platform) == [(name_of(OLD), "dropped")]


def test_what_a_disk_does_not_give_back_is_noticed_before_anything_is_dropped(
    platform: Platform, owner_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_month(platform, OLD, rows=60)
    real = Path.replace

    def replacing(self: Path, target: Path) -> Path:
        done = real(self, target)
        if target.suffix == ".gz":
            content = target.read_bytes()
            target.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
        return done

    monkeypatch.setattr(Path, "replace", replacing)
    report = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    monkeypatch.undo()
    (failure,) = report.failures
    assert "is not what its manifest says" in failure
    assert states(platform) == [(name_of(OLD), "settled")]
    assert platform.one(f"SELECT count(*) FROM equitie_part.retired_{name_of(OLD)}") == 60
    assert maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER).failures == ()
    assert len(list(tmp_path.glob("*.csv.gz"))) == 1


def test_a_real_limit_on_file_sizes_is_survived(platform: Platform, owner_dsn: str, tmp_path: Path) -> None:
    add_month(platform, OLD, rows=2000)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000));"
        "from equitie_data.maintenance import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--dsn", owner_dsn, "--archive-dir", str(tmp_path), "--drop-after", "0d"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "File too large. Nothing was dropped" in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []
    assert platform.one(f"SELECT count(*) FROM equitie_part.retired_{name_of(OLD)}") == 2000


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "manifest", "no manifest", "swap", "not gzip"])
def test_a_damaged_archive_is_neither_trusted_nor_restored(
    platform: Platform, owner_dsn: str, tmp_path: Path, damage: str
) -> None:
    add_month(platform, OLD, rows=60)
    maintain(owner_dsn, archive_dir=tmp_path)
    (file,) = tmp_path.glob("*.csv.gz")
    (manifest,) = tmp_path.glob("*.json")
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    elif damage == "truncate":
        file.write_bytes(content[:-10])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"rows": 60', '"rows": 59'))
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "not gzip":
        file.write_bytes(b"a,b\n1,2\n")
    else:
        text = gzip.decompress(content).decode().splitlines(keepends=True)
        file.write_bytes(gzip.compress("".join(text[:-1]).encode(), mtime=0))
    report = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    assert len(report.failures) == 1
    assert states(platform) == [(name_of(OLD), "archived")]
    assert platform.one(f"SELECT count(*) FROM equitie_part.retired_{name_of(OLD)}") == 60
    with pytest.raises(ArchiveError):
        restore(owner_dsn, file, hold_reason=None, placed_by="me")
    assert platform.one("SELECT count(*) FROM transactions_clean WHERE amount < 100") == 0


def test_a_retired_table_that_changed_is_not_dropped(platform: Platform, owner_dsn: str, tmp_path: Path) -> None:
    add_month(platform, OLD)
    maintain(owner_dsn, archive_dir=tmp_path)
    platform.owner.execute(f"UPDATE equitie_part.retired_{name_of(OLD)} SET amount = amount + 1")
    report = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    assert any("is not what its archive says" in each for each in report.failures)
    assert states(platform) == [(name_of(OLD), "archived")]


# Restoring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def archived(platform: Platform, owner_dsn: str, tmp_path: Path) -> Path:
    """The archive of a month that was dropped."""
    add_month(platform, OLD)
    maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    (file,) = tmp_path.glob("*.csv.gz")
    return file


def test_a_table_that_still_stands_is_attached_again(platform: Platform, owner_dsn: str, tmp_path: Path) -> None:
    add_month(platform, OLD)
    image = platform.rows(IMAGE.format(f"equitie_part.{name_of(OLD)}"))
    maintain(owner_dsn, archive_dir=tmp_path)
    (file,) = tmp_path.glob("*.csv.gz")
    report = restore(owner_dsn, file, hold_reason="case", placed_by="me")
    assert report.loaded is False
    assert platform.rows(IMAGE.format(f"equitie_part.{name_of(OLD)}")) == image
    assert states(platform) == [(name_of(OLD), "restored")]
    platform.owner.execute("DELETE FROM investors_clean WHERE investor_id = %s", [platform.ids["investor_a"]])
    assert platform.one(f"SELECT count(*) FROM equitie_part.{name_of(OLD)}") == 0


def test_rows_that_came_since_join_the_restored_ones(platform: Platform, owner_dsn: str, archived: Path) -> None:
    platform.owner.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount) VALUES (%s, %s, %s, 42)",
        [platform.ids["deal_a"], platform.ids["investor_a"], OLD],
    )
    report = restore(owner_dsn, archived, hold_reason="case", placed_by="me")
    assert (report.rows, report.late_rows) == (5, 1)
    assert platform.one(f"SELECT count(*) FROM equitie_part.{name_of(OLD)}") == 6
    assert platform.one("SELECT count(*) - count(DISTINCT transaction_id) FROM transactions_clean") == 0


def test_a_partition_without_a_lower_bound_goes_and_comes_back(
    platform: Platform, owner_dsn: str, tmp_path: Path
) -> None:
    platform.owner.execute(
        "CREATE TABLE equitie_part.transactions_clean_old PARTITION OF transactions_clean"
        " FOR VALUES FROM (MINVALUE) TO ('2015-01-01')"
    )
    for day in ("1013-01-01", "2014-12-31"):
        platform.owner.execute(
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount) VALUES (%s, %s, %s, 1)",
            [platform.ids["deal_a"], platform.ids["investor_a"], day],
        )
    image = platform.rows(IMAGE.format("equitie_part.transactions_clean_old"))
    report = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER)
    assert not report.needs_attention, report
    assert states(platform) == [("transactions_clean_old", "dropped")]
    (file,) = tmp_path.glob("*.begin_2015-01-01.csv.gz")
    restore(owner_dsn, file, hold_reason="case", placed_by="me")
    assert platform.rows(IMAGE.format("equitie_part.transactions_clean_old")) == image
    assert [step.kind for step in maintain(owner_dsn, archive_dir=tmp_path).steps if step.kind != "analyze"] == []


@pytest.mark.parametrize("clash", ["native", "stray"])
def test_rows_that_are_there_already_are_not_doubled(
    platform: Platform, owner_dsn: str, archived: Path, clash: str
) -> None:
    manifest = archive.read_manifest(archived)
    if clash == "native":
        key, day = manifest.measures["last_id"], dt.date.fromisoformat(str(manifest.measures["last_id"])[:8])
    else:
        key, day = int(f"{OLD:%Y%m}"), TODAY
    platform.owner.execute(
        "INSERT INTO transactions_clean (transaction_id, deal_id, investor_id, transaction_date, amount)"
        " VALUES (%s, %s, %s, %s, 1)",
        [key, platform.ids["deal_a"], platform.ids["investor_a"], day],
    )
    before = platform.one("SELECT count(*) FROM transactions_clean")
    with pytest.raises(MaintenanceError, match=r"some of its rows are in public\.transactions_clean already"):
        restore(owner_dsn, archived, hold_reason="case", placed_by="me")
    assert platform.one("SELECT count(*) FROM transactions_clean") == before
    assert platform.rows("SELECT 1 FROM equitie_private.legal_holds WHERE released_at IS NULL") == []
    assert states(platform) == [(name_of(OLD), "dropped")]
    assert platform.rows("SELECT relname FROM pg_class WHERE relname LIKE 'restoring%%'") == []
    assert platform.one("SELECT count(*) FROM equitie_private.stray_transactions") == (clash == "stray")


def test_rows_without_their_investor_are_not_restored(platform: Platform, owner_dsn: str, archived: Path) -> None:
    platform.owner.execute("DELETE FROM investors_clean WHERE investor_id = %s", [platform.ids["investor_a"]])
    with pytest.raises(MaintenanceError, match="rows that its rows refer to are gone"):
        restore(owner_dsn, archived, hold_reason="case", placed_by="me")
    assert platform.rows("SELECT relname FROM pg_class WHERE relname LIKE 'restoring%%'") == []
    assert platform.one("SELECT count(*) FROM equitie_private.stray_transactions") == 0


def test_a_column_added_since_gets_its_default_and_one_dropped_is_named(
    platform: Platform, owner_dsn: str, archived: Path
) -> None:
    platform.owner.execute("ALTER TABLE transactions_clean ADD COLUMN channel text DEFAULT 'web'")
    with platform.owner.transaction(force_rollback=False):
        platform.owner.execute("ALTER TABLE transactions_clean RENAME COLUMN admin_fee TO fee")
    with pytest.raises(MaintenanceError, match=r"its column admin_fee \(numeric\) does not exist there"):
        restore(owner_dsn, archived, hold_reason="case", placed_by="me")
    platform.owner.execute("ALTER TABLE transactions_clean RENAME COLUMN fee TO admin_fee")
    restore(owner_dsn, archived, hold_reason="case", placed_by="me")
    assert platform.rows(f"SELECT DISTINCT channel FROM equitie_part.{name_of(OLD)}") == [("web",)]


# The command ------------------------------------------------------------------------------------------------------


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = command.main(list(arguments))
    done = capsys.readouterr()
    return code, done.out, done.err


def test_the_commands(
    platform: Platform,
    owner_dsn: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MIGRATION_DATABASE_URL", owner_dsn)
    add_month(platform, OLD)
    code, out, _ = run_command(capsys, "status")
    assert code == 1
    assert "Maintenance has never run" in out
    assert "1 expired partition of public.transactions_clean" in out
    code, out, _ = run_command(capsys, "--dry-run", "--archive-dir", str(tmp_path))
    assert f"would detach   equitie_part.{name_of(OLD)}" in out
    assert "nothing was changed" in out
    hold = ("hold", "case 9", "--investor", str(platform.ids["investor_a"]), "--by", "counsel")
    assert run_command(capsys, *hold)[1].startswith("Legal hold 1 is in force: every table, with rows of investor")
    code, out, _ = run_command(capsys, "holds")
    assert (code, "case 9 (by counsel on" in out) == (0, True)
    assert run_command(capsys, "status")[0] == 1
    assert run_command(capsys)[0] == 0
    code, out, _ = run_command(capsys, "status")
    assert (code, "legal holds in force: 1" in out) == (0, True)
    assert max(map(len, out.splitlines())) <= 80
    assert run_command(capsys, "release", "1", "--by", "counsel") == (0, "Legal hold 1 is released.\n", "")
    assert run_command(capsys, "release", "1") == (1, "", "error: There is no legal hold 1 in force.\n")
    assert json.loads(run_command(capsys, "holds", "--all", "--json")[1])[0]["released_by"] == "counsel"
    code, out, _ = run_command(capsys, "--json", "--archive-dir", str(tmp_path), "--drop-after", "0d")
    report = json.loads(out)
    assert (code, report["outcome"]) == (0, "done")
    assert {step["kind"] for step in report["steps"]} >= {"detach", "archive", "drop"}
    (file,) = tmp_path.glob("*.csv.gz")
    code, out, _ = run_command(capsys, "verify", str(file))
    assert (code, "5 rows of public.transactions_clean, sum 11." in out) == (0, True)
    code, out, _ = run_command(capsys, "restore", str(file), "--no-hold")
    assert (code, "The next run retires it again" in out) == (0, True)
    code, out, err = run_command(capsys, "restore", str(file))
    assert (code, out, err.count("\n")) == (1, "", 1)
    status = json.loads(run_command(capsys, "status", "--json")[1])
    assert status["tables"][1]["expired"] == [f"equitie_part.{name_of(OLD)}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "7"], "is no period"),
        (["--keep", "5d"], "less than a month"),
        (["--keep", "public.x=7y"], "public.x has no retention policy"),
        (["--archive-dir", "/nowhere/at/all"], "does not exist"),
        (["verify", "/nowhere.csv.gz"], "cannot be read"),
    ],
)
def test_wrong_arguments_get_one_line(
    owner_dsn: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    options = [] if arguments[0] == "verify" else ["--dsn", owner_dsn, "--json"]
    code, out, err = run_command(capsys, *arguments, *options)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert ":" + owner_dsn.split(":")[2].split("@", maxsplit=1)[0] not in err


def test_keep_is_about_transactions_unless_it_says_otherwise(
    platform: Platform, owner_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add_month(platform, OLD)
    code, out, _ = run_command(
        capsys, "--dsn", owner_dsn, "--dry-run", "--keep", "20y", "--keep", "public.audit_logs=3y"
    )
    assert (code, "detach" in out) == (0, False)
    code, out, _ = run_command(capsys, "--dsn", owner_dsn, "--dry-run", "--keep", "84m")
    assert "detach" in out
