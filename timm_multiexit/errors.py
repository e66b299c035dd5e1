"""The exceptions for bad input: a message names what was given and what to do."""


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints the message and exits with code 2."""


class MissingFileError(InputError):
    """A repository does not hold the file. It was reached: being unable to ask is an InputError of no such kind."""
