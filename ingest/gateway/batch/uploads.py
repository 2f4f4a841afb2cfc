"""Files as browsers and SDKs send them: `multipart/form-data`, written to disk as it comes, whatever its size."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from schemas.errors import UsageError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELD_BYTES_MAX = 64 << 10
"""A field that is no file may be so large."""


class Upload:
    """One form on its way: its fields in memory, its file at `path`."""

    def __init__(self, content_type: str, path: Path, bytes_max: int) -> None:
        """Begin to read a form.

        Raises:
            UsageError: it is no form.
        """
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0
        self._path, self._bytes_max = path, bytes_max
        self._file: IO[bytes] | None = None
        self._header, self._value = b"", b""
        self._name, self._text = "", b""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise _fault("the body is not multipart/form-data", "send the file as the field 'file' of a form")
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._part_begin,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
        }
        self._parser = MultipartParser(options[b"boundary"], callbacks)

    async def read(self, pieces: AsyncIterator[bytes]) -> None:
        """Read the form to its end.

        Raises:
            UsageError: it is broken, or its file is too large.
        """
        try:
            async for piece in pieces:
                self._parser.write(piece)
            self._parser.finalize()
        except FormParserError as error:
            raise _fault(f"the form is broken: {error}", "send it as multipart/form-data") from error
        finally:
            if self._file:
                self._file.close()
        if self.filename is None:
            raise _fault("the form has no field 'file'", "send the file as the field 'file'")

    def _part_begin(self) -> None:
        self._name, self._text = "", b""
        self._header, self._value = b"", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            if self._name == "file" and self.filename is None:
                self.filename = options.get(b"filename", b"").decode("utf-8", "replace") or "upload"
                self._file = self._path.open("wb")
        self._header, self._value = b"", b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file" and self._file:
            self.size += end - start
            if self.size > self._bytes_max:
                raise _fault(f"the file has more than batch.file_bytes_max, {self._bytes_max} bytes", "split it")
            self._file.write(data[start:end])
        else:
            self._text += data[start:end]
            if len(self._text) > FIELD_BYTES_MAX:
                raise _fault(f"the field {self._name[:40]!r} is too large", f"at most {FIELD_BYTES_MAX} bytes")

    def _part_end(self) -> None:
        if self._name != "file":
            self.fields[self._name] = self._text.decode("utf-8", "replace")


def _fault(fault: str, hint: str) -> UsageError:
    return UsageError(f"{fault}; {hint}", operation="upload", place="file", hint=hint)
