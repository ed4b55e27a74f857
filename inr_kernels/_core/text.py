"""Text for a terminal. Imports nothing: the command line shows errors of imports with it."""


def printable(text: str) -> str:
    r"""The text with control characters as escapes ("\x1b"), so that a file's name or header cannot control a terminal.

    Example:
        >>> printable("\x1b[31mred.png")
        '\\x1b[31mred.png'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
