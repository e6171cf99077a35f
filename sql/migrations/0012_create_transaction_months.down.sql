-- Takes the rollup by month away, and the month report with it. Nothing is lost: the totals are those of the transactions.

DELETE FROM equitie_private.maintenance_tasks AS t
WHERE t.name = 'refresh transaction months';

DROP FUNCTION public.month_report(date, date);
DROP FUNCTION equitie_private.refresh_transaction_months();

DO $$
DECLARE
  watched record;
BEGIN
  FOR watched IN
    SELECT t.tgrelid::regclass AS relation, t.tgname AS name
    FROM pg_catalog.pg_trigger AS t
    WHERE t.tgfoid = 'equitie_private.note_transaction_months()'::regprocedure
    -- The partitioned table first, as writers lock them.
    ORDER BY t.tgrelid <> 'public.transactions_clean'::regclass, t.tgrelid
  LOOP
    EXECUTE format('DROP TRIGGER %I ON %s', watched.name, watched.relation);
  END LOOP;
END
$$;

DROP FUNCTION equitie_private.note_transaction_months();
DROP FUNCTION equitie_private.watch_transaction_months(regclass);
DROP FUNCTION equitie_private.watches_transaction_months(oid);
DROP FUNCTION equitie_private.transaction_months_in(regclass, date, date);
DROP FUNCTION equitie_private.reads_every_transaction();
DROP TABLE equitie_private.transaction_month_changes;
DROP TABLE equitie_private.transaction_month_totals;
DROP TABLE equitie_private.transaction_months;
