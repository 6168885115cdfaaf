"""From the event log to Parquet."""
