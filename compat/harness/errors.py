"""The one error of this package that is shown without a traceback."""


class CompatError(Exception):
    """Something that the caller of compat/run.py can put right; the text says what and how."""
