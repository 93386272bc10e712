"""What mmlavit refuses, in one line for whoever asked for it."""


class MMLaViTError(Exception):
    """Base of the errors that name what was wrong with a file, a config or a command.

    Wrong arguments of functions and classes are plain ValueError and TypeError.
    """
