"""Connections to Redis: standalone or cluster, embedded or remote."""
