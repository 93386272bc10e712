"""What trains a model: hooks, checkpoints, data checks, and the launcher."""
