"""Ways to spoil the content of a file: bytes, JSON, safetensors, zip archives, TSVs and PNGs.

A mutation takes a generator and the content, and gives another content, or the name of something else to put in the
file's place (`PLACES`). It is a function of the two, so that a seed brings the same input again.
"""

import csv
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

PLACES = ("missing", "empty", "a folder", "a link to itself", "a pipe", "/dev/zero")
DEEP = 100_000  # levels of nesting; Python's parsers stop at some thousand
BOMB = 3 * 2**30  # bytes that a bomb unpacks to
NAMES = ("../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "..", ".", "/", "a\0b", "x" * 5000,
         "\ud800", "a\nb", "CON", "-rf", "~", "%s", "$HOME", "\u202egnp.x")  # fmt: skip
NUMBERS = (0, -1, 1, 2, 7, 0.5, 1e-30, 1e30, -0.0, 2**31, 2**32, 2**63, -(2**63), 10**30, float("nan"), float("inf"))
# JSON that json.dumps does not write, by the text that stands for it until the end
RAW = {"@5000 digits@": "1" * 5000, "@1e999@": "1e999", "@deep@": "[" * DEEP + "]" * DEEP, "@bare@": "\x01",
       "@deep object@": '{"a":' * DEEP + "0" + "}" * DEEP, "@surrogates@": '"\\udc00\\ud800"'}  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], "", " ", "x", "7", "null", "true", *RAW)

Change = Callable[[Random, bytes], bytes | str]


@dataclass(frozen=True)
class Mutation:
    """fits: suffixes of the files that it is for; empty: all. seals: whether it mends the format's own sums again."""

    name: str
    change: Change
    fits: tuple[str, ...] = ()
    weight: int = 1
    seals: bool = False


# ---- bytes


def _at(rng: Random, size: int) -> int:
    """A place: near the beginning, near the end, or anywhere."""
    near = min(size, 256)
    return rng.choice((rng.randrange(near), size - 1 - rng.randrange(near), rng.randrange(size)))


def _flip(rng: Random, content: bytes) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[_at(rng, len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _run(rng: Random, content: bytes) -> bytes:
    at, length = _at(rng, len(content)), rng.choice((1, 4, 16, 256))
    fill = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return content[:at] + fill[: len(content) - at] + content[at + length :]


def _truncate(rng: Random, content: bytes) -> bytes:
    return content[: _at(rng, len(content))]


def _extend(rng: Random, content: bytes) -> bytes:
    return content + rng.choice((b"\0", b"\n", b" ", rng.randbytes(rng.randrange(1, 4096)), content, bytes(65536)))


def _spans(rng: Random, size: int) -> tuple[int, int, int]:
    return tuple(sorted(rng.randrange(size + 1) for _ in range(3)))


def _swap(rng: Random, content: bytes) -> bytes:
    a, b, c = _spans(rng, len(content))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _cut(rng: Random, content: bytes) -> bytes:
    a, b, _ = _spans(rng, len(content))
    return content[:a] + content[b:]


def _repeat(rng: Random, content: bytes) -> bytes:
    a, b, _ = _spans(rng, len(content))
    return content[:b] + content[a:b] + content[b:]


def _field(rng: Random, content: bytes) -> bytes:
    """A number of 1 to 8 bytes in another size, as of a length or an offset."""
    width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    value = rng.choice((0, 1, 2**15, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1))
    at = _at(rng, len(content))
    field = (value % 2 ** (8 * width)).to_bytes(width, order)
    return content[:at] + field[: len(content) - at] + content[at + width :]


def _place(rng: Random, content: bytes) -> str:
    return rng.choice(PLACES)


# ---- JSON


def _sites(value: object) -> list[tuple[dict | list, object]]:
    """(container, key) of each value inside."""
    out = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    return out + [site for box, key in out if isinstance(box[key], dict | list) for site in _sites(box[key])]


def hostile(rng: Random, value: object) -> object:
    """Another value in the place of one."""
    around = rng.choice(([value], [value, value], {"x": value}, str(value), [None], [value] * 1000))
    return rng.choice((rng.choice(NUMBERS), rng.choice(NAMES), rng.choice(OTHERS), around))


def _spoil(rng: Random, value: object) -> None:
    """Change one place of a JSON value."""
    sites = _sites(value)
    if not sites:
        return
    box, key = rng.choice(sites)
    how = rng.choice(("value", "value", "value", "drop", "rename", "twice", "add", "swap"))
    if how == "drop":
        del box[key]
    elif how == "rename" and isinstance(box, dict):
        box[rng.choice((key + "x", key.upper(), f" {key}", "", "\ud800", key[:-1]))] = box.pop(key)
    elif how == "twice" and isinstance(box, dict):
        box[f"@twice@{key}"] = hostile(rng, box[key])
    elif how == "add":
        box.insert(key, hostile(rng, box[key])) if isinstance(box, list) else box.update(x=hostile(rng, box[key]))
    elif how == "swap":
        other, name = rng.choice(sites)
        box[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(box[key]))
    else:
        box[key] = hostile(rng, box[key])


def _dump(rng: Random, value: object) -> bytes:
    text = json.dumps(value, indent=rng.choice((None, 1)) if isinstance(value, dict) else None)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.replace('"@twice@', '"').encode()


def _json(rng: Random, content: bytes) -> bytes:
    """One or two places of a document, or of a line of JSON lines."""
    try:
        before, line, after = b"", content, b""
        value = json.loads(line)
    except ValueError:
        lines = content.splitlines(keepends=True)
        j = rng.randrange(len(lines))
        before, after = b"".join(lines[:j]), b"\n" + b"".join(lines[j + 1 :])
        value = json.loads(lines[j])
    for _ in range(rng.choice((1, 1, 2))):
        _spoil(rng, value)
    out = _dump(rng, value)
    return before + (out.replace(b"\n", b"") if after else out) + after


def _text(rng: Random, content: bytes) -> bytes:
    """What is no JSON, no UTF-8, or two documents."""
    at = rng.randrange(len(content) + 1)
    return rng.choice((
        content[:at] + rng.choice((b"\xff", b"\xed\xa0\x80", b"\0", b"\xc3", b"\r", b"\x1a", b"//x\n")) + content[at:],
        b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"), content + content, b"[" * DEEP + content,
        b"null", b"[]", b"{}", b"1" * 5000, b"NaN", b'"' + content, b"[" + content + b"]", b"<html>", b"\n",
    ))  # fmt: skip


# ---- safetensors: 8 bytes of length, a JSON header, the numbers


def _header(rng: Random, content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = rng.choice((_json, _json, _json, _text, _flip))(rng, content[8 : 8 + size])
    if rng.random() < 0.8:
        header += b" " * (-len(header) % 8)
    length = rng.choice((len(header),) * 9 + (0, len(header) + 8, 2**63, 2**64 - 1, 99_999_999))
    return length.to_bytes(8, "little") + header + content[8 + size :]


# ---- zip archives, as torch.save writes them


def _members(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def _pack(members: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as file:
        for name, data in members:
            file.writestr(zipfile.ZipInfo(name.encode(errors="replace").decode()), data, how)
    return out.getvalue()


def _repack(rng: Random, content: bytes) -> bytes:
    """Another member, with the sums of the archive right again."""
    members = _members(content)
    j = rng.choice((rng.randrange(len(members)), [name.endswith("data.pkl") for name, _ in members].index(True)))
    name, data = members[j]
    how = rng.choice(("bytes", "bytes", "bytes", "drop", "rename", "twice", "order", "deflate"))
    if how == "bytes":
        members[j] = name, (rng.choice((_flip, _run, _truncate, _cut, _field))(rng, data) if data else b"x")
    elif how == "drop":
        del members[j]
    elif how == "rename":
        root = name.partition("/")[0]
        members[j] = rng.choice((f"{root}/{rng.choice(NAMES)}", rng.choice(NAMES), name + "x", "", f"x/{name}")), data
    elif how == "twice":
        members.append((name, rng.choice((data, data[::-1]))))
    elif how == "order":
        rng.shuffle(members)
    return _pack(members, zipfile.ZIP_DEFLATED if how == "deflate" else zipfile.ZIP_STORED)


def _lie(rng: Random, content: bytes) -> bytes:
    """Sizes and offsets in the directory that are not the members'."""
    out = bytearray(content)
    starts = [i for i in range(len(out) - 46) if out[i : i + 4] == b"PK\x01\x02"] + [content.rfind(b"PK\x05\x06")]
    at = rng.choice(starts)
    field = at + (rng.choice((8, 10, 12, 16)) if at == starts[-1] else rng.choice((8, 10, 16, 20, 24, 28, 30, 42)))
    struct.pack_into("<I", out, field, rng.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 2, 2**32 - 1, rng.getrandbits(24))))
    return bytes(out)


@cache
def _zeros() -> bytes:
    """A stream of deflate that unpacks to `BOMB` zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return part * (BOMB // 2**24) + b"\x03\x00"  # parts end at whole bytes and refer to nothing before


def _bomb(rng: Random, content: bytes) -> bytes:
    """A member that unpacks to gigabytes; its size in the directory may lie."""
    members, packed, said = _members(content), _zeros(), rng.choice((BOMB, 2**32 - 2, 64))
    spoiled = rng.choice([name for name, _ in members])
    out, directory = io.BytesIO(), b""
    for name, data in members:
        bomb = name == spoiled
        data, size = (packed, said) if bomb else (data, len(data))
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 8 if bomb else 0, 0, 0, zlib.crc32(data), len(data), size,
                             len(name.encode()), 0)  # fmt: skip
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, out.tell())
        directory += name.encode()
        out.write(b"PK\x03\x04" + fields + name.encode() + data)
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), out.tell(), 0)
    return out.getvalue() + directory + b"PK\x05\x06" + end


# ---- TSVs


def _cells(rng: Random, content: bytes) -> bytes:
    rows = list(csv.reader(io.StringIO(content.decode()), delimiter="\t"))
    row = rng.choice(rows)
    j = rng.randrange(len(row))
    names = [name.encode(errors="replace").decode() for name in NAMES]
    how = rng.choice(("value", "value", "value", "drop", "twice", "row", "again", "swap"))
    if how == "value":
        deep = rng.choice(("[" * 50_000 + "]" * 50_000, "[" * 5000, "['" + "a', '" * 30_000 + "']", "-" * 90_000 + "1"))
        row[j] = rng.choice((rng.choice(names), str(rng.choice(NUMBERS)), "", "[]", "['']", deep, f"['{row[j]}']",
                             rng.choice(rng.choice(rows)), rows[1][0], "[1, None]", "x" * 100))  # fmt: skip
    elif how == "drop":
        del row[j]
    elif how == "twice":
        row.insert(j, row[j])
    elif how == "row":
        rows.remove(row)
    elif how == "again":
        rows.append(list(row))
    else:
        k = rng.randrange(len(row))
        row[j], row[k] = row[k], row[j]
    out = io.StringIO()
    quoting = rng.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL))
    csv.writer(out, delimiter="\t", quoting=quoting, lineterminator=rng.choice(("\n", "\r\n"))).writerows(rows)
    return out.getvalue().encode()


# ---- PNGs: chunks, each with a sum


def _chunks(rng: Random, content: bytes) -> bytes:
    """Another chunk, with its sum right again."""
    chunks, at = [], 8
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    j = rng.randrange(len(chunks))
    kind, data = chunks[j]
    how = rng.choice(("bytes", "bytes", "size", "drop", "twice", "swap", "kind"))
    if how == "bytes":
        chunks[j] = kind, (_flip(rng, data) if data else b"x")
    elif how == "size":
        sides = [rng.choice((0, 1, 3, 9000, 16_384, 30_000, 2**31 - 1, 2**31)) for _ in range(2)]
        chunks[0] = chunks[0][0], struct.pack(">II", *sides) + chunks[0][1][8:]
    elif how == "drop":
        del chunks[j]
    elif how == "twice":
        chunks.insert(j, chunks[j])
    elif how == "swap":
        rng.shuffle(chunks)
    else:
        chunks[j] = rng.choice((b"IDAT", b"PLTE", b"tRNS", b"acTL", b"zTXt", b"iCCP", b"abCD")), data
    packed = [len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in chunks]
    return content[:8] + b"".join(packed)


JSON, ZIPS = (".json", ".jsonl"), (".bin", ".pt")
MUTATIONS = (
    Mutation("flip bits", _flip), Mutation("run of bytes", _run), Mutation("truncate", _truncate),
    Mutation("extend", _extend), Mutation("swap blocks", _swap), Mutation("cut a block", _cut),
    Mutation("repeat a block", _repeat), Mutation("number of bytes", _field), Mutation("something else", _place),
    Mutation("JSON value", _json, JSON, 12), Mutation("JSON text", _text, JSON, 2),
    Mutation("header", _header, (".safetensors",), 6),
    Mutation("member", _repack, ZIPS, 6, seals=True), Mutation("sizes that lie", _lie, ZIPS, 2),
    Mutation("bomb", _bomb, ZIPS, seals=True),
    Mutation("cell", _cells, (".tsv",), 9),
    Mutation("chunk", _chunks, (".png",), 6, seals=True),
)  # fmt: skip


def mutate(rng: Random, name: str, content: bytes) -> tuple[Mutation, bytes | str]:
    """One of the mutations for a file of this name, and another content. torch's legacy format is no zip archive."""
    suffix = "." + name.rpartition(".")[2]
    some = [m for m in MUTATIONS if not m.fits or suffix in m.fits]
    some = [m for m in some if m.fits != ZIPS or content.startswith(b"PK")]
    while True:
        (m,) = rng.choices(some, [m.weight for m in some])
        if (new := m.change(rng, content)) != content:
            return m, new
