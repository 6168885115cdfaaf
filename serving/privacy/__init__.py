"""The rights of a user: consent, controls, erasure and its certificates."""
