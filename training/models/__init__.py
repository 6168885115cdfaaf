"""The models, their losses, and the baselines that they are compared with."""
