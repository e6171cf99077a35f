"""Write down what decides who may do what in a freshly migrated database, for `doctor` to compare others with.

    python tools/make_security_baseline.py [--check]

The file is committed, and a test compares it with a database on every version of PostgreSQL.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from equitie_data.connect import connect
from equitie_data.doctor.baseline import security_facts
from equitie_data.embedded import EmbeddedServer
from equitie_data.provision import APPLICATION_ROLE, DATABASE, provision

TARGET = Path(__file__).resolve().parents[1] / "src" / "equitie_data" / "doctor" / "baseline.json"


def text_of(dsn: str, login: str) -> str:
    """The baseline of a database, one fact a line."""
    with connect(dsn) as conn, conn.transaction():
        conn.execute("SELECT pg_catalog.set_config('search_path', '', true)")
        facts = sorted(security_facts(conn, login))
    return "[\n" + ",\n".join(json.dumps(fact, ensure_ascii=False) for fact in facts) + "\n]\n"


def main() -> int:
    """Write the baseline, or say whether it is up to date."""
    with EmbeddedServer() as server:
        provision(server)
        text = text_of(server.dsn(DATABASE), APPLICATION_ROLE)
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        print(f"{TARGET.name}: not what tools/make_security_baseline.py writes; run it.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
