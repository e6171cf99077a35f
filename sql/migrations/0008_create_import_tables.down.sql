-- Takes the bookkeeping of imports away, unless there was one: without it, a file imported twice would be there twice.

LOCK TABLE equitie_private.import_runs, equitie_private.imported_rows IN ACCESS EXCLUSIVE MODE;

DO $$
BEGIN
  IF EXISTS (SELECT FROM equitie_private.import_runs) OR EXISTS (SELECT FROM equitie_private.imported_rows) THEN
    RAISE EXCEPTION 'equitie_private.import_runs or imported_rows holds rows, without which a file could be imported twice'
      USING ERRCODE = 'object_in_use';
  END IF;
END
$$;

DROP TABLE equitie_private.imported_rows;
DROP TABLE equitie_private.import_runs;
