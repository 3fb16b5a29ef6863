"""What a user can put right, said in one line."""

from typing import Any


class UserError(Exception):
    """A fault in what the user gave: printed as one line, without a traceback, and exit code 2.

    The message says what is wrong, where, and the value or command that would be right.
    """


def one_of(name: str, value: str, known: tuple[str, ...]) -> Any:
    """The value of a method's option, or an error that names what is known."""
    if value not in known:
        raise UserError(f"{name} must be {' or '.join(known)}, not {value!r}; for example --method.{name}={known[0]}")
    return value
