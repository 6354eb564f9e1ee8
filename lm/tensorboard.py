"""TensorBoard's event files, written by hand: records of protocol buffers with checksums.

Packages that write them import torch where it is installed, which takes seconds, and write from a
thread of their own: where that meets an error, the run waits for it for ever.
"""

import socket
import struct
import time
from collections.abc import Mapping

from etils import epath

from lm import files


class EventFile:
    """The event file of one start of a run.

    TensorBoard reads all files of a folder, by their names in order of time. A file begins with the
    step that its start goes on from, and what earlier files have after that step isn't shown.

    Args:
      folder: on gs:// the file is kept in memory, and written whole by `flush`.
      step: the step that the run starts from.
    """

    def __init__(self, folder: epath.Path, step: int):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"
        self._path = folder / name
        self._appends = "://" not in str(folder)
        self._content = bytearray()
        folder.mkdir(parents=True, exist_ok=True)
        self._add(_event(0, _bytes_field(3, b"brain.Event:2")))
        session_start = _varint_field(1, 1)
        self._add(_event(step + 1, _bytes_field(7, session_start)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step."""
        summary = b""
        for name, value in values.items():
            value_bytes = _bytes_field(1, name.encode()) + _float_field(2, value)
            summary += _bytes_field(1, value_bytes)
        if summary:
            self._add(_event(step, _bytes_field(5, summary)))

    def flush(self) -> None:
        if not self._appends:
            files.write_whole(self._path, bytes(self._content))

    def _add(self, event: bytes) -> None:
        """Adds a record: its length and its content, each with its checksum behind it."""
        length = struct.pack("<Q", len(event))
        record = length + _checksum(length) + event + _checksum(event)
        if not self._appends:
            self._content += record
            return
        try:
            with self._path.open("ab") as file:
                file.write(record)
        except OSError as error:
            raise files.named(error, self._path) from None


# The protocol buffers are tensorflow/core/util/event.proto and framework/summary.proto. A field is
# its number with its wire type (0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes), then
# its value.


def _event(step: int, content: bytes) -> bytes:
    return _key(1, 1) + struct.pack("<d", time.time()) + _varint_field(2, step) + content


def _key(number: int, wire_type: int) -> bytes:
    return bytes([number << 3 | wire_type])


def _varint_field(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value)


def _bytes_field(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _varint(len(content)) + content


def _float_field(number: int, value: float) -> bytes:
    try:
        packed = struct.pack("<f", value)
    except OverflowError:  # beyond float32
        packed = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _key(number, 5) + packed


def _varint(value: int) -> bytes:
    """An integer from 0 on, seven bits a byte, the lowest first."""
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def _checksum(content: bytes) -> bytes:
    """CRC-32C, masked as in TensorFlow's records: a sum of data with sums in it would be weak."""
    crc = crc32c(content)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def crc32c(content: bytes) -> int:
    """The checksum by Castagnoli's polynomial."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
