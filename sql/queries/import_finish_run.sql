-- The run's reconciliation, in the transaction it accounts for.
UPDATE equitie_private.import_runs
SET
  finished_at = clock_timestamp(),
  read = %(read)s,
  inserted = %(inserted)s,
  duplicates = %(duplicates)s,
  rejected = %(rejected)s,
  amount_read = %(amount_read)s,
  amount_inserted = %(amount_inserted)s,
  amount_duplicates = %(amount_duplicates)s,
  amount_rejected = %(amount_rejected)s,
  rejected_reasons = %(rejected_reasons)s
WHERE run_id = %(run_id)s
