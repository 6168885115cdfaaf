"""Searches the settings of a training by its validation, with Optuna."""
