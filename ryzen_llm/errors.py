"""The one error that means "what you gave is wrong", raised by every room and shown without a traceback."""


class InputError(ValueError):
    """Bad configuration or input: the message says what was wrong, what was expected and what to change.

    `scripts/*.py` print the message as one line and exit with status 2.
    """
