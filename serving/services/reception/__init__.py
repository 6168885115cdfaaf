"""How calls come in: what each connection may hold open, when a call gets a thread, and how those that hang end."""
