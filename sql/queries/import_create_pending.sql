-- Which rows does no earlier import know? One line for all exact copies of a row, with their number.
CREATE TEMPORARY TABLE pg_temp.import_pending
ON COMMIT DROP
AS
SELECT DISTINCT ON (staged.row_hash)
  staged.line,
  staged.row_hash,
  staged.deal_key,
  staged.company,
  staged.investor,
  staged.email,
  staged.deal,
  staged.transaction_date,
  staged.amount,
  staged.transaction_type,
  staged.status,
  staged.currency,
  staged.units,
  staged.unit_price,
  count(*) OVER (PARTITION BY staged.row_hash) AS copies
FROM pg_temp.import_rows AS staged
WHERE staged.reason IS NULL
  AND NOT EXISTS (
    SELECT
    FROM equitie_private.imported_rows AS ledger
    WHERE ledger.row_hash = staged.row_hash
  )
ORDER BY staged.row_hash, staged.line
