-- How many rows, and what amount, did earlier imports bring in already?
SELECT
  count(*),
  coalesce(sum(staged.amount), 0)::text
FROM pg_temp.import_rows AS staged
JOIN equitie_private.imported_rows AS ledger USING (row_hash)
