-- The server's settings that decide what is logged, how passwords are kept and how long a statement may run.
SELECT s.name, s.setting
FROM pg_catalog.pg_settings AS s
WHERE s.name = ANY (%(names)s)
