"""Data sets: shapes that are made here, and converters of public ones."""
