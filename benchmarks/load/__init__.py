"""The load tool: a generator that shares the machine with the service, traffic, measurements and their report."""
