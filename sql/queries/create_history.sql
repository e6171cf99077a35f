-- Makes equitie_migrations.history, or brings one of the first layout to this release's: a database of either ends alike.
CREATE SCHEMA IF NOT EXISTS equitie_migrations;

CREATE TABLE IF NOT EXISTS equitie_migrations.history (
  event_id bigint GENERATED ALWAYS AS IDENTITY,
  version integer NOT NULL,
  name text NOT NULL,
  sha256 text NOT NULL,
  state text NOT NULL,
  started_at timestamptz NOT NULL,
  finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  duration_ms double precision NOT NULL,
  applied_by text NOT NULL DEFAULT session_user,
  server_version text NOT NULL DEFAULT current_setting('server_version'),
  package_version text NOT NULL,
  error text,
  CONSTRAINT history_pkey PRIMARY KEY (event_id),
  CONSTRAINT chk_history_state CHECK (state IN ('applied', 'failed'))
);

ALTER TABLE equitie_migrations.history
ADD COLUMN directory text NOT NULL DEFAULT 'equitie_data',
ADD COLUMN phase text NOT NULL DEFAULT 'pre',
ADD COLUMN compatible_since integer NOT NULL DEFAULT 0,
ADD COLUMN step integer,
DROP CONSTRAINT chk_history_state,
ADD CONSTRAINT chk_history_state
  CHECK (state IN ('applied', 'baselined', 'failed', 'repaired', 'rolled_back', 'step')),
ADD CONSTRAINT chk_history_phase
  CHECK (phase IN ('pre', 'post'));

COMMENT ON SCHEMA equitie_migrations IS 'Which migrations this database has.';
COMMENT ON TABLE equitie_migrations.history IS 'What became of migrations, in order. Never cleared.';
COMMENT ON COLUMN equitie_migrations.history.event_id IS 'Key.';
COMMENT ON COLUMN equitie_migrations.history.version IS 'Number of the migration.';
COMMENT ON COLUMN equitie_migrations.history.name IS 'Name of the migration.';
COMMENT ON COLUMN equitie_migrations.history.sha256 IS 'Checksum of its text, newlines normalised; of a step, of its statement.';
COMMENT ON COLUMN equitie_migrations.history.state IS 'applied; failed; step: one statement of a migration outside of transactions is done; baselined: found there and verified; repaired: its checksum, or how many of its steps count; rolled_back.';
COMMENT ON COLUMN equitie_migrations.history.started_at IS 'When it began.';
COMMENT ON COLUMN equitie_migrations.history.finished_at IS 'When it ended.';
COMMENT ON COLUMN equitie_migrations.history.duration_ms IS 'How long it took, milliseconds.';
COMMENT ON COLUMN equitie_migrations.history.applied_by IS 'Database role that ran it.';
COMMENT ON COLUMN equitie_migrations.history.server_version IS 'Version of the server.';
COMMENT ON COLUMN equitie_migrations.history.package_version IS 'Version of equitie_data.';
COMMENT ON COLUMN equitie_migrations.history.error IS 'Why it failed; NULL when it did not.';
COMMENT ON COLUMN equitie_migrations.history.directory IS 'Directory of migrations: equitie_data, or one of an application.';
COMMENT ON COLUMN equitie_migrations.history.phase IS 'pre: applied before the code that needs it is deployed. post: afterwards.';
COMMENT ON COLUMN equitie_migrations.history.compatible_since IS 'Number of the last migration of the oldest release that works on a database with this one; 0 for every release.';
COMMENT ON COLUMN equitie_migrations.history.step IS 'Which statement of a migration outside of transactions; of a repair, how many of them still count.';

REVOKE ALL ON SCHEMA equitie_migrations FROM PUBLIC;
REVOKE ALL ON equitie_migrations.history FROM PUBLIC;
