"""The one exception that users see."""


class SpiffyError(ValueError):
    """Bad input: says in one line what was wrong, where, and what to do.

    The commands print its message and exit with code 2; nothing has been written.
    """
