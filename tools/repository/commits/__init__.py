"""Whether a commit made LaViT slower: two commits, each in a process of its own, by turns.

The command line is ``tools/compare_commits.py``.
"""
