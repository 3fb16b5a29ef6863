"""What a user can put right, said in one line."""


class UserError(Exception):
    """A fault in what the user gave: printed as one line, without a traceback, and exit code 2.

    The message says what is wrong, where, and the value or command that would be right.
    """
