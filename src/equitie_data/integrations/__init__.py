"""Subscribers that hand the pool's events to other systems; each needs its own extra."""
