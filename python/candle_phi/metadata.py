"""A file's metadata, which is large: one key holds the whole vocabulary."""

_ITEMS = 3
_CHARACTERS = 60


class Metadata(dict[str, object]):
    """A dict with a short repr: one key per line, long lists and strings cut."""

    def __repr__(self) -> str:
        return "{" + ",\n ".join(f"{key!r}: {_abbreviate(value)}" for key, value in self.items()) + "}"


def _abbreviate(value: object) -> str:
    if isinstance(value, list) and len(value) > 2 * _ITEMS:
        shown = ", ".join(map(_abbreviate, value[:_ITEMS]))
        return f"[{shown}, ... {len(value)} items]"
    if isinstance(value, (str, bytes)) and len(value) > _CHARACTERS:
        return f"{value[:_CHARACTERS]!r}... {len(value)} {'characters' if isinstance(value, str) else 'bytes'}"
    return repr(value)
