"""The exception for a user's input."""


class InputError(ValueError):
    """What the user gave cannot be used: a name, a file, a tensor, an option.

    The message names the name, file, tensor or option and, if there is one, the way out. The command line prints only
    the message and exits with status 2; in a notebook it is an ordinary `ValueError`.
    """
