"""The stores in Redis: the event log, the profiles, the catalogue log, and the scripts that change them."""
