-- Takes the idempotency keys away, unless there are any: without its key, a write that is retried would run again.

LOCK TABLE equitie_private.idempotency_keys IN ACCESS EXCLUSIVE MODE;

DO $$
BEGIN
  IF EXISTS (SELECT FROM equitie_private.idempotency_keys) THEN
    RAISE EXCEPTION 'equitie_private.idempotency_keys holds keys, without which retried writes would run twice'
      USING ERRCODE = 'object_in_use';
  END IF;
END
$$;

DROP FUNCTION equitie_private.purge_idempotency_keys(interval, interval);
DROP FUNCTION equitie_private.idempotent_result(text, text);
DROP FUNCTION equitie_private.store_idempotent_result(text, text);
DROP FUNCTION equitie_private.claim_idempotency_key(text, text, text);
DROP TABLE equitie_private.idempotency_keys;
