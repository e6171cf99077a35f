-- Which rows were rejected, by the file's own rules or by the database, in the file's order?
COPY (
  SELECT
    staged.line,
    coalesce(staged.reason, reject.reason),
    staged.original
  FROM pg_temp.import_rows AS staged
  LEFT JOIN pg_temp.import_rejects AS reject USING (row_hash)
  WHERE staged.reason IS NOT NULL
    OR reject.reason IS NOT NULL
  ORDER BY staged.line
) TO STDOUT
