"""The part of a text that is generated: between two comments."""

from vislearn.errors import UserError


def replaced(text: str, start: str, end: str, content: str) -> str:
    """A text with other content between two comments, on lines of its own.

    Raises:
        UserError: the comments are missing.
    """
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"there is no place for the table: put {start} and {end} where it belongs")
    return f"{before}{start}\n{content}\n{end}{after}"
