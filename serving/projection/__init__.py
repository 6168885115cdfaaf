"""From the event log to the profiles."""
