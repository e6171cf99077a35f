-- Which tables are looked after, and what is known of each? Cutoffs count from a day that the caller names.
SELECT
  p.parent,
  p.months_ahead,
  extract(year FROM p.keep)::integer * 12 + extract(month FROM p.keep)::integer AS keep_months,
  extract(day FROM p.keep)::integer AS keep_days,
  p.amount_column,
  r.rolname AS owner,
  r.rolname = current_user AS is_owner
FROM equitie_private.retention_policies AS p
LEFT JOIN pg_catalog.pg_class AS c ON c.oid = to_regclass(p.parent)
LEFT JOIN pg_catalog.pg_roles AS r ON r.oid = c.relowner
ORDER BY p.parent
