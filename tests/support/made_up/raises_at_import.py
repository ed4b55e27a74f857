"""A module that cannot be imported."""

raise SyntaxError("raises at import")
