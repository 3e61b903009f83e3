"""Files: the safetensors format, checked and with a digest; and a file written whole or not at all.

The format (https://github.com/huggingface/safetensors#format) is the length of a header, the
header in JSON, and the tensors' bytes. It is written and read here, with nothing but PyTorch, for
three reasons: saving after hours of training must not fail for want of a package; what the library
lets pass, such as a key that stands there twice, is refused; and the digest covers every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# Every file that we write begins so, after the eight bytes of the header's length.
_BEFORE_DIGEST = b'{"__metadata__":{"sha256":"'
_DIGEST = slice(8 + len(_BEFORE_DIGEST), 8 + len(_BEFORE_DIGEST) + 64)


def shown(name: object, most: int = 200) -> str:
    """A name for a message: what a terminal would act on is escaped, and what is long is cut."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else text[:most] + "..."


# ---- The format -----------------------------------------------------------------------------


class Entry(NamedTuple):
    """Where a file holds a tensor."""

    dtype: str  # the format's name for it
    shape: tuple[int, ...]
    begin: int  # in the file
    end: int


class Contents(NamedTuple):
    """A file's header."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytearray:
    """A safetensors file with these tensors, and "sha256", the digest, beside the metadata.

    The digest is that of the whole file with zeros in its own place. ValueError for a dtype that
    the format lacks.
    """
    _refuse_big_endian()
    header: dict[str, Any] = {"__metadata__": {"sha256": "0" * 64, **metadata}}
    # The widest numbers first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        t = tensors[name]
        if t.dtype not in _CODES:
            raise ValueError(f"{shown(name)}: a safetensors file cannot hold {t.dtype}")
        begin, end = end, end + t.numel() * t.element_size()
        places = {"shape": list(t.shape), "data_offsets": [begin, end]}
        header[name] = {"dtype": _CODES[t.dtype], **places}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    data = bytearray(start + end)
    data[:start] = struct.pack("<Q", len(text)) + text
    room = torch.frombuffer(data, dtype=torch.uint8)[start:]
    for name in order:
        begin, end = header[name]["data_offsets"]
        room[begin:end] = tensors[name].detach().cpu().reshape(-1).contiguous().view(torch.uint8)
    data[_DIGEST] = hashlib.sha256(data).hexdigest().encode()
    return data


def digest_holds(data: bytes) -> bool | None:
    """Whether every byte is as it was written; None if the file has no digest where ours is."""
    if data[8 : _DIGEST.start] != _BEFORE_DIGEST:
        return None
    view = memoryview(data)
    found = hashlib.sha256(view[: _DIGEST.start])
    found.update(b"0" * 64)
    found.update(view[_DIGEST.stop :])
    return found.hexdigest().encode() == data[_DIGEST]


def read_header(file: BinaryIO) -> Contents:
    """What a file holds. ValueError unless the header describes its every byte."""
    _refuse_big_endian()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
    if length > size - 8:
        raise ValueError("it ends within its header")
    found = strict_json(file.read(length))
    metadata = found.pop("__metadata__", {}) if isinstance(found, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its header is no table")
    entries = {name: _entry(entry, 8 + length) for name, entry in found.items()}
    at = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at:
            raise ValueError("its tensors overlap or leave gaps")
        at = entry.end
    if at != size:
        raise ValueError(f"it has {size:,} bytes, its header speaks of {at:,}")
    return Contents(metadata, entries)


def _entry(found: Any, start: int) -> Entry:
    """What the header says of one tensor, checked."""
    if not isinstance(found, dict) or found.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header says of a tensor what the format does not")
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    numbers = numbers and len(shape) <= 64
    if not numbers or not all(type(n) is int and 0 <= n < 2**63 for n in shape + offsets):
        raise ValueError("a shape or a place in its header is none")
    begin, end = offsets
    known = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if begin > end or (known and math.prod(shape) * known.itemsize != end - begin):
        raise ValueError("a tensor's shape and place disagree")
    return Entry(str(dtype), tuple(shape), start + begin, start + end)


def read_tensor(file: BinaryIO, entry: Entry) -> Tensor:
    """One tensor. ValueError if its dtype is unknown, or the file is shorter than it was."""
    if entry.dtype not in _DTYPES:
        raise ValueError(f"it holds numbers of the unknown type {shown(entry.dtype)}")
    file.seek(entry.begin)
    data = bytearray(file.read(entry.end - entry.begin))
    if len(data) != entry.end - entry.begin:
        raise ValueError("it became shorter while it was read")
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    dtype = _DTYPES[entry.dtype]
    numbers = flat.bool() if dtype == torch.bool else flat.view(dtype)  # any byte but 0 is true
    try:
        return numbers.reshape(entry.shape)
    except (RuntimeError, OverflowError) as error:  # a length of 0 beside lengths beyond counting
        raise ValueError("it has a shape that no tensor can have") from error


def _refuse_big_endian() -> None:
    if sys.byteorder != "little":
        raise ValueError("safetensors files are little-endian, this machine is not")


# ---- Written whole or not at all ------------------------------------------------------------

_PREFIX = ".aurora-saving-"
_DAY = 86_400.0


def write_atomically(path: Path, data: bytes | bytearray) -> None:
    """Write a file so that a crash at any point leaves the old one or the new one.

    The bytes go into a file beside it, ".aurora-saving-...", are flushed to the disk and renamed.
    What killed savers left of such files is removed after a day. An existing file keeps its mode
    and group, and a symbolic link goes on pointing to its target, which is replaced.

    Raises:
        ValueError: If the path is no regular file, such as a FIFO or a device.
        OSError: If it cannot be written; the old file is then as it was.
    """
    status = _status(path)
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {shown(target.parent)} to save into")
    _remove_leftovers(target.parent)
    beside = target.parent / f"{_PREFIX}{secrets.token_hex(8)}"  # short, however long the name is
    try:
        with open(beside, "xb") as file:
            if status is not None:
                _take_over(beside, status)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise
    with contextlib.suppress(OSError):  # where a folder cannot be opened, the rename has to do
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _status(path: Path) -> os.stat_result | None:
    """The status of the file to be replaced, None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{shown(path)} is not a regular file and cannot hold an adapter")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{shown(path)} is write-protected")
    return status


def _take_over(path: Path, status: os.stat_result) -> None:
    """Give a file the owner, group and mode of the one it will replace, as far as one may."""
    mode = stat.S_IMODE(status.st_mode)
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(path, status.st_uid, -1)
        try:
            os.chown(path, -1, status.st_gid)
        except OSError:
            mode &= ~0o070  # what one group may do is not for another
    os.chmod(path, mode)


def _remove_leftovers(folder: Path) -> None:
    for left in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _DAY:
                left.unlink()


def strict_json(text: bytes | str) -> Any:
    """Read JSON in UTF-8. ValueError also for a key that stands there twice, NaN and infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key of the JSON stands there twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    text = text if isinstance(text, str) else text.decode()
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
