"""Metrics, logs and outages: how a service tells what happens in it."""
