"""The bare text of documents, for commands that need nothing else of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.readers import SourceReader, is_plain_text
from data_prep.records import BadRecordError, parse_record, parse_text, undo_escapes


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the text of every document that is not empty, MADLAD-400 escapes undone.

    Lines that are no documents are passed over; ``build`` counts and lists them.

    Raises:
        DataError: A file is damaged.
    """
    for path in paths:
        with SourceReader(path) as reader:
            for line in reader.lines():
                if line.reject:
                    continue
                try:
                    if is_plain_text(path):
                        text = parse_text(line.data).text
                    else:
                        text = undo_escapes(parse_record(line.data, chat=False).text)[0]
                except BadRecordError:
                    continue
                if text:
                    yield text
