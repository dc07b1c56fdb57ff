"""Rows on disk while they are on their way: more of them than memory holds."""

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa


class Spool:
    """Tables appended to an Arrow stream in a file without a name, which is gone when nothing reads it any more.

    `folder` needs room for the rows; None: the folder for temporary files (TMPDIR).
    """

    def __init__(self, schema: pa.Schema, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._writer = pa.ipc.new_stream(self._file, schema)

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        if table.num_rows:
            self._writer.write_table(table.combine_chunks())

    def batches(self) -> Iterator[pa.Table]:
        """The rows in the pieces they were written in, one piece in memory at a time; after the last they are gone."""
        self._writer.close()
        with self._file:
            self._file.seek(0)
            for batch in pa.ipc.open_stream(self._file):
                yield pa.Table.from_batches([batch])

    def table(self) -> pa.Table:
        """All rows, memory-mapped: they are read from disk where they are used. Nothing can be written after."""
        self._writer.close()
        with self._file:
            self._file.flush()
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapped))).read_all()
