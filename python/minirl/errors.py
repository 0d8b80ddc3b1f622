"""The one kind of error that is meant for the person at the terminal."""


class MiniRLError(Exception):
    """Its message says what was wrong, what it was, and what it must be; the command shows it without a traceback."""
