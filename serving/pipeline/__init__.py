"""The request: a query goes through hydrators, sources, filters, scorers, adjusters, a selector and explainers."""
