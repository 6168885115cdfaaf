"""The tables of the docs: one function each, which returns the Markdown of a recorded result."""
