-- Takes the rejected rows out of the pending ones.
DELETE FROM pg_temp.import_pending AS pending
USING pg_temp.import_rejects AS reject
WHERE reject.row_hash = pending.row_hash
