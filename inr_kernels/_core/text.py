"""Text for a terminal. Imports nothing heavy: the command line shows errors of imports with it."""


def printable(text: str) -> str:
    r"""The text with control characters as escapes ("\x1b"), so that a file's name or header cannot control a terminal.

    Example:
        >>> printable("\x1b[31mred.png")
        '\\x1b[31mred.png'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """An error as one printable line; that of a file names it.

    Example:
        >>> one_line(FileNotFoundError(2, "No such file", "a.png"))
        'a.png: No such file'
    """
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        return printable(name + error.strerror)
    return printable(" ".join(str(error).split())) or type(error).__name__
