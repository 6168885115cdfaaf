"""Measures a run as it will be used."""
