"""How calls come in: what is open on each connection, when a call gets a thread, and how those end that hold things up."""
