-- An id alone leads to its transaction, and to one only: the triggers stand, and the entries of strays agree with the rows.
SELECT format('%s lacks the trigger %s, or has it switched off: ids are not unique while it is.', t.relid::regclass, g.name)
FROM pg_partition_tree('public.transactions_clean') AS t
CROSS JOIN unnest(ARRAY[
  'compose_transaction_id', 'claim_transaction_id', 'claim_changed_transaction_id', 'z_move_transaction',
  'release_transaction_id'
]) AS g (name)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_trigger AS x
  WHERE x.tgrelid = t.relid AND x.tgname = g.name AND x.tgenabled IN ('O', 'A')
)
ORDER BY 1;

SELECT format('The trigger %I of %s runs after z_move_transaction and may undo what that has noted: give it a name before "z".', x.tgname, x.tgrelid::regclass)
FROM pg_catalog.pg_trigger AS x
WHERE
  x.tgrelid IN (SELECT t.relid FROM pg_partition_tree('public.transactions_clean') AS t)
  -- Bits of tgtype: row 1, BEFORE 2, UPDATE 16.
  AND x.tgtype & 19 = 19
  AND x.tgname > 'z_move_transaction';

SELECT format('%s transactions have no entry in equitie_private.stray_transactions, or one with another date or investor, so their ids do not find them (the first: %s).', count(*), min(t.transaction_id))
FROM public.transactions_clean AS t
LEFT JOIN equitie_private.stray_transactions AS s ON s.transaction_id = t.transaction_id
WHERE
  CASE
    WHEN equitie_private.transaction_day(t.transaction_id) = t.transaction_date THEN s.transaction_id IS NOT NULL AND s.reserved_by IS NULL
    ELSE (s.transaction_date, s.investor_id) IS DISTINCT FROM (t.transaction_date, t.investor_id)
  END
HAVING count(*) > 0;

SELECT format('%s entries of equitie_private.stray_transactions have no transaction (the first: %s): delete them, they keep their ids from being used elsewhere.', count(*), min(s.transaction_id))
FROM equitie_private.stray_transactions AS s
WHERE
  s.reserved_by IS NULL
  AND NOT EXISTS (
    SELECT FROM public.transactions_clean AS t
    WHERE t.transaction_id = s.transaction_id AND t.transaction_date = s.transaction_date
  )
HAVING count(*) > 0;

SELECT format('equitie_private.displaced_number_blocks is behind the ids that left their day, as after a switch to a logical replica: SELECT equitie_private.note_displaced_number(%s).', max(s.transaction_id % 100000000))
FROM equitie_private.stray_transactions AS s
WHERE equitie_private.transaction_day(s.transaction_id) IS NOT NULL
HAVING max(s.transaction_id % 100000000) >= pg_sequence_last_value('equitie_private.displaced_number_blocks') * 1000;
