"""The one exception for bad input: its message names what was given and what to do."""


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints the message and exits with code 2."""
