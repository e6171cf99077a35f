-- Statistics of the staged rows, which autovacuum never gathers for temporary tables.
ANALYZE pg_temp.import_rows
