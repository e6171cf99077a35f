-- How many rows of each kind have another id than in the old tables?
SELECT
  m.kind,
  count(*) AS rows
FROM equitie_private.legacy_ids AS m
WHERE m.run_id = %(run_id)s AND m.new_id <> m.legacy_id
GROUP BY m.kind
ORDER BY m.kind
