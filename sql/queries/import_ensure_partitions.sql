-- Makes the partitions that are missing between two days, and says how many those were.
SELECT equitie_private.ensure_month_partitions('public.transactions_clean'::regclass, %(first)s, %(last)s)
