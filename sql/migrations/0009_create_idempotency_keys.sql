-- Keys of writes that must happen once, with what the first run returned.

CREATE TABLE equitie_private.idempotency_keys (
  key text NOT NULL,
  actor text NOT NULL,
  name text,
  result text,
  created_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT idempotency_keys_pkey PRIMARY KEY (key),
  CONSTRAINT chk_idempotency_keys_length
    CHECK (length(key) BETWEEN 1 AND 255)
);

COMMENT ON TABLE equitie_private.idempotency_keys IS 'One row for every write that was given a key, made in the write''s own transaction: the row is there if and only if the write is.';
COMMENT ON COLUMN equitie_private.idempotency_keys.key IS 'What the application calls the write; "auto:..." for those the library names itself, to learn what became of them.';
COMMENT ON COLUMN equitie_private.idempotency_keys.actor IS 'Who wrote: a user id, or "service". Nobody else is given the result.';
COMMENT ON COLUMN equitie_private.idempotency_keys.name IS 'What the application calls the operation, if it says.';
COMMENT ON COLUMN equitie_private.idempotency_keys.result IS 'What the first run returned, as JSON; NULL when that cannot be written as JSON.';
COMMENT ON COLUMN equitie_private.idempotency_keys.created_at IS 'When the write began; its retention counts from here.';

CREATE INDEX idx_idempotency_keys_created
ON equitie_private.idempotency_keys USING brin (created_at);

COMMENT ON INDEX equitie_private.idx_idempotency_keys_created IS 'Finds the keys whose retention is over, which are the oldest rows.';

ALTER TABLE equitie_private.idempotency_keys ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON equitie_private.idempotency_keys FROM PUBLIC, anon, authenticated, equitie_staff, service_role;

CREATE FUNCTION equitie_private.claim_idempotency_key(wanted text, claimant text, operation text) RETURNS boolean
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  first_run record;
BEGIN
  -- Waits for a transaction that holds the key: of two at once, the second learns what became of the first.
  INSERT INTO equitie_private.idempotency_keys (key, actor, name)
  VALUES (wanted, claimant, operation)
  ON CONFLICT (key) DO NOTHING;
  IF FOUND THEN
    RETURN true;
  END IF;

  SELECT k.actor, k.name
  INTO first_run
  FROM equitie_private.idempotency_keys AS k
  WHERE k.key = wanted;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'the idempotency key was removed while it was claimed'
      USING ERRCODE = 'serialization_failure';
  ELSIF first_run.actor <> claimant THEN
    RAISE EXCEPTION 'the idempotency key is another actor''s'
      USING ERRCODE = 'EQ002';
  ELSIF first_run.name <> operation THEN
    RAISE EXCEPTION 'the idempotency key is another operation''s'
      USING ERRCODE = 'EQ003';
  END IF;
  -- Without the result: errors end up in server logs.
  RAISE EXCEPTION 'the write with this idempotency key is committed already'
    USING ERRCODE = 'EQ001';
END
$$;

CREATE FUNCTION equitie_private.store_idempotent_result(claimed text, outcome text) RETURNS boolean
LANGUAGE sql
SECURITY DEFINER
SET search_path = ''
AS $$
  UPDATE equitie_private.idempotency_keys AS k
  SET result = outcome
  -- Only what this very transaction has claimed.
  WHERE k.key = claimed AND k.xmin = pg_current_xact_id()::xid
  RETURNING true
$$;

CREATE FUNCTION equitie_private.idempotent_result(claimed text, claimant text, OUT result text, OUT created_at timestamptz)
RETURNS record
LANGUAGE sql STABLE
SECURITY DEFINER
SET search_path = ''
AS $$
  SELECT k.result, k.created_at
  FROM equitie_private.idempotency_keys AS k
  WHERE k.key = claimed AND k.actor = claimant
$$;

CREATE FUNCTION equitie_private.purge_idempotency_keys(older_than interval, automatic_older_than interval) RETURNS bigint
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  purged bigint;
BEGIN
  DELETE FROM equitie_private.idempotency_keys AS k
  WHERE
    k.created_at < now() - least(older_than, automatic_older_than)
    AND (k.created_at < now() - older_than OR k.key LIKE 'auto:%');
  GET DIAGNOSTICS purged = ROW_COUNT;
  RETURN purged;
END
$$;

COMMENT ON FUNCTION equitie_private.claim_idempotency_key(text, text, text) IS 'Takes a key for this transaction. EQ001: its write is committed already. EQ002: it is another actor''s. EQ003: it is another operation''s. For the application''s login role alone.';
COMMENT ON FUNCTION equitie_private.store_idempotent_result(text, text) IS 'Keeps what the write returned, for a key that this very transaction has claimed and no other.';
COMMENT ON FUNCTION equitie_private.idempotent_result(text, text) IS 'What the first run returned, for the actor whose key it is. For the application''s login role alone.';
COMMENT ON FUNCTION equitie_private.purge_idempotency_keys(interval, interval) IS 'Removes keys whose retention is over: the application''s, and the library''s own.';

REVOKE ALL ON FUNCTION equitie_private.claim_idempotency_key(text, text, text) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.store_idempotent_result(text, text) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.idempotent_result(text, text) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.purge_idempotency_keys(interval, interval) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
-- Called before COMMIT under the write's own role: deferred triggers run as whoever commits (before PostgreSQL 18).
GRANT EXECUTE ON FUNCTION equitie_private.store_idempotent_result(text, text) TO authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.purge_idempotency_keys(interval, interval) TO service_role;

-- Login roles of before get the new functions as well: whoever may ask for a user's database role is one.
DO $$
DECLARE
  login name;
BEGIN
  FOR login IN
    SELECT r.rolname
    FROM pg_proc AS p
    CROSS JOIN LATERAL aclexplode(p.proacl) AS a
    INNER JOIN pg_roles AS r ON r.oid = a.grantee
    WHERE
      p.oid = 'equitie_private.database_role(uuid)'::regprocedure
      AND a.grantee <> p.proowner
  LOOP
    EXECUTE format('GRANT EXECUTE ON FUNCTION equitie_private.claim_idempotency_key(text, text, text) TO %I', login);
    EXECUTE format('GRANT EXECUTE ON FUNCTION equitie_private.store_idempotent_result(text, text) TO %I', login);
    EXECUTE format('GRANT EXECUTE ON FUNCTION equitie_private.idempotent_result(text, text) TO %I', login);
  END LOOP;
END
$$;
