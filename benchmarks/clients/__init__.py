"""Ready files for other load generators: ghz, k6 and locust; docs/load-testing.md says how each is run."""
