"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Bad input. The message is one line: which record, what is wrong, what to do."""
