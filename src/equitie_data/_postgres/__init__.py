"""What `embedded` drives: the binaries, the account, the data directory, the cluster in it and its process."""
