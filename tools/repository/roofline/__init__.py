"""What models ask of a GPU, counted without one.

The command line is ``tools/roofline.py``; ``import mmlavit`` does not load this package.
"""
