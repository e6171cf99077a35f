"""How the schema gets into a database: files, history, runs, grants. Use it through `equitie_data.migrate`."""

from __future__ import annotations
