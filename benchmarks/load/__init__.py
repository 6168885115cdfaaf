"""The load tool: a generator that shares the machine with the service, its traffic, its measurements and their report."""
