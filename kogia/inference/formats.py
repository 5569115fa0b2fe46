"""The formats that commands ask answers in."""

from pathlib import Path

from kogia.engine.grammar import ResponseFormat


def read_format(json_schema: str | None) -> ResponseFormat | None:
    """The format of answers that match the JSON schema in a file; None without one.

    Raises ValueError for a file that is not there, or holds no schema.
    """
    if json_schema is None:
        return None
    try:
        text = Path(json_schema).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"json_schema = {json_schema!r}: cannot be read ({error}); name a JSON file") from error
    try:
        return ResponseFormat(json=text)
    except ValueError as error:
        raise ValueError(f"json_schema = {json_schema!r}: {error}") from error
