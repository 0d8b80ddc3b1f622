"""MiniRLError: the error class whose message is for the user of the command."""


class MiniRLError(Exception):
    """The message names the wrong setting, its value, and the allowed values. The command shows no traceback."""
