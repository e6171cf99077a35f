-- Lines of pg_hba.conf that let somebody in over the network without a password worth the name; for superusers.
SELECT h.line_number, h.type, h.address, h.auth_method
FROM pg_catalog.pg_hba_file_rules AS h
WHERE
  h.type <> 'local'
  AND h.auth_method IN ('trust', 'password', 'md5', 'ident')
  AND coalesce(h.address, '') NOT IN ('127.0.0.1', '::1', 'samehost')
ORDER BY 1
