"""Errors that a user can mend: reported as one line, without a traceback."""


class UserError(ValueError):
    """Wrong input, flag or file.

    The text names the file, row or field, what was found, and what was expected. It is one line
    that can be printed, whatever names of the file stand in it.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if text.isprintable():
            return text
        shown = (c if c.isprintable() or c.isspace() else ascii(c)[1:-1] for c in text)
        return " ".join("".join(shown).split())


class Stopped(Exception):
    """A command was asked to end and has saved what it had; the same command goes on from there."""
