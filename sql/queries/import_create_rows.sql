-- Where the file's rows are staged: checked and normalised, nothing resolved yet. Rejected rows stand here too, with
-- their reason, when a rejects file is wanted; "original" (their fields as read) is kept for that file alone.
CREATE TEMPORARY TABLE pg_temp.import_rows (
  line bigint NOT NULL,
  row_hash uuid,
  deal_key text,
  company text,
  investor text,
  email text,
  deal text,
  transaction_date date,
  amount numeric,
  transaction_type text,
  status text,
  currency char(3),
  units numeric,
  unit_price numeric,
  reason text,
  original text[]
)
ON COMMIT DROP
