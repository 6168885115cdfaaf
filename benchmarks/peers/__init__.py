"""Other systems, each run by an interpreter of its own: nothing here is imported by Penchant."""
