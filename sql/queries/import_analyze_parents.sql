-- Statistics of the deals and investors meant: without them the planner joins every row with every other.
ANALYZE pg_temp.import_deals, pg_temp.import_investors
