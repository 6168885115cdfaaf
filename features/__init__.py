"""What training and serving must agree on: tables, keys, profiles, assembly and the bundle."""
