"""Fields of a JSON document by name or path, as redaction rules name them."""

from __future__ import annotations

import re

from schemas.errors import SettingsError

Path = tuple[str | int, ...]
"""Where a value stands in a document: names and positions from the root."""

_STEP = re.compile(r"(?P<any>\.\.)?(?:\.?(?P<name>[\w-]+|\*)|\[(?P<index>\d+|\*)\]|\[(?P<quote>['\"])(?P<quoted>[^'\"]*)(?P=quote)\])")
_HINT = "a field name, or a path such as $.metadata.email, $.messages[*].name or $..ssn"


class FieldPath:
    """A name, which stands for every field of that name, or a JSON path (RFC 9535: names, positions, `*`, `..`)."""

    def __init__(self, text: str, place: str) -> None:
        """Raises `SettingsError` for a path that cannot be read; `place` names the setting."""
        self._steps: list[str | int] = []
        body = text[1:] if text.startswith("$") else f"..{text}"
        at = 0
        while at < len(body):
            step = _STEP.match(body, at)
            if step is None:
                raise SettingsError(f"{text!r} is no field: stuck at {body[at:]!r}", place=place, hint=_HINT)
            at = step.end()
            if step["any"]:
                self._steps.append("**")
            index = step["index"]
            self._steps.append(int(index) if index and index != "*" else index or step["quoted"] or step["name"])
        if not self._steps:
            raise SettingsError(f"{text!r} names the whole request", place=place, hint=_HINT)

    def fits(self, path: Path) -> bool:
        """Whether the path names the value at this place."""
        reached = {0}
        for part in path:
            reached = {after for at in reached for after in self._after(at, part)}
            if not reached:
                return False
        return len(self._steps) in reached

    def _after(self, at: int, part: str | int) -> list[int]:
        """Where the steps may stand after one more part of a path."""
        if at == len(self._steps):
            return []
        if self._steps[at] == "**":
            return [at, *self._after(at + 1, part)]
        return [at + 1] if self._steps[at] in ("*", part) else []
