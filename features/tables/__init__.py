"""Reads anybody's Parquet into the canonical tables, and tells what of it was left out."""
