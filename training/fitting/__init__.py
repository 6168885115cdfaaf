"""Fits models to data."""
