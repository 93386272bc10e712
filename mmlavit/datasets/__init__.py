"""Data sets: shapes that are made here, converters of public ones, configs of one's own."""
