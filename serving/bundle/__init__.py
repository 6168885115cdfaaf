"""The contents of a bundle, checked, loaded and ready to be searched."""
