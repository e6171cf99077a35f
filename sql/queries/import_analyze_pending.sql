-- Statistics of the pending rows, for the joins that follow.
ANALYZE pg_temp.import_pending
