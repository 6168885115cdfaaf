"""The processes of a service: supervisor, workers, and the pages on which they tell how they are."""
