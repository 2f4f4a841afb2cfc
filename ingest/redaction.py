"""What must never reach the log: configured secrets and the credentials a client sends. Applied before anything is recorded.

Texts are searched for each secret as it stands and as JSON writes it. A secret that a model repeats piece by piece in its
output is not found: token by token no piece holds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from pydantic import BaseModel, SecretStr

REPLACEMENT = "[redacted]"

SECRET_LENGTH_MIN = 4
"""Shorter configured values would take ordinary words out of every text."""

TOKEN_LENGTH_MIN = 12
"""Shorter bearer tokens ("EMPTY", "not-needed") are placeholders and would do the same."""


class Redactor:
    """Takes a fixed set of secrets out of texts and counts what it took."""

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets if len(secret) >= SECRET_LENGTH_MIN for form in _forms(secret)}
        self._forms = sorted(forms, key=len, reverse=True)  # a secret that holds another goes first

    @classmethod
    def of(cls, settings: BaseModel) -> Redactor:
        """The redactor of every `SecretStr` in a settings model."""
        return cls(_secrets(settings))

    def with_token(self, authorization: str | None) -> Redactor:
        """This redactor and the credential of one request's Authorization header."""
        token = (authorization or "").rpartition(" ")[2]
        if len(token) < TOKEN_LENGTH_MIN:
            return self
        both = Redactor(())
        both._forms = sorted({*self._forms, *_forms(token)}, key=len, reverse=True)
        return both

    def __call__(self, text: str) -> tuple[str, int]:
        """The text without the secrets, and how many were taken out."""
        count = 0
        for form in self._forms:
            if form in text:
                count += text.count(form)
                text = text.replace(form, REPLACEMENT)
        return text, count

    def clean(self, text: str | None) -> str | None:
        """The text without the secrets, for fields where nobody counts."""
        return self(text)[0] if text else text


def _forms(secret: str) -> set[str]:
    return {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}


def _secrets(model: BaseModel) -> Iterable[str]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, SecretStr):
                yield item.get_secret_value()
            elif isinstance(item, BaseModel):
                yield from _secrets(item)
