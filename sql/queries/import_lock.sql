-- Lets one import at a time decide what is new. Staging runs before it, side by side; whoever waits here then sees,
-- statement by statement, what the other one committed.
SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('equitie_data csv import', 0))
