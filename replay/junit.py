"""Results of a suite as JUnit's XML, which every CI server shows."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from replay.suite import Result
from replay.words import printable, uuid


def junit(name: str, results: Sequence[Result]) -> bytes:
    """The document: a case that cannot be judged is an error, one that is another now a failure."""
    failures = [result for result in results if not result.passed]
    errors = [result for result in failures if result.outcome.verdict == "inconclusive"]
    suite = ElementTree.Element(
        "testsuite",
        name=printable(name),
        tests=str(len(results)),
        failures=str(len(failures) - len(errors)),
        errors=str(len(errors)),
        time=f"{sum(result.outcome.duration_us for result in results) / 1e6:.3f}",
    )
    for result in results:
        suite.append(_case(result))
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    ElementTree.indent(whole)
    text: bytes = ElementTree.tostring(whole, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _case(result: Result) -> ElementTree.Element:
    case, outcome = result.case, result.outcome
    title = f"{printable(case.title)} [{uuid(case.generation.bytes)}]"
    element = ElementTree.Element(
        "testcase", classname=printable(case.model or "model"), name=title, time=f"{outcome.duration_us / 1e6:.3f}"
    )
    if not result.passed:
        kind = "error" if outcome.verdict == "inconclusive" else "failure"
        fault = ElementTree.SubElement(element, kind, type=outcome.verdict, message=printable(outcome.reason))
        keys = [difference.key for difference in outcome.differences]
        fault.text = f"recorded in session {uuid(outcome.session_id)}; environment differences: {', '.join(keys) or 'none'}"
    return element
