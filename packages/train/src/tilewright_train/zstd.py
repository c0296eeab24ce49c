"""Files packed by Zstandard, read as a stream: by Python's own module (3.14) or `zstandard`.

Memory is bounded whatever a file unpacks to: by 32 MiB and by the window that a frame asks for, 128
MiB at most.
"""

import io
from pathlib import Path
from typing import Any

from tilewright_train.errors import InputError

_CHUNK = 1 << 17  # bytes read from the file at a time

# Bytes unpacked at a time. A block of at least 4 gives at most 128 KiB, so these give 16 MiB at
# most, of which the module has two copies. 454 MB/s of text, against 569 with 1,024 or more.
_PIECE = 1 << 9


def open_zstd(file: Path) -> io.BufferedReader:
    """The unpacked bytes of `file`, whose frames follow one another.

    Reading raises EOFError where the file is cut short, InputError where it is damaged or needs
    more memory than 128 MiB.

    Raises:
        InputError: Neither module is there.
    """
    return io.BufferedReader(_Unpacked(file), _CHUNK)


class _Unpacked(io.RawIOBase):
    """Reads frame after frame; `zstandard`'s own reader takes a frame cut short for its end."""

    def __init__(self, file: Path) -> None:
        self._frame, self._error = _decompressor(file)
        self._file = file
        self._packed = file.open("rb")
        self._unpacked = memoryview(b"")
        self._inside: Any = None  # the frame that is being unpacked
        self._waiting = memoryview(b"")  # packed bytes that have been read

    def readable(self) -> bool:
        """As for every stream to be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the beginning of `buffer`; 0 at the end of the file."""
        while not self._unpacked:
            self._waiting = self._waiting or memoryview(self._packed.read(_CHUNK))
            if not self._waiting:
                if self._inside is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._unpack_piece()
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def close(self) -> None:
        """Let go of the file."""
        self._packed.close()
        super().close()

    def _unpack_piece(self) -> None:
        self._inside = self._inside or self._frame()
        piece = self._waiting[:_PIECE]
        try:
            self._unpacked = memoryview(self._inside.decompress(piece))
        except self._error as error:
            if "too much memory" in str(error):
                raise InputError(
                    f"{self._file} takes more than 128 MiB to unpack: pack it again without --long"
                ) from None
            raise InputError(f"{self._file} is damaged: {error}") from None
        used = len(piece)
        if self._inside.eof:
            used -= len(self._inside.unused_data)
            self._inside = None
        self._waiting = self._waiting[used:]


def _decompressor(file: Path) -> tuple[Any, type[Exception]]:
    """What makes the decompressor of a frame, and the exception of a damaged one."""
    try:
        from compression import zstd  # pyrefly: ignore[missing-import]

        return zstd.ZstdDecompressor, zstd.ZstdError
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise InputError(
            f"{file} is packed by zstd: install zstandard, as in"
            ' pip install "tilewright-train[zstd]"'
        ) from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
