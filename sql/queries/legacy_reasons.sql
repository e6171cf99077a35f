-- How many rows, or values of rows, of each kind were not taken over, and why?
SELECT
  r.kind,
  r.outcome = 'value left out' AS left_out,
  r.reason,
  count(*) AS rows
FROM equitie_private.legacy_rejects AS r
WHERE r.run_id = %(run_id)s AND r.outcome <> 'displaced'
GROUP BY 1, 2, 3
ORDER BY 1, 2, 3
