-- A transaction's id carries its day, so that the id alone leads to its month and is unique over all of them.
--
-- transaction_id = YYYYMMDD * 100,000,000 + number. A row whose id carries its date ("native") is unique through the
-- primary key (transaction_id, transaction_date) alone, because its id allows one date only. Every other row ("stray":
-- an id from before this migration, or a date that was corrected) has an entry in equitie_private.stray_transactions,
-- whose primary key is the id. The entry says where the id lives; without one, it can live on its own day only. Why no
-- id can stand twice, at any isolation level: docs/explanation/transaction-ids.md.

-- squawk-ignore-file constraint-missing-not-valid
-- The constraints are checked before they are added, under the lock the migration needs anyway.

LOCK TABLE public.transactions_clean IN ACCESS EXCLUSIVE MODE;

DO $$
DECLARE
  wrong bigint;
  example text;
BEGIN
  SELECT count(*), min(t.transaction_date)::text
  INTO STRICT wrong, example
  FROM public.transactions_clean AS t
  WHERE t.transaction_date < '1000-01-01' OR t.transaction_date > '9006-12-31';
  IF wrong > 0 THEN
    RAISE EXCEPTION '% transactions have a date outside 1000-01-01 to 9006-12-31 (the first: %): correct them, then migrate again', wrong, example
      USING
        ERRCODE = 'check_violation',
        HINT = 'SELECT * FROM public.transactions_clean WHERE transaction_date < ''1000-01-01'' OR transaction_date > ''9006-12-31'';';
  END IF;

  SELECT count(*), min(t.transaction_id)::text
  INTO STRICT wrong, example
  FROM public.transactions_clean AS t
  WHERE t.transaction_id <= 0;
  IF wrong > 0 THEN
    RAISE EXCEPTION '% transactions have an id that is not positive (the first: %): give them other ids, then migrate again', wrong, example
      USING ERRCODE = 'check_violation';
  END IF;

  SELECT count(*), min(d.transaction_id)::text
  INTO STRICT wrong, example
  FROM (
    SELECT t.transaction_id
    FROM public.transactions_clean AS t
    GROUP BY t.transaction_id
    HAVING count(*) > 1
  ) AS d;
  IF wrong > 0 THEN
    RAISE EXCEPTION '% transaction ids stand for more than one transaction (the first: %): give all but one of them another id, then migrate again', wrong, example
      USING
        ERRCODE = 'unique_violation',
        HINT = 'SELECT transaction_id, array_agg(transaction_date) FROM public.transactions_clean GROUP BY 1 HAVING count(*) > 1;';
  END IF;
END
$$;

CREATE FUNCTION equitie_private.transaction_day(transaction_id bigint) RETURNS date
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = ''
AS $$
DECLARE
  digits bigint := transaction_id / 100000000;
  year integer;
  month integer;
  last_day integer;
BEGIN
  IF digits NOT BETWEEN 10000101 AND 90061231 THEN
    RETURN NULL;
  END IF;
  year := digits / 10000;
  month := digits / 100 % 100;
  last_day := CASE
    WHEN month IN (4, 6, 9, 11) THEN 30
    WHEN month IN (1, 3, 5, 7, 8, 10, 12) THEN 31
    WHEN month <> 2 THEN 0
    WHEN year % 4 = 0 AND (year % 100 <> 0 OR year % 400 = 0) THEN 29
    ELSE 28
  END;
  IF digits % 100 NOT BETWEEN 1 AND last_day THEN
    RETURN NULL;
  END IF;
  RETURN make_date(year, month, (digits % 100)::integer);
END
$$;

COMMENT ON FUNCTION equitie_private.transaction_day(bigint) IS 'The day a transaction id carries; NULL for an id that carries none.';

CREATE TABLE equitie_private.stray_transactions (
  transaction_id bigint,
  transaction_date date NOT NULL,
  investor_id integer NOT NULL,
  reserved_by xid8,
  CONSTRAINT stray_transactions_pkey PRIMARY KEY (transaction_id)
);

COMMENT ON TABLE equitie_private.stray_transactions IS 'Where transactions live whose id does not carry their date: ids older than migration 0010, and corrected dates. Kept by triggers of public.transactions_clean.';
COMMENT ON COLUMN equitie_private.stray_transactions.transaction_id IS 'Key: the transaction.';
COMMENT ON COLUMN equitie_private.stray_transactions.transaction_date IS 'The only day on which a transaction with this id can stand.';
COMMENT ON COLUMN equitie_private.stray_transactions.investor_id IS 'Its investor, who may read this entry. Not a foreign key: the transaction''s own cascades, and takes the entry along.';
COMMENT ON COLUMN equitie_private.stray_transactions.reserved_by IS 'The database transaction that reserved the id for a row yet to be restored; NULL once the row stands.';

INSERT INTO equitie_private.stray_transactions (transaction_id, transaction_date, investor_id)
SELECT
  t.transaction_id,
  t.transaction_date,
  t.investor_id
FROM public.transactions_clean AS t
WHERE equitie_private.transaction_day(t.transaction_id) IS DISTINCT FROM t.transaction_date
ORDER BY t.transaction_id;

-- Almost no id ever leaves its day, so a new row should not pay for the few that do. This sequence is the filter: an id
-- that left its day has a number below 1,000 times its value. nextval() is seen by everybody at once, whatever becomes
-- of the transaction and however old the others' snapshots are, and never goes back.
CREATE SEQUENCE equitie_private.displaced_number_blocks
MINVALUE 0
MAXVALUE 100000;

COMMENT ON SEQUENCE equitie_private.displaced_number_blocks IS 'Ids that carry a day and stand on another have numbers (the last eight digits) below 1,000 times this.';

SELECT setval('equitie_private.displaced_number_blocks', 0);

CREATE FUNCTION equitie_private.note_displaced_number(transaction_id bigint) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
  -- Step by step: of two sessions that call setval() at once, the lower value may be the last.
  WHILE pg_sequence_last_value('equitie_private.displaced_number_blocks') * 1000 <= transaction_id % 100000000 LOOP
    PERFORM nextval('equitie_private.displaced_number_blocks');
  END LOOP;
END
$$;

COMMENT ON FUNCTION equitie_private.note_displaced_number(bigint) IS 'Raises equitie_private.displaced_number_blocks to cover an id. To be called before the id leaves its day.';

SELECT equitie_private.note_displaced_number(max(s.transaction_id % 100000000))
FROM equitie_private.stray_transactions AS s
WHERE equitie_private.transaction_day(s.transaction_id) IS NOT NULL;

-- Triggers ----------------------------------------------------------------------------------------------------------
-- Their functions run as the owner: whoever writes a transaction needs no privilege on the entries, and sees all of
-- them. The day as digits is written out in each, because a call per row would cost more than the rest.

CREATE FUNCTION equitie_private.compose_transaction_id() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
  -- A date that is missing or out of range is left to its own constraint, which says what is wrong.
  IF NEW.transaction_date BETWEEN '1000-01-01' AND '9006-12-31' THEN
    NEW.transaction_id := (
      date_part('year', NEW.transaction_date) * 10000
      + date_part('month', NEW.transaction_date) * 100
      + date_part('day', NEW.transaction_date)
    )::bigint * 100000000 - (NEW.transaction_id + 1) % 100000000;
  END IF;
  RETURN NEW;
END
$$;

CREATE FUNCTION equitie_private.claim_transaction_id() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  own_day date;
  entry record;
  violated text;
BEGIN
  IF NEW.transaction_id / 100000000 = (
    date_part('year', NEW.transaction_date) * 10000
    + date_part('month', NEW.transaction_date) * 100
    + date_part('day', NEW.transaction_date)
  )::bigint THEN
    -- Native. Its place in the primary key is taken by now: whoever moved this id away from this day has committed, and
    -- the entry is there to be seen; nobody can move it away from now on but from this row.
    IF current_setting('transaction_isolation') IN ('read committed', 'read uncommitted') THEN
      PERFORM FROM equitie_private.stray_transactions AS s
      WHERE s.transaction_id = NEW.transaction_id;
      IF NOT FOUND THEN
        RETURN NULL;
      END IF;
    ELSE
      -- The snapshot may be older than the entry; a unique index is not misled by it.
      INSERT INTO equitie_private.stray_transactions (transaction_id, transaction_date, investor_id)
      VALUES (NEW.transaction_id, NEW.transaction_date, NEW.investor_id)
      ON CONFLICT (transaction_id) DO NOTHING;
      IF FOUND THEN
        DELETE FROM equitie_private.stray_transactions AS s
        WHERE s.transaction_id = NEW.transaction_id;
        RETURN NULL;
      END IF;
    END IF;
    RAISE EXCEPTION 'this transaction id stands on another date already'
      USING
        ERRCODE = 'unique_violation',
        CONSTRAINT = 'stray_transactions_pkey',
        DETAIL = format('Transaction %s is listed in equitie_private.stray_transactions.', NEW.transaction_id),
        HINT = 'Leave the id out to have one made.';
  END IF;

  own_day := equitie_private.transaction_day(NEW.transaction_id);
  LOOP
    IF own_day IS NULL THEN
      INSERT INTO equitie_private.stray_transactions (transaction_id, transaction_date, investor_id)
      VALUES (NEW.transaction_id, NEW.transaction_date, NEW.investor_id)
      ON CONFLICT (transaction_id) DO NOTHING;
      IF FOUND THEN
        RETURN NULL;
      END IF;
    END IF;

    SELECT s.transaction_date, s.investor_id, s.reserved_by
    INTO entry
    FROM equitie_private.stray_transactions AS s
    WHERE s.transaction_id = NEW.transaction_id
    FOR UPDATE;
    EXIT WHEN FOUND;
    IF own_day IS NOT NULL THEN
      RAISE EXCEPTION 'this transaction id carries another day than the transaction''s date'
        USING
          ERRCODE = 'check_violation',
          CONSTRAINT = 'stray_transactions_pkey',
          DETAIL = format('Transaction id %s belongs to %s, not to %s.', NEW.transaction_id, own_day, NEW.transaction_date),
          HINT = 'Leave the id out to have one made. To correct a date, update the transaction. To restore one whose date was corrected, call equitie_private.reserve_stray() first.';
    END IF;
  END LOOP;

  IF entry.transaction_date <> NEW.transaction_date THEN
    RAISE EXCEPTION 'this transaction id stands on another date already'
      USING
        ERRCODE = 'unique_violation',
        CONSTRAINT = 'stray_transactions_pkey',
        DETAIL = format('Transaction %s is listed in equitie_private.stray_transactions on %s.', NEW.transaction_id, entry.transaction_date);
  END IF;

  IF entry.reserved_by = pg_current_xact_id() AND own_day IS NOT NULL THEN
    -- Others cannot see the reservation yet, and might be giving the id out on its own day.
    RAISE EXCEPTION 'the reservation of this transaction id is not committed yet'
      USING
        ERRCODE = 'object_not_in_prerequisite_state',
        DETAIL = format('Transaction %s.', NEW.transaction_id),
        HINT = 'Call equitie_private.reserve_stray() in a transaction of its own, then insert.';
  ELSIF entry.reserved_by IS NOT NULL AND own_day IS NOT NULL THEN
    -- From the commit of the reservation on nobody gives the id out on its own day. Whether somebody did before, even
    -- one who has not committed yet, only the primary key can tell: so try, and be refused by this very trigger.
    BEGIN
      INSERT INTO public.transactions_clean (transaction_id, deal_id, investor_id, transaction_date, amount)
      VALUES (NEW.transaction_id, NEW.deal_id, NEW.investor_id, own_day, 0);
      RAISE EXCEPTION 'the entry of a transaction id was not respected'
        USING ERRCODE = 'assert_failure';
    EXCEPTION
      WHEN unique_violation THEN
        GET STACKED DIAGNOSTICS violated = CONSTRAINT_NAME;
        IF violated <> 'stray_transactions_pkey' THEN
          RAISE EXCEPTION 'this transaction id stands on its own day already'
            USING
              ERRCODE = 'unique_violation',
              CONSTRAINT = 'stray_transactions_pkey',
              DETAIL = format('Transaction %s stands on %s.', NEW.transaction_id, own_day);
        END IF;
    END;
  END IF;

  IF entry.reserved_by IS NOT NULL OR entry.investor_id <> NEW.investor_id THEN
    UPDATE equitie_private.stray_transactions AS s
    SET
      investor_id = NEW.investor_id,
      reserved_by = NULL
    WHERE s.transaction_id = NEW.transaction_id;
  END IF;
  RETURN NULL;
END
$$;

CREATE FUNCTION equitie_private.move_transaction() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  -- The row is locked by now, and stands where its id lives; so this transaction may say where it lives from now on.
  -- A move to another partition is a DELETE and an INSERT, whose triggers find the entry as it is left here.
  IF NEW.transaction_id <> OLD.transaction_id THEN
    DELETE FROM equitie_private.stray_transactions AS s
    WHERE s.transaction_id = OLD.transaction_id AND s.transaction_date = OLD.transaction_date;
  ELSIF equitie_private.transaction_day(NEW.transaction_id) IS DISTINCT FROM NEW.transaction_date THEN
    IF equitie_private.transaction_day(NEW.transaction_id) IS NOT NULL THEN
      PERFORM equitie_private.note_displaced_number(NEW.transaction_id);
    END IF;
    INSERT INTO equitie_private.stray_transactions AS s (transaction_id, transaction_date, investor_id)
    VALUES (NEW.transaction_id, NEW.transaction_date, NEW.investor_id)
    ON CONFLICT (transaction_id) DO UPDATE
    SET
      transaction_date = excluded.transaction_date,
      investor_id = excluded.investor_id,
      reserved_by = NULL;
  ELSE
    DELETE FROM equitie_private.stray_transactions AS s
    WHERE s.transaction_id = NEW.transaction_id;
  END IF;
  RETURN NEW;
END
$$;

CREATE FUNCTION equitie_private.release_transaction_id() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  IF TG_OP = 'DELETE' THEN
    -- Of a row that moves, the entry names the new date by now.
    DELETE FROM equitie_private.stray_transactions AS s
    WHERE s.transaction_id = OLD.transaction_id AND s.transaction_date = OLD.transaction_date;
  ELSIF TG_RELID = 'public.transactions_clean'::regclass THEN
    DELETE FROM equitie_private.stray_transactions AS s
    WHERE s.reserved_by IS NULL;
  ELSE
    PERFORM equitie_private.forget_strays(TG_RELID);
  END IF;
  RETURN NULL;
END
$$;

COMMENT ON FUNCTION equitie_private.compose_transaction_id() IS 'Row trigger: makes the id of a new transaction from its date and the number its column''s default drew.';
COMMENT ON FUNCTION equitie_private.claim_transaction_id() IS 'Row trigger: refuses a transaction whose id stands on another date; enters a stray one.';
COMMENT ON FUNCTION equitie_private.move_transaction() IS 'Row trigger: has the entry follow a transaction whose date, id or investor changes.';
COMMENT ON FUNCTION equitie_private.release_transaction_id() IS 'Trigger: removes the entries of deleted transactions.';

-- For whoever moves whole partitions or restores an archive ----------------------------------------------------------

CREATE FUNCTION equitie_private.forget_strays(partition regclass) RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  forgotten bigint;
BEGIN
  EXECUTE format(
    'DELETE FROM equitie_private.stray_transactions AS s USING ONLY %s AS t'
    ' WHERE s.transaction_id = t.transaction_id AND s.transaction_date = t.transaction_date AND s.reserved_by IS NULL',
    partition
  );
  GET DIAGNOSTICS forgotten = ROW_COUNT;
  RETURN forgotten;
END
$$;

CREATE FUNCTION equitie_private.remember_strays(partition regclass) RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  highest bigint;
  strays bigint;
  conflicting bigint;
  remembered bigint;
BEGIN
  IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
    RAISE EXCEPTION 'strays can be remembered at READ COMMITTED only: an older snapshot would hide ids that were given out since'
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;

  EXECUTE format(
    'SELECT count(*), max(t.transaction_id %% 100000000) FILTER (WHERE equitie_private.transaction_day(t.transaction_id) IS NOT NULL)'
    ' FROM ONLY %s AS t'
    ' WHERE equitie_private.transaction_day(t.transaction_id) IS DISTINCT FROM t.transaction_date',
    partition
  )
  INTO STRICT strays, highest;
  IF highest IS NOT NULL THEN
    PERFORM equitie_private.note_displaced_number(highest);
    -- Nobody may be giving out one of these ids on its own day: wait for whoever is writing, and hold off the rest.
    LOCK TABLE public.transactions_clean IN SHARE ROW EXCLUSIVE MODE;
    EXECUTE format(
      'SELECT count(*) FROM ONLY %s AS t'
      ' INNER JOIN public.transactions_clean AS n'
      ' ON n.transaction_id = t.transaction_id AND n.transaction_date = equitie_private.transaction_day(t.transaction_id)'
      ' WHERE n.transaction_date <> t.transaction_date',
      partition
    )
    INTO STRICT conflicting;
    IF conflicting > 0 THEN
      RAISE EXCEPTION '% transaction ids of % stand on their own days in public.transactions_clean already', conflicting, partition
        USING ERRCODE = 'unique_violation';
    END IF;
  END IF;

  EXECUTE format(
    'SELECT count(*) FROM ONLY %s AS t'
    ' INNER JOIN equitie_private.stray_transactions AS s ON s.transaction_id = t.transaction_id'
    ' WHERE s.transaction_date <> t.transaction_date',
    partition
  )
  INTO STRICT conflicting;
  IF conflicting > 0 THEN
    RAISE EXCEPTION '% transaction ids of % stand on other dates in public.transactions_clean already', conflicting, partition
      USING
        ERRCODE = 'unique_violation',
        HINT = 'equitie_private.stray_transactions lists them.';
  END IF;

  EXECUTE format(
    'INSERT INTO equitie_private.stray_transactions AS s (transaction_id, transaction_date, investor_id)'
    ' SELECT t.transaction_id, t.transaction_date, t.investor_id FROM ONLY %s AS t'
    ' WHERE equitie_private.transaction_day(t.transaction_id) IS DISTINCT FROM t.transaction_date'
    ' ORDER BY t.transaction_id'
    ' ON CONFLICT (transaction_id) DO UPDATE'
    ' SET investor_id = excluded.investor_id, reserved_by = NULL'
    ' WHERE s.transaction_date = excluded.transaction_date',
    partition
  );
  GET DIAGNOSTICS remembered = ROW_COUNT;
  IF remembered <> strays THEN
    RAISE EXCEPTION 'transaction ids of % were given out while it was being attached: try again', partition
      USING ERRCODE = 'unique_violation';
  END IF;
  RETURN remembered;
END
$$;

CREATE FUNCTION equitie_private.reserve_stray(transaction_id bigint, transaction_date date, investor_id integer)
RETURNS boolean
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  own_day date := equitie_private.transaction_day(transaction_id);
BEGIN
  IF own_day IS NULL OR own_day = transaction_date THEN
    RETURN false;
  END IF;
  PERFORM equitie_private.note_displaced_number(transaction_id);
  INSERT INTO equitie_private.stray_transactions AS s (transaction_id, transaction_date, investor_id, reserved_by)
  VALUES (reserve_stray.transaction_id, reserve_stray.transaction_date, reserve_stray.investor_id, pg_current_xact_id())
  ON CONFLICT ON CONSTRAINT stray_transactions_pkey DO NOTHING;
  IF FOUND THEN
    RETURN true;
  END IF;
  PERFORM FROM equitie_private.stray_transactions AS s
  WHERE s.transaction_id = reserve_stray.transaction_id AND s.transaction_date = reserve_stray.transaction_date;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'this transaction id stands on another date already'
      USING
        ERRCODE = 'unique_violation',
        CONSTRAINT = 'stray_transactions_pkey',
        DETAIL = format('Transaction %s is listed in equitie_private.stray_transactions.', reserve_stray.transaction_id);
  END IF;
  RETURN true;
END
$$;

CREATE FUNCTION equitie_private.cancel_stray_reservation(transaction_id bigint) RETURNS boolean
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  DELETE FROM equitie_private.stray_transactions AS s
  WHERE s.transaction_id = cancel_stray_reservation.transaction_id AND s.reserved_by IS NOT NULL;
  RETURN FOUND;
END
$$;

COMMENT ON FUNCTION equitie_private.forget_strays(regclass) IS 'Removes the entries of the strays in a partition, and says how many. Call it in the transaction that detaches the partition, or before the detached table is dropped.';
COMMENT ON FUNCTION equitie_private.remember_strays(regclass) IS 'Enters the strays of a table that is about to be attached to public.transactions_clean, says how many, and refuses ids that stand elsewhere. Call it in the transaction that attaches the table.';
COMMENT ON FUNCTION equitie_private.reserve_stray(bigint, date, integer) IS 'Reserves an id that carries another day for a row that is to be restored; false if the id needs none. Commit before inserting the row.';
COMMENT ON FUNCTION equitie_private.cancel_stray_reservation(bigint) IS 'Gives up a reservation whose row was not restored; false if there is none.';

-- Ids from now on ----------------------------------------------------------------------------------------------------
-- The column's default counts down from -1. What is below zero is a number that waits for its day, and no id.

ALTER TABLE public.transactions_clean
ALTER COLUMN transaction_id
SET INCREMENT BY -1
SET MINVALUE -9223372036854775808
SET MAXVALUE -1
SET START WITH -1
RESTART;

ALTER TABLE public.transactions_clean
ADD CONSTRAINT chk_transactions_date
CHECK (transaction_date BETWEEN '1000-01-01' AND '9006-12-31'),
ADD CONSTRAINT chk_transactions_id
CHECK (transaction_id > 0);

CREATE TRIGGER compose_transaction_id
BEFORE INSERT ON public.transactions_clean
FOR EACH ROW
WHEN (NEW.transaction_id < 0)
EXECUTE FUNCTION equitie_private.compose_transaction_id();

-- Evaluated when the row is in the primary key already, which is what the filter's soundness rests on.
CREATE TRIGGER claim_transaction_id
AFTER INSERT ON public.transactions_clean
FOR EACH ROW
WHEN (
  NEW.transaction_id / 100000000 <> (
    date_part('year', NEW.transaction_date) * 10000
    + date_part('month', NEW.transaction_date) * 100
    + date_part('day', NEW.transaction_date)
  )::bigint
  -- NULL is for whoever may not read the sequence.
  OR coalesce(
    NEW.transaction_id % 100000000 < pg_sequence_last_value('equitie_private.displaced_number_blocks') * 1000,
    true
  )
)
EXECUTE FUNCTION equitie_private.claim_transaction_id();

CREATE TRIGGER claim_changed_transaction_id
AFTER UPDATE ON public.transactions_clean
FOR EACH ROW
WHEN (OLD.transaction_id <> NEW.transaction_id OR OLD.transaction_date <> NEW.transaction_date)
EXECUTE FUNCTION equitie_private.claim_transaction_id();

-- The last of its kind, by name: what it notes must be what is written.
CREATE TRIGGER z_move_transaction
BEFORE UPDATE ON public.transactions_clean
FOR EACH ROW
WHEN (
  OLD.transaction_id <> NEW.transaction_id
  OR OLD.transaction_date <> NEW.transaction_date
  OR OLD.investor_id <> NEW.investor_id
)
EXECUTE FUNCTION equitie_private.move_transaction();

CREATE TRIGGER release_transaction_id
AFTER DELETE ON public.transactions_clean
FOR EACH ROW
WHEN (
  OLD.transaction_id / 100000000 IS DISTINCT FROM (
    date_part('year', OLD.transaction_date) * 10000
    + date_part('month', OLD.transaction_date) * 100
    + date_part('day', OLD.transaction_date)
  )::bigint
)
EXECUTE FUNCTION equitie_private.release_transaction_id();

DO $$
DECLARE
  member regclass;
BEGIN
  FOR member IN SELECT t.relid FROM pg_partition_tree('public.transactions_clean') AS t LOOP
    EXECUTE format(
      'CREATE TRIGGER release_transaction_ids BEFORE TRUNCATE ON %s'
      ' FOR EACH STATEMENT EXECUTE FUNCTION equitie_private.release_transaction_id()',
      member
    );
  END LOOP;
END
$$;

COMMENT ON COLUMN public.transactions_clean.transaction_id IS 'Key: YYYYMMDD * 100,000,000 + a number, from the day the transaction was made for; or an older, smaller number. It stays when the date is corrected. Unique over all months: see equitie_private.stray_transactions.';
COMMENT ON COLUMN public.transactions_clean.transaction_date IS 'Day of the transaction, from 1000-01-01 to 9006-12-31; decides its partition. Queries that name it read one month instead of all.';

-- Lookup -------------------------------------------------------------------------------------------------------------

CREATE FUNCTION public.get_transaction(transaction_id bigint) RETURNS SETOF public.transactions_clean
LANGUAGE plpgsql STABLE STRICT PARALLEL SAFE
ROWS 1
SET search_path = ''
-- A plan kept for any date would lock every partition; this one is made for its date and locks one.
SET plan_cache_mode = 'force_custom_plan'
-- Whether CHECK constraints rule the one partition out takes longer to prove than all the rest of the planning.
SET constraint_exclusion = 'off'
AS $$
DECLARE
  day date := equitie_private.transaction_day(transaction_id);
BEGIN
  IF day IS NOT NULL THEN
    RETURN QUERY
    SELECT t.*
    FROM public.transactions_clean AS t
    WHERE t.transaction_id = get_transaction.transaction_id AND t.transaction_date = day;
    IF FOUND THEN
      RETURN;
    END IF;
  END IF;

  SELECT s.transaction_date
  INTO day
  FROM equitie_private.stray_transactions AS s
  WHERE s.transaction_id = get_transaction.transaction_id;
  IF FOUND THEN
    RETURN QUERY
    SELECT t.*
    FROM public.transactions_clean AS t
    WHERE t.transaction_id = get_transaction.transaction_id AND t.transaction_date = day;
  END IF;
END
$$;

COMMENT ON FUNCTION public.get_transaction(bigint) IS 'The transaction with this id, if the caller may see it; reads one partition.';

-- Privileges and policies --------------------------------------------------------------------------------------------

REVOKE ALL ON equitie_private.stray_transactions FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
GRANT SELECT ON equitie_private.stray_transactions TO authenticated, equitie_staff, service_role;

REVOKE ALL ON SEQUENCE equitie_private.displaced_number_blocks FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
GRANT SELECT ON SEQUENCE equitie_private.displaced_number_blocks TO equitie_staff, service_role;

ALTER TABLE equitie_private.stray_transactions ENABLE ROW LEVEL SECURITY;

CREATE POLICY stray_transactions_select_authenticated ON equitie_private.stray_transactions
FOR SELECT TO authenticated
USING (investor_id = (SELECT equitie_private.current_investor_id()));

CREATE POLICY stray_transactions_select_staff ON equitie_private.stray_transactions
FOR SELECT TO equitie_staff
USING (true);

CREATE POLICY stray_transactions_select_service ON equitie_private.stray_transactions
FOR SELECT TO service_role
USING (true);

REVOKE ALL ON FUNCTION equitie_private.transaction_day(bigint) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.note_displaced_number(bigint) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.compose_transaction_id() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.claim_transaction_id() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.move_transaction() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.release_transaction_id() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.forget_strays(regclass) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.remember_strays(regclass) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.reserve_stray(bigint, date, integer) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.cancel_stray_reservation(bigint) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION public.get_transaction(bigint) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.transaction_day(bigint) TO authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.reserve_stray(bigint, date, integer) TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.cancel_stray_reservation(bigint) TO service_role;
GRANT EXECUTE ON FUNCTION public.get_transaction(bigint) TO authenticated, equitie_staff, service_role;
