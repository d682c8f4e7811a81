"""Errors that a user can mend: reported as one line, without a traceback."""


class UserError(ValueError):
    """Wrong input, flag or file.

    The text names the file, row or field, what was found, and what was expected.
    """
