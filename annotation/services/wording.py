"""Checks free text before it goes into the database."""

from annotation.errors import Refused


def clean_text(value: object, *, where: str, limit: int) -> str:
    """The text with plain line ends and no outer space.

    Raises: Refused 400 if it is no text, longer than `limit` characters, or holds what a database or a JSON file cannot (NUL, half of a
    surrogate pair).
    """
    if not isinstance(value, str):
        raise Refused("invalid", f"{where}: expected text.", 400)
    text = value.replace("\r\n", "\n").strip()
    if len(text) > limit:
        raise Refused("too_long", f"{where}: {len(text)} characters, at most {limit} are kept.", 400)
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise Refused("invalid", f"{where}: holds a character that is not text.", 400)
    return text
