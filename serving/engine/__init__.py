"""A bundle that is ready to answer: its models, indexes, catalogue and pipelines together."""
