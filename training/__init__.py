"""Parquet in, bundle out: data sets, models, training, evaluation and export."""
