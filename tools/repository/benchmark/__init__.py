"""Benchmarks: LaViT beside its peers in one process, taking turns.

The command line is ``tools/benchmark.py``; ``import mmlavit`` does not load this package.
"""
