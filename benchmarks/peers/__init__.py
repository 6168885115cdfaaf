"""Other people's trainers, each run by an interpreter of its own; none of these files imports Penchant."""
