"""Where a payload lies in a Parquet file, so that it can be read straight into a batch.

A shard whose row groups hold one subject, uncompressed and without dictionary, has one data page per column chunk:

    page header (Thrift) | definition levels | length (4 bytes) | payload

The payload is the end of the chunk. Reading it there is one copy, from the page cache into the batch; pyarrow's way is
three. What is checked is the same: sizes, the page's own CRC-32 and the value's length. Anything else about a file (row
groups of several subjects, LZ4, another writer) is left to pyarrow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib  # CRC-32 by carry-less multiplication, three times as fast as zlib's

MAX_HEAD = 512
"""Bytes before a payload at most: header, levels and length are about 40 to 60."""


class BadPage(ValueError):
    """A page that is not what its header or its checksum says."""


@dataclass(frozen=True)
class Header:
    """Header of a data page.

    Attributes:
        size: bytes of the header itself.
        body: bytes of the page behind it.
        crc: CRC-32 of the body, None where the writer left none.
    """

    size: int
    body: int
    crc: int | None


def parse_header(head: bytes) -> Header:
    """The header at the beginning of `head` (Thrift compact protocol; parquet.thrift, struct PageHeader).

    Raises:
        BadPage: no data page header.
    """
    at, field = 0, 0
    fields: dict[int, int] = {}
    try:
        while True:
            byte = head[at]
            at += 1
            if byte == 0:
                break
            kind, delta = byte & 15, byte >> 4
            if delta:
                field += delta
            else:
                value, at = _varint(head, at)
                field = _signed(value)
            if kind == 5:  # i32
                value, at = _varint(head, at)
                fields[field] = _signed(value)
            elif kind == 12:  # struct
                at = _skip_struct(head, at)
            else:
                raise BadPage(f"a field of type {kind} in a page header")
    except IndexError:
        raise BadPage("a page header without an end") from None
    if fields.get(1) != 0 or fields.get(2) != fields.get(3):
        raise BadPage("not an uncompressed data page")
    crc = fields.get(4)
    return Header(at, fields[3], None if crc is None else crc & 0xFFFFFFFF)


def check(head: bytes, payload: memoryview, verify: bool) -> None:
    """Check that a chunk's `head` (all before the payload) and `payload` are one whole page.

    Raises:
        BadPage: sizes disagree, or with `verify` the checksum.
    """
    header = parse_header(head)
    if header.size + header.body != len(head) + len(payload):
        raise BadPage(f"a page of {header.body} bytes where {len(head) + len(payload) - header.size} are")
    if int.from_bytes(head[-4:], "little") != len(payload):
        raise BadPage("a value of another length")
    if verify:
        if header.crc is None:
            raise BadPage("no page checksum")
        if isal_zlib.crc32(payload, isal_zlib.crc32(head[header.size :])) != header.crc:
            raise BadPage("a page checksum that does not match")


def locate(file: pq.ParquetFile, columns: list[str]) -> dict[str, np.ndarray]:
    """Start and size of each row's chunk of each column, int64 ``row 2``; -1 where only pyarrow can read it."""
    metadata = file.metadata
    places = {name: np.full((metadata.num_rows, 2), -1, np.int64) for name in columns}
    number = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    row = 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        if group.num_rows == 1:
            for name in columns:
                chunk = group.column(number[name])
                plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
                if plain and chunk.total_compressed_size > MAX_HEAD:
                    places[name][row] = chunk.data_page_offset, chunk.total_compressed_size
        row += group.num_rows
    return places


def places_of(index: pa.Table, column: str) -> np.ndarray:
    """Places that `locate` found, out of a shard's index: int64 ``row 2``."""
    return index.column(f"place_{column}").combine_chunks().flatten().to_numpy().reshape(-1, 2)


def group_rows(metadata: pq.FileMetaData) -> list[list[int]]:
    """Rows of the row groups, run-length coded: [number of groups, rows in each]."""
    runs: list[list[int]] = []
    for g in range(metadata.num_row_groups):
        rows = metadata.row_group(g).num_rows
        if runs and runs[-1][1] == rows:
            runs[-1][0] += 1
        else:
            runs.append([1, rows])
    return runs


def payload_of(array: pa.ChunkedArray, row: int) -> memoryview | None:
    """Bytes of one value of a large binary column without a copy; None where it is null."""
    part = array.slice(row, 1).chunk(0)
    if part.null_count:
        return None
    # Through the buffers, since taking an element of a binary column copies it.
    _, offsets, memory = part.buffers()
    first, last = np.frombuffer(offsets, np.int64)[part.offset : part.offset + 2].tolist()
    return memoryview(memory.slice(first, last - first))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _skip_struct(data: bytes, at: int) -> int:
    """End of a struct of integers, booleans and structs, as the page headers have."""
    while True:
        byte = data[at]
        at += 1
        if byte == 0:
            return at
        if not byte >> 4:
            _, at = _varint(data, at)
        kind = byte & 15
        if kind in (4, 5, 6):
            _, at = _varint(data, at)
        elif kind == 8:  # binary: statistics, which we don't write
            size, at = _varint(data, at)
            at += size
        elif kind == 12:
            at = _skip_struct(data, at)
        elif kind not in (1, 2):
            raise BadPage(f"a field of type {kind} in a page header")
