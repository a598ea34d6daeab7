"""Damage to files, as disks, cut downloads and other programs do it; the same seed, the same damage.

Half of it is blind to what the file is. The other half knows containers: it changes what a checksum or a length would
keep from a reader, one member of an archive for example, and puts a whole container around it again.
"""

import gzip
import io
import json
import struct
import zipfile

import numpy as np

# In place of a value of JSON. Python's own writer has names for what is not finite, which its reader knows, too.
_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 0.5, 1e-320, 1e308, -7, 2**31, 2**63, 10**400, -(10**40)),
    *map(float, ("nan", "inf", "-inf")),
    *("", "x", "1", "../../x", "/etc/passwd", "a\nb", "\0", "\ud800", "(" * 9),
    *([], [None], [[]], [1, 2, 3, 4, 5, 6, 7, 8, 9], ["x"], {}, {"a": 1}, {"": None}),
)
_WHERE = 512  # bytes from either end, where most of what matters in a file is


def damage(name: str, data: bytes, seed: int) -> bytes:
    """Other bytes than `data`.

    Args:
        name: of the file, whose ending says what it is.
    """
    rng = np.random.default_rng(seed)
    while True:
        damaged = _inside(name, data, rng) if rng.random() < 0.5 else _bytes(data, rng)
        if damaged != data:
            return damaged


def _inside(name: str, data: bytes, rng: np.random.Generator) -> bytes:
    if name.endswith(".json"):
        return _json(data, rng)
    if name.endswith(".jsonl"):
        return _line(data, rng)
    if name.endswith(".safetensors"):
        return _safetensors(data, rng)
    if name.endswith(".tar.gz"):
        return gzip.compress(_bytes(gzip.decompress(data), rng))
    if data.startswith(b"PK") and zipfile.is_zipfile(io.BytesIO(data)):
        return _member(data, rng)
    return _bytes(data, rng)


def _bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, a stretch overwritten, lost, doubled or moved, or the end cut off."""
    size, damaged = len(data), bytearray(data)
    near = int(rng.integers(3))  # The beginning, the end, anywhere.
    first = max(0, size - _WHERE) if near == 1 else 0
    last = min(size, _WHERE) if near == 0 else size
    where = int(rng.integers(first, max(last, first + 1)))
    length = int(min(size, 2 ** rng.uniform(0, 10)))
    kind = int(rng.integers(9))
    if kind <= 3:
        for _ in range(int(2 ** rng.uniform(0, 6))):
            damaged[int(rng.integers(first, last))] ^= 1 << int(rng.integers(8))
    elif kind == 4:
        del damaged[where:]
    elif kind == 5:
        fill = (b"\0", b"\xff", b"")[int(rng.integers(3))] * length or rng.bytes(length)
        damaged[where : where + length] = fill[: size - where]
    elif kind == 6:
        del damaged[where : where + length]
    elif kind == 7:
        damaged[where:where] = damaged[where : where + length]
    else:
        other = int(rng.integers(0, size))
        a, b = data[where : where + length], data[other : other + length]
        damaged[where : where + len(a)], damaged[other : other + len(b)] = b[: len(a)], a[: len(b)]
    return bytes(damaged)


def _json(data: bytes, rng: np.random.Generator) -> bytes:
    """A value of another type or size, of another name, or missing; the rest is as it was."""
    content = json.loads(data)
    places = list(_places(content))
    if not places or rng.random() < 0.02:
        return json.dumps(_any(rng)).encode()
    holder, key = places[int(rng.integers(len(places)))]
    kind = int(rng.integers(8))
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, name = places[int(rng.integers(len(places)))]
        holder[key] = json.loads(json.dumps(other[name]))
    elif kind == 2 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 3 and isinstance(holder[key], int | float):
        holder[key] *= (-1, 2, 10, 1.5, 1e6)[int(rng.integers(5))]
    else:
        holder[key] = _any(rng)
    return json.dumps(content).encode()


def _any(rng: np.random.Generator) -> object:
    return _VALUES[int(rng.integers(len(_VALUES)))]


def _places(content: object):
    """Every list or dict with every key that it has."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


def _line(data: bytes, rng: np.random.Generator) -> bytes:
    lines = data.splitlines()
    number = int(rng.integers(len(lines)))
    lines[number] = _json(lines[number], rng)
    return b"\n".join([*lines, b""])


def _safetensors(data: bytes, rng: np.random.Generator) -> bytes:
    """Another table of contents, its length being right."""
    (length,) = struct.unpack("<Q", data[:8])
    table = _json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(table)) + table + data[8 + length :]


def _text(data: bytes, rng: np.random.Generator) -> bytes:
    """Of NumPy's file of a string, which is JSON."""
    written = io.BytesIO()
    np.save(written, _json(str(np.load(io.BytesIO(data))).encode(), rng).decode())
    return written.getvalue()


def _member(data: bytes, rng: np.random.Generator) -> bytes:
    """An archive of the same members, one of which is damaged, or has another name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    # The larger a member, the less each of its bytes matters.
    chances = np.array([1 / np.log(len(content) + 3) for _, content in members])
    chosen = int(rng.choice(len(members), p=chances / chances.sum()))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for number, (info, content) in enumerate(members):
            if number == chosen and info.filename == "about.npy" and rng.random() < 0.7:
                content = _text(content, rng)
            elif number == chosen and content and rng.random() < 0.9:
                content = _bytes(content, rng)
            elif number == chosen:
                info.filename += "x"
            archive.writestr(info, content)
    return written.getvalue()
