"""Metrics that the toolboxes do not have."""
