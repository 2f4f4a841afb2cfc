"""Reading a provider's document field by field: what is not understood is left over and becomes an extension."""

from __future__ import annotations

from typing import Any, TypeVar

from schemas.errors import UsageError
from schemas.requests.inference import Extensions, Model, Opaque

T = TypeVar("T")
NUMBER = (int, float)


class Fields:
    """A document being read; `rest` holds what was not taken yet."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.rest = dict(document)

    def take(self, name: str, kind: type[T]) -> T | None:
        """A field of this type, None and left over where it has another one."""
        value = self.rest.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return None
        del self.rest[name]
        return value

    def number(self, name: str) -> float | None:
        """A number as it was written; infinite ones are left over."""
        value = self.rest.get(name)
        if not isinstance(value, NUMBER) or isinstance(value, bool) or float_or_none(value) != value:
            return None
        del self.rest[name]
        return value

    def texts(self, name: str) -> list[str] | None:
        """A list of texts; one with anything else in it is left over."""
        value = self.rest.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            return None
        del self.rest[name]
        return value

    def objects(self, name: str) -> list[dict[str, Any]] | None:
        """A list of objects; one with anything else in it is left over."""
        value = self.rest.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            return None
        del self.rest[name]
        return value

    def extensions(self, provider: str) -> Extensions:
        """What is left, as the provider's own."""
        return {provider: self.rest} if self.rest else {}


def float_or_none(value: float) -> float | None:
    """The number as a float holds it exactly."""
    try:
        return float(value)
    except OverflowError:
        return None


HINTS = frozenset(
    (
        "cache_control",  # what to keep of a prompt, to be faster and cheaper next time
        "prompt_cache_key",
        "store",  # where and under which name a request is filed: the tape has it as it was sent
        "metadata",
        "labels",
        "user",
        "safety_identifier",
        "signature",  # proofs for the provider that made them
        "thoughtSignature",
        "includeThoughts",  # the gateway itself shows thoughts or does not
        "max_completion_tokens",  # names, states and spellings of what the schema has in its own fields
        "id",
        "type",
        "status",
        "bare",
        "system.role",
        "group",
        "openapi",
    )
)
"""Fields that change nothing of what is answered. Recorded as sent, they are left out before a provider that does not know them."""

IF_EMPTY = frozenset(("annotations", "summary", "logprobs"))
"""Parts of an answer that come back in the next request: nothing is lost where they are empty."""

USUAL = {"service_tier": ("auto", "default", "standard", "standard_only"), "verbosity": ("medium",)}
"""Fields that say nothing with these values."""


def harmless(field: str, value: Any) -> bool:
    """Whether another provider may leave a field out without answering anything else."""
    return value is None or field in HINTS or (field in IF_EMPTY and not value) or (field in USUAL and value in USUAL[field])


class Target:
    """A provider being written for: gives back its own extensions and refuses those of others by name, but for harmless ones."""

    def __init__(self, provider: str, name: str) -> None:
        self.provider = provider
        self.name = name

    def own(self, model: Model, place: str = "") -> dict[str, Any]:
        """The extensions of this provider.

        Raises:
            UsageError: there are some of another one.
        """
        for provider, fields in model.provider_extensions.items():
            if provider == self.provider:
                continue
            for field, value in fields.items():
                if not harmless(field, value):
                    raise self.refusal(f"{place}{field}")
        return dict(model.provider_extensions.get(self.provider, {}))

    def opaque(self, part: Opaque, place: str) -> Any:
        """A part of this provider, as it was sent.

        Raises:
            UsageError: it is another one's.
        """
        if part.provider != self.provider:
            kind = part.value.get("type") or ", ".join(part.value) if isinstance(part.value, dict) else None
            raise self.refusal(f"{place} of type {kind}" if isinstance(kind, str) else place)
        return part.value

    def without(self, **fields: Any) -> None:
        """Refuse the first of these that is set.

        Raises:
            UsageError: one is.
        """
        for name, value in fields.items():
            if value is not None:
                raise self.refusal(name)

    def refusal(self, what: str) -> UsageError:
        """The error that says what cannot be done."""
        hint = "leave it out, or send the request to an upstream that can do it"
        return UsageError(f"{what} is not possible with {self.name}; {hint}", operation="translate request", place=what, hint=hint)


def present(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}
