"""Personal data by its shape: the built-in patterns, each with the check that tells it from a number that only looks alike.

All expressions are RE2's, whose time is linear in the text whatever the pattern: neither a text nor a rule can stall the
gateway. RE2 has neither backreferences nor look-around, so what stands around a match is checked here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import re2

from schemas.errors import SettingsError

Finder = Callable[[str], Iterator[tuple[int, int]]]
"""The places of matches in a text: first character and the one after the last, from left to right."""

PATTERN_CHARACTERS_MAX = 1000
"""Longer patterns are refused."""

_MEMORY_MAX = 1 << 20  # bytes of a compiled pattern; RE2 refuses what would take more


def compiled(pattern: str, place: str) -> Any:
    """The expression of a pattern.

    Raises:
        SettingsError: RE2 does not take it, it is too long, or it matches the empty text; `place` names the setting.
    """
    hint = "RE2 syntax: https://github.com/google/re2/wiki/Syntax (no look-around, no backreferences)"
    if len(pattern) > PATTERN_CHARACTERS_MAX:
        raise SettingsError(f"a pattern of {len(pattern)} characters, at most {PATTERN_CHARACTERS_MAX}", place=place, hint=hint)
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY_MAX
    try:
        expression = re2.compile(pattern, options)
    except re2.error as error:
        said = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else str(error)
        raise SettingsError(f"the pattern is not valid: {said}", place=place, hint=hint) from error
    if expression.search(""):
        raise SettingsError("the pattern matches the empty text", place=place, hint="make it match at least one character")
    return expression


def finder(pattern: str, place: str) -> Finder:
    """The finder of a pattern of one's own. Raises `SettingsError` as `compiled` does."""
    expression = compiled(pattern, place)

    def find(text: str) -> Iterator[tuple[int, int]]:
        return (match.span() for match in expression.finditer(text) if match.end() > match.start())

    return find


_EMAIL = finder(r"[\p{L}\p{N}._%+'-]+@[\p{L}\p{N}-]+(?:\.[\p{L}\p{N}-]+)+", "email")
_DIGITS = finder(r"\d(?:[ -]?\d){12,30}", "credit_card")
_IBAN = finder(r"(?i)[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}", "iban")
_IPV4 = finder(r"\d{1,3}(?:\.\d{1,3}){3}", "ip")
_IPV6 = finder(r"(?i)[0-9A-F:]*:[0-9A-F:]*:[0-9A-F:.]*", "ip")
_PHONE = finder(
    r"(?:\+|\b00)\d(?:[ ./()-]{0,3}\d){6,14}|\(?\b0\d(?:[ ./()-]{0,3}\d){5,12}|\(?\b\d{3}\)?[ .-]{1,2}\d{3}[ .-]\d{4}",
    "phone",
)

# Characters of an account number by country, ISO 13616 registry.
_IBAN_REGISTRY = """
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18
    FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27
    MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27
    SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30 IM90
"""
_IBAN_LENGTHS = {entry[:2]: int(entry[2:]) for entry in _IBAN_REGISTRY.split()}
_CARD_DIGITS = range(13, 20)


def _alone(text: str, start: int, end: int) -> bool:
    """Whether no letter or digit touches a match."""
    return not (start and text[start - 1].isalnum()) and not (end < len(text) and text[end].isalnum())


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for start, end in _EMAIL(text) if "@" in text else ():
        yield start, start + len(text[start:end].rstrip("-."))


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for start, end in _PHONE(text):
        if text[start] == "(" and ")" not in text[start:end]:
            start += 1
        if _alone(text, start, end) and text[start - 1 : start] not in (".", "-"):
            yield start, end


def _ips(text: str) -> Iterator[tuple[int, int]]:
    if "." in text:
        yield from ((start, end) for start, end in _IPV4(text) if _alone(text, start, end) and _is_ip(text[start:end]))
    if text.count(":") > 1:
        for start, end in _IPV6(text):
            end = start + len(text[start:end].rstrip("."))
            if _alone(text, start, end) and any(c.isdigit() for c in text[start:end]) and _is_ip(text[start:end]):
                yield start, end


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    """Account numbers whose length is their country's and whose check digits are right (ISO 7064, MOD 97-10)."""
    for start, end in _IBAN(text):
        wanted = _IBAN_LENGTHS.get(text[start : start + 2].upper(), 0)
        counts = accumulate(c.isalnum() for c in text[start:end])
        stop = next((start + at + 1 for at, count in enumerate(counts) if count == wanted), 0)
        if stop and _alone(text, start, stop) and _mod97("".join(c for c in text[start:stop] if c.isalnum()).upper()):
            yield start, stop


def _mod97(number: str) -> bool:
    return int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def _cards(text: str) -> Iterator[tuple[int, int]]:
    """Card numbers by the Luhn sum (ISO/IEC 7812-1), whole groups of digits only."""
    for start, end in _DIGITS(text):
        groups = _groups(text, start, end)
        until = 0
        for at, (first, _) in enumerate(groups):
            if first >= until and "2" <= text[first] <= "6" and (stop := _card_end(text, groups[at : at + _CARD_DIGITS.stop])):
                yield first, stop
                until = stop


def _groups(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The runs of digits between separators."""
    edges = [at for at in range(start, end + 1) if at in (start, end) or text[at].isdigit() != text[at - 1].isdigit()]
    return [(a, b) for a, b in pairwise(edges) if text[a].isdigit()]


def _card_end(text: str, groups: list[tuple[int, int]]) -> int:
    """Where the longest card number that begins with the first group ends; 0 if none does."""
    digits, stop = "", 0
    for start, end in groups:
        digits += text[start:end]
        if len(digits) in _CARD_DIGITS and _luhn(digits):
            stop = end
        elif len(digits) >= _CARD_DIGITS.stop:
            break
    return stop


def _luhn(digits: str) -> bool:
    doubled = (int(c) * 2 - 9 * (c > "4") for c in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


BUILTINS: dict[str, Finder] = {"email": _emails, "iban": _ibans, "credit_card": _cards, "ip": _ips, "phone": _phones}
"""The patterns by name; where two match the same text, the one that begins first and then the longer one counts."""
