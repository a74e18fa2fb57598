"""EXIF blocks: the few tags that an enlargement changes, changed where they stand, and directories for TIFF."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

PREFIX = b"Exif\0\0"
EXIF_IFD, GPS_IFD = 0x8769, 0x8825

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SHORT, _LONG, _RATIONAL = 3, 4, 5
_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 0x0112, 0x011A, 0x011B, 0x0128
_SIDES = {0x0100: 1, 0x0101: 0, 0xA002: 1, 0xA003: 0}  # tags of width and height
# ImageDescription, Make, Model, Software, DateTime, Artist, HostComputer, Copyright: what of a first directory is about
# the photograph, and not about how this file stores it.
_DESCRIPTIVE = frozenset({0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298})


@dataclass(frozen=True)
class Entry:
    """One tag: its type and count, where its entry and its value stand in the block, and the bytes of the value."""

    tag: int
    kind: int
    count: int
    place: int
    start: int
    value: bytes


def _order(data: bytes) -> str:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        raise ValueError("not a TIFF structure")
    return order


def _directory(data: bytes, order: str, offset: int) -> list[Entry]:
    (count,) = struct.unpack_from(f"{order}H", data, offset)
    entries = []
    for place in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, place)
        length = _SIZES.get(kind, 0) * number
        start = place + 8 if length <= 4 else struct.unpack_from(f"{order}I", data, place + 8)[0]
        if 0 < length <= len(data) - start:
            entries.append(Entry(tag, kind, number, place, start, data[start : start + length]))
    return entries


def _number(entry: Entry, order: str) -> int:
    return struct.unpack(f"{order}{'H' if entry.kind == _SHORT else 'I'}", entry.value)[0]


def _directories(data: bytes, order: str) -> Iterator[tuple[int, list[Entry]]]:
    """(0 or the tag that points at it, entries) of the first directory and of those of EXIF and GPS."""
    main = _directory(data, order, struct.unpack_from(f"{order}I", data, 4)[0])
    yield 0, main
    for entry in main:
        if entry.tag in (EXIF_IFD, GPS_IFD) and entry.kind in (_LONG, 13) and entry.count == 1:
            yield entry.tag, _directory(data, order, _number(entry, order))


def resized(block: bytes, size: tuple[int, int], dpi: tuple[float, float] | None) -> bytes | None:
    """The block of an upright picture of another size, without its thumbnail.

    Values change in place, so that what a camera's maker notes say of places stays true.

    Args:
        block: with its `Exif\\0\\0` prefix.
        size: (height, width).
        dpi: horizontal and vertical pixels per inch, None to leave them as they are.

    Returns:
        The block, or None if it is damaged.
    """
    original = block.removeprefix(PREFIX)
    data = bytearray(original)
    try:
        order = _order(original)
        (first,) = struct.unpack_from(f"{order}I", data, 4)
        directories = list(_directories(original, order))
        inches = next((2.54 for e in directories[0][1] if e.tag == _RESOLUTION_UNIT and _number(e, order) == 3), 1.0)
        for _, entries in directories:
            for entry in entries:
                if entry.tag == _ORIENTATION:
                    struct.pack_into(f"{order}HIHH", data, entry.place + 2, _SHORT, 1, 1, 0)
                elif entry.tag in _SIDES and entry.kind in (_SHORT, _LONG):
                    struct.pack_into(f"{order}HII", data, entry.place + 2, _LONG, 1, size[_SIDES[entry.tag]])
                elif dpi and entry.tag in (_X_RESOLUTION, _Y_RESOLUTION) and entry.kind == _RATIONAL:
                    value = round(dpi[entry.tag == _Y_RESOLUTION] / inches * 1000)
                    if 0 < value < 1 << 32:
                        struct.pack_into(f"{order}II", data, entry.start, value, 1000)
        (count,) = struct.unpack_from(f"{order}H", data, first)
        link = first + 2 + 12 * count
        (thumbnail,) = struct.unpack_from(f"{order}I", data, link)
        struct.pack_into(f"{order}I", data, link, 0)
        if thumbnail:
            # It is what stands last, as a rule; where something else does, only the link to it goes.
            end = max([link + 4, *(e.start + len(e.value) for _, entries in directories for e in entries)])
            for tag, entries in directories[1:]:
                end = max([end, *(entry.place + 16 for entry in entries)])
                for entry in entries:
                    if tag == EXIF_IFD and entry.tag == 0xA005:  # interoperability
                        inner = _directory(original, order, _number(entry, order))
                        end = max([end, *(max(e.place + 16, e.start + len(e.value)) for e in inner)])
            del data[end:]
    except (struct.error, ValueError):
        return None
    return PREFIX + bytes(data)


def descriptive(block: bytes) -> dict[int, list[tuple[int, int, int, bytes]]]:
    """What of a block goes into a TIFF: (tag, type, count, value in little-endian order) of its directories.

    The first directory, under key 0, only has what describes the photograph. Empty if the block is damaged.
    """
    data = block.removeprefix(PREFIX)
    try:
        order = _order(data)
        return {
            where: [
                (entry.tag, entry.kind, entry.count, _little_endian(entry, order))
                for entry in entries
                if (entry.tag in _DESCRIPTIVE if where == 0 else entry.tag != 0xA005)
            ]
            for where, entries in _directories(data, order)
        }
    except (struct.error, ValueError):
        return {}


def _little_endian(entry: Entry, order: str) -> bytes:
    unit = _SIZES[entry.kind] // (2 if entry.kind in (5, 10) else 1)
    if order == "<" or unit == 1:
        return entry.value
    return b"".join(entry.value[i : i + unit][::-1] for i in range(0, len(entry.value), unit))
