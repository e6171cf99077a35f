-- Memory for the sorts and hashes of this one transaction; compiling plans over many partitions costs more than it saves.
SELECT
  pg_catalog.set_config('work_mem', '64MB', true),
  pg_catalog.set_config('jit', 'off', true)
