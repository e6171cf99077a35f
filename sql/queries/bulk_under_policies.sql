-- Do policies of transactions_clean bind the current role? COPY is refused to whom they bind.
SELECT pg_catalog.row_security_active('public.transactions_clean'::regclass)
