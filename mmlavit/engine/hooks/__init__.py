"""Hooks for MMEngine."""
