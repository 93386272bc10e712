"""Models for others: released weights with their cards, and files for other runtimes."""
