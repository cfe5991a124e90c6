"""What a user can put right."""


class UserError(Exception):
    """An error whose text is one sentence that says what to do; programs print it and exit 2."""
