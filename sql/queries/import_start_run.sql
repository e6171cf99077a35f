-- The run's row, whose counts follow at the end of the same transaction.
INSERT INTO equitie_private.import_runs (source, source_sha256, started_at, actor)
VALUES (%(source)s, %(source_sha256)s, transaction_timestamp(), %(actor)s)
RETURNING run_id
