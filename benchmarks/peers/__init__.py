"""Trainers of other libraries, each run by an interpreter of its own; none of these files imports Penchant."""
