"""Measurements: each is one command and ends in one line of JSON."""
