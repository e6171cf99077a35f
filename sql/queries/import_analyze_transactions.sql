-- Statistics of the transactions to be made, for the join that finds their rows again.
ANALYZE pg_temp.import_transactions
