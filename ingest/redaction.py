"""What must never reach the log: credentials, configured secrets, and the personal data that rules name.

Applied before anything is recorded. Secrets are searched for in every text as they stand and as JSON writes them. Rules
(`[redaction]` in the settings) are patterns, searched for in every string of a request, in its keys and in numbers of
seven digits and more, and fields, whose value goes whatever it is; JSON inside a string (the arguments of a tool call) is
looked into. What is taken leaves `[redacted]` or `[redacted:RULE]` behind and is counted by rule in the event.

Text of an answer comes piece by piece: `ingest.gateway.window` says what is caught there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, SecretStr

from ingest.fields import FieldPath, Path
from ingest.patterns import BUILTINS, Finder, finder
from schemas.requests import dump, load
from schemas.settings import RedactionPolicy, Settings

REPLACEMENT = "[redacted]"

SECRET = "secret"
"""What secrets are counted under."""

SECRET_LENGTH_MIN = 4
"""Shorter configured values would take ordinary words out of every text."""

TOKEN_LENGTH_MIN = 12
"""Shorter bearer tokens ("EMPTY", "not-needed") are placeholders and would do the same."""

NUMBER_MIN = 1_000_000
"""Smaller numbers are no card, phone or account."""

TOO_DEEP = "too_deep"
"""What a document is counted under that is nested too deeply to be searched: nothing of it is recorded."""

Span = tuple[int, int, str]
"""First character, the one after the last, and the name of the rule."""


class Redactor:
    """Takes a fixed set of secrets, and what the rules of one tenant name, out of texts and counts what it took."""

    def __init__(self, secrets: Iterable[str] = (), policy: RedactionPolicy | None = None) -> None:
        """Raises `SettingsError` for a rule that cannot be."""
        self.policy = policy or RedactionPolicy()
        self._tenants: dict[str, Redactor] = {}
        self._forms = _longest_first(form for secret in secrets if len(secret) >= SECRET_LENGTH_MIN for form in _forms(secret))
        rules = [(f"redaction.rules.{number}", rule) for number, rule in enumerate(self.policy.rules)]
        self._finders: list[tuple[str, Finder]] = [(name, BUILTINS[name]) for name in self.policy.builtin]
        self._finders += [(rule.name, finder(rule.pattern, place)) for place, rule in rules if rule.pattern is not None]
        self._fields = [(rule.name, FieldPath(rule.field, place)) for place, rule in rules if rule.field is not None]

    @classmethod
    def of(cls, settings: Settings) -> Redactor:
        """The redactor of an installation: every `SecretStr` in its settings, and the rules for each tenant.

        Raises:
            SettingsError: a rule that cannot be, of whichever tenant.
        """
        secrets = list(_secrets(settings))
        redactor = cls(secrets, settings.redaction)
        redactor._tenants = {tenant: cls(secrets, policy) for tenant, policy in settings.redaction.tenants.items()}
        return redactor

    def for_tenant(self, tenant: str) -> Redactor:
        """The redactor with the rules of a tenant; this one if it has none of its own."""
        return self._tenants.get(tenant, self)

    @property
    def searches_any(self) -> bool:
        """Whether any tenant has rules."""
        return any(redactor.searches for redactor in (self, *self._tenants.values()))

    @property
    def searches(self) -> bool:
        """Whether there is anything to search texts for."""
        return bool(self._finders or self._fields)

    def with_token(self, authorization: str | None) -> Redactor:
        """This redactor and the credential of one request's Authorization header."""
        token = (authorization or "").rpartition(" ")[2]
        if len(token) < TOKEN_LENGTH_MIN:
            return self
        both = object.__new__(type(self))
        both.__dict__.update(self.__dict__)
        both._forms = _longest_first({*self._forms, *_forms(token)})
        return both

    def __call__(self, text: str) -> tuple[str, int]:
        """The text without secrets and what rules match, and how many were taken out."""
        text, taken = self.text(text)
        return text, taken.total()

    def clean(self, text: str | None) -> str | None:
        """The same for fields where nobody counts."""
        return self.text(text)[0] if text else text

    def text(self, text: str) -> tuple[str, Counter[str]]:
        """The text without what is searched for, and how many of each were taken out."""
        taken: Counter[str] = Counter()
        if self._finders:
            spans = self.find(text)
            taken.update(name for _, _, name in spans)
            return replaced(text, spans), taken
        return self._without_secrets(text, taken), taken

    def document(self, value: Any, *path: str | int) -> tuple[str, Counter[str]]:
        """The compact JSON text of a value without what is searched for; `path` is where the value stands in its request."""
        taken: Counter[str] = Counter()
        if self.searches:
            try:
                value = self._walk(value, path, taken)
            except RecursionError:
                value, taken = mark(TOO_DEEP), Counter({TOO_DEEP: 1})
        return self._without_secrets(dump(value).decode(), taken), taken

    def find(self, text: str) -> list[Span]:
        """What is taken out of a text, from left to right and without overlap."""
        found = [(start, end, name) for name, find in self._finders for start, end in find(text)]
        for form in self._forms:
            at = text.find(form)
            while at >= 0:
                found.append((at, at + len(form), SECRET))
                at = text.find(form, at + len(form))
        return _apart(found)

    def _without_secrets(self, text: str, taken: Counter[str]) -> str:
        for form in self._forms:
            if form in text:
                taken[SECRET] += text.count(form)
                text = text.replace(form, REPLACEMENT)
        return text

    def _walk(self, value: Any, path: Path, taken: Counter[str]) -> Any:
        for name, field in self._fields:
            if value is not None and field.fits(path):
                taken[name] += 1
                return mark(name)
        if isinstance(value, str):
            return self._string(value, path, taken)
        if isinstance(value, dict):
            return {self._counted(key, taken): self._walk(item, (*path, key), taken) for key, item in value.items()}
        if isinstance(value, list):
            return [self._walk(item, (*path, at), taken) for at, item in enumerate(value)]
        if isinstance(value, int) and abs(value) >= NUMBER_MIN:
            written = str(value)
            return value if (kept := self._counted(written, taken)) == written else kept
        return value

    def _string(self, text: str, path: Path, taken: Counter[str]) -> str:
        """A string of a document; one that holds JSON is walked through like the rest."""
        if text[:1] in ("{", "[") and len(text) > 1:
            try:
                inner = load(text.encode("utf-8", "surrogatepass"))
            except ValueError:
                inner = None
            if inner is not None and (walked := self._walk(inner, path, taken)) != inner:
                return dump(walked).decode()
        return self._counted(text, taken)

    def _counted(self, text: str, taken: Counter[str]) -> str:
        text, found = self.text(text)
        taken.update(found)
        return text


def mark(name: str) -> str:
    """What stands where something was taken."""
    return REPLACEMENT if name == SECRET else f"[redacted:{name}]"


def replaced(text: str, spans: Iterable[Span]) -> str:
    """The text with a mark in place of each span."""
    parts, at = [], 0
    for start, end, name in spans:
        parts += [text[at:start], mark(name)]
        at = end
    return "".join([*parts, text[at:]]) if parts else text


def _apart(found: list[Span]) -> list[Span]:
    """Spans without overlap: of two that touch the same text the one that begins first, then the longer one, grows over both."""
    spans: list[Span] = []
    for start, end, name in sorted(found, key=lambda span: (span[0], -span[1])):
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]), spans[-1][2])
        else:
            spans.append((start, end, name))
    return spans


def _longest_first(forms: Iterable[str]) -> list[str]:
    """Forms in the order in which they are searched for: a secret that holds another goes first."""
    return sorted(set(forms), key=len, reverse=True)


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
