"""The one exception a user's own input can raise."""


class InputError(ValueError):
    """What the user gave cannot be used: a name, a file, a tensor, an option.

    Its message is one sentence that names the culprit and, where one exists, the way out. The command line prints that
    sentence alone and exits with status 2; in a notebook it is an ordinary `ValueError`.
    """
