"""The code that training and serving must agree on: schemas, vocabulary, catalogue, profile, assembly, bundle."""
