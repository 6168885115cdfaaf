"""Reads Parquet of any writer into the canonical tables, and reports the rows and cells that were left out."""
