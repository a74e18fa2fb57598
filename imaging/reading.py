"""Files to pictures."""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .decoding import FORMATS_LEFT_OUT, Kind, OpenFile, PillowFile
from .exr import MAGIC, ExrFile
from .heif import HeifFile
from .limits import bomb_limit, quiet_libtiff
from .picture import Picture
from .tiff import TiffByPillow, TiffFile


class UnreadableImageError(ValueError):
    """A file that cannot be read as a picture. The message is one sentence that names the file and the mend."""


# Pillow registers these suffixes but only recognises the files; it has no decoder for them.
_RECOGNISED_ONLY = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF"})

_MORE_SUFFIXES = {"pillow_heif": (".heic", ".heif", ".hif"), "OpenEXR": (".exr",)}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class Frames:
    """The pictures of an open file, decoded one at a time: `len(frames)`, `for picture in frames`, `frames[0]`.

    A context manager, which closes the file.

    Attributes:
        name: of the file, for messages.
        kind: "still" for one picture, "animation" for frames in time, "pages" for pictures that belong together.
        height, width: of the first picture, upright.
        loop: how often an animation runs, 0 for ever.
    """

    def __init__(self, source: str | Path | BinaryIO, allow_large: bool = False) -> None:
        self.name = _name(source)
        self._allow_large = allow_large
        self._stack = ExitStack()
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            if isinstance(source, (str, os.PathLike)):
                self._stream = self._stack.enter_context(_open_file(self.name))
            else:
                self._stream = _buffer_stream(source, self.name)
            with _reading(self.name, allow_large):
                self._file = _opened(self._stream)
            self.kind: Kind = self._file.kind
            self.loop = self._file.loop
            self.height, self.width = self._file.size
            on_failure.pop_all()

    def __len__(self) -> int:
        return self._file.count

    def __getitem__(self, index: int) -> Picture:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} frames, and none of number {index}.")
        with _reading(self.name, self._allow_large):
            return self._file.load(index)

    def __iter__(self) -> Iterator[Picture]:
        return (self[index] for index in range(len(self)))

    @property
    def durations(self) -> list[float]:
        """Of each frame of an animation, in milliseconds; reads the file once more."""
        return [picture.duration or 0 for picture in self] if self.kind == "animation" else []

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_frames(source: str | Path | BinaryIO, allow_large: bool = False) -> Frames:
    """Opens a file of one or more pictures; see `Frames` and, for what becomes of pixels and metadata, `read`.

    Raises:
        UnreadableImageError: as `read`; also later, by the picture that cannot be decoded.
    """
    return Frames(source, allow_large)


def read(source: str | Path | BinaryIO, allow_large: bool = False) -> Picture:
    """Reads a picture from a file or an open binary stream.

    Everything Pillow decodes is accepted: bilevel, grey, palette, RGB, CMYK, YCbCr, LAB, HSV, integer and floating
    point images, each with or without transparency. Of an animation or a multi-page file the first frame is read.

    * Orientation from EXIF or XMP is applied to the pixels and removed from the metadata.
    * RGB pixels stay in the colour space of their embedded profile, which is kept byte for byte; likewise grey pixels
      with a GRAY profile. A profile that does not fit the decoded pixels is dropped.
    * CMYK is converted to sRGB through its embedded profile (by Pillow's plain formula where there is none), LAB
      through Pillow's; their profiles are dropped.
    * Pixels under full transparency keep the colour the file stores.
    * 16-bit grey is exact and gives `bit_depth` 16. 16 bits per channel in colour, or grey with alpha, is decoded by
      Pillow to 8 bits, so such files give `bit_depth` 8.
    * 32-bit integers are taken as 16-bit values, or scaled by their largest value where that exceeds 65535. Floating
      point is taken as 0..1, or as 0..255, 0..65535 or 0..largest value, whichever is the first to hold them all.
      Negative values and NaN become 0.

    Args:
        source: path of a file, or a stream opened in binary mode (read to its end, left open).
        allow_large: lifts Pillow's limit against decompression bombs for this call. The limit is global to the
            process, so reads in other threads run without it for as long as this call takes.

    Returns:
        The picture: `rgb` float32 (H, W, 3) in 0..1, `alpha` float32 (H, W) in 0..1 or None.

    Raises:
        UnreadableImageError: there is no such file, or it is not a whole picture within the limits.
    """
    with open_frames(source, allow_large) as frames:
        return frames[0]


def find_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The picture files inside `folder`, in natural order (2.png before 10.png).

    A file counts by its suffix, if that is of a format that can be read. Hidden files and folders are left out.

    Args:
        folder: where to look.
        recursive: look into the folders below as well, of which each is entered once, however many links lead there.

    Raises:
        UnreadableImageError: `folder` is not a folder that can be listed.
    """
    Image.init()
    suffixes = {
        suffix
        for suffix, format_name in Image.registered_extensions().items()
        if format_name in Image.OPEN and format_name not in _RECOGNISED_ONLY | FORMATS_LEFT_OUT
    }
    for module, more in _MORE_SUFFIXES.items():
        if importlib.util.find_spec(module) is not None:
            suffixes.update(more)
    images: list[Path] = []
    entered: set[str] = set()
    folders = [Path(folder)]
    while folders:
        here = folders.pop()
        real = os.path.realpath(here)
        if real in entered:
            continue
        entered.add(real)
        try:
            entries = [path for path in here.iterdir() if not path.name.startswith(".")]
        except OSError as error:
            if len(entered) > 1:
                continue  # one below that may not be read
            raise UnreadableImageError(
                f"{folder} cannot be listed ({error.strerror}); give an existing folder of pictures."
            ) from error
        images += [path for path in entries if path.suffix.lower() in suffixes and path.is_file()]
        if recursive:
            folders += [path for path in entries if path.is_dir()]
    return sorted(images, key=lambda path: [_natural_key(part) for part in path.relative_to(folder).parts])


def _natural_key(name: str) -> tuple[list[str | int], str]:
    # Splitting by a group alternates text and digits, so keys compare text with text and numbers with numbers.
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _open_file(name: str) -> BinaryIO:
    if os.path.isdir(name):
        raise UnreadableImageError(f"{name} is a folder; give the path of one picture inside it.")
    try:
        stream = open(name, "rb")  # noqa: SIM115  (the caller closes it)
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{name} does not exist; check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreadableImageError(
            f"{name} cannot be opened ({reason}); check the path and its permissions."
        ) from error
    with ExitStack() as on_failure:
        on_failure.callback(stream.close)
        if not stream.seekable():
            return _buffer_stream(stream, name)
        if stream.seek(0, io.SEEK_END) == 0:
            raise UnreadableImageError(_empty(name))
        stream.seek(0)
        on_failure.pop_all()
    return stream


def _buffer_stream(stream: BinaryIO, name: str) -> io.BytesIO:
    """Pillow seeks; pipes and sockets cannot."""
    try:
        data = stream.read()
    except (OSError, ValueError) as error:
        raise UnreadableImageError(f"{name} cannot be read ({error}); open it for reading in binary mode.") from error
    if not isinstance(data, bytes):
        raise UnreadableImageError(f"{name} does not give bytes; open it in binary mode.")
    if not data:
        raise UnreadableImageError(_empty(name))
    return io.BytesIO(data)


def _empty(name: str) -> str:
    return f"{name} is empty (zero bytes); copy or download it again."


def _explain(error: Exception, name: str) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return (
            f"{name} is not an image that Pillow can read, or its header is damaged; "
            "convert it to PNG, JPEG, TIFF or WebP first."
        )
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return f"{name} is too large to read safely ({reason}); pass allow_large=True if you trust the file."
    if isinstance(error, ModuleNotFoundError):
        return f"{name} cannot be read yet: {reason}."
    if isinstance(error, MemoryError):
        return f"{name} needs more memory than there is; make the picture smaller, or check that it is not damaged."
    return f"{name} is damaged, cut short or of an unsupported kind ({reason}); copy it again or convert it to PNG."


def _name(source: str | Path | BinaryIO) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "the image stream"


def _opened(stream: BinaryIO) -> OpenFile:
    head = stream.read(12)
    stream.seek(0)
    if head.startswith(MAGIC):
        return ExrFile(stream)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return HeifFile(stream)
    if not head.startswith(_TIFF):
        return PillowFile(stream)
    quiet_libtiff()
    try:
        return TiffByPillow(stream)
    except Image.UnidentifiedImageError:
        return TiffFile(stream)


@contextmanager
def _reading(name: str, allow_large: bool) -> Iterator[None]:
    try:
        with bomb_limit(lifted=allow_large):
            yield
    except UnreadableImageError:
        raise
    except Exception as error:
        # Decoders meet damaged data with exceptions of nearly every type (SyntaxError, struct.error, EOFError,
        # IndexError, zlib.error, OverflowError, ...): any of them means the file is at fault.
        raise UnreadableImageError(_explain(error, name)) from error
