"""`dataset`: recorded answers as training data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from replay.dataset import Example, Left, examples_of
from replay.dataset_formats import Inexpressible, Write, writing
from replay.words import count, uuid
from schemas.errors import UsageError
from tokentape.commands.common import with_installation
from tokentape.installation import Installation
from tokentape.output import err, warn, whole
from tokentape.selection import generations_where


@click.command()
@click.option("--where", required=True, metavar="SQL", help="Which answers: a condition over the columns of the view `generations`.")
@click.option("--format", "kind", type=click.Choice(["openai", "sharegpt", "parquet"]), required=True, help="The file's format.")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
@click.option("--dedupe/--no-dedupe", default=True, show_default=True, help="Keep the first of examples that teach the same.")
@click.option("--skip", is_flag=True, help="Leave out what the format cannot express, and say how much, instead of refusing.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@with_installation
def dataset(installation: Installation, where: str, kind: str, out: Path, dedupe: bool, skip: bool, force: bool) -> None:
    """Recorded answers as training data, each with where it comes from: session, generation, model, tags, whether it was edited.

    \b
    openai    one chat a line, provenance under `metadata`; reasoning as `reasoning_content`
    sharegpt  one conversation a line, tools as `function_call` and `observation`, reasoning in <think>
    parquet   a row each, with the token ids and logprobs of prompt and answer

    Filters are SQL, e.g. "session_id IN (SELECT session_id FROM sessions WHERE list_contains(tags, 'good'))". Failed, erased and
    empty answers make no example. Text completions are no conversations: they are refused by name like all that a format cannot say.
    """
    if out.exists() and not force:
        raise UsageError("there is a file already", operation="dataset", place=str(out), hint="--force writes over it")
    installation.freshen()
    with whole(out) as new:
        with installation.accessing("dataset", f"{kind}: {where}") as access, writing(new, kind) as write:
            filling = _Filling(write, dedupe, skip)
            for state, generation in generations_where(installation, where):
                for example in examples_of(state, generation):
                    filling.add(example)
            access["rows"] = filling.written
        filling.tell()
    err.print(f"{count(filling.written, 'example')} in {out}", markup=False)


class _Filling:
    """A file on its way."""

    def __init__(self, write: Write, dedupe: bool, skip: bool) -> None:
        self.written = 0
        self._write, self._dedupe, self._skip = write, dedupe, skip
        self._seen: set[bytes] = set()
        self._left: Counter[str] = Counter()

    def add(self, example: Example | Left) -> None:
        """Write one more, unless it is there, makes no example or cannot be expressed.

        Raises:
            UsageError: it cannot be expressed, and is not to be skipped.
        """
        if isinstance(example, Left):
            if example.refused:
                self._refuse(example.reason, uuid(example.generation_id))
            else:
                self._leave(example.reason)
            return
        digest = example.digest()
        if self._dedupe and digest in self._seen:
            self._leave("the same as one before")
            return
        try:
            self._write(example)
        except Inexpressible as error:
            self._refuse(str(error), example.provenance["generation"])
            return
        self._seen.add(digest)
        self.written += 1

    def tell(self) -> None:
        """Say what was left out.

        Raises:
            UsageError: nothing is left.
        """
        for reason, examples in self._left.most_common():
            warn(f"{count(examples, 'answer')} left out: {reason}")
        if not self.written:
            raise UsageError("no answer makes an example", operation="dataset", hint="`tokentape sql` shows what the condition chooses")

    def _refuse(self, reason: str, generation: str) -> None:
        if not self._skip:
            raise UsageError(f"generation {generation}: {reason}", operation="dataset", hint="--skip leaves it out; nothing was written")
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        self._left[reason] += 1


COMMANDS = [dataset]
