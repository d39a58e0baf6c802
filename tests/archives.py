"""Archives of every kind, sound and damaged, and a second, plain implementation of what should come out of them."""

import bz2
import codecs
import gzip
import io
import lzma
import random
import tarfile
from pathlib import Path

NAMES = ("output_train.txt", "output_val.txt", "vocab.txt")


# Making archives -----------------------------------------------------------------------------------------------------

FOREIGN = "Привет, мир. Γειά σου. 你好，世界。こんにちは。 नमस्ते. שלום. “Quoted” – café. 🙂🚀👩‍👩‍👧𝔘\ufeff"
BOM = codecs.BOM_UTF8
TEXT = f"{FOREIGN}\n".encode() * 20


def xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=0)


def tar(members: dict[str, bytes] | list, format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of texts by name, or of (name or TarInfo, content) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, content in members.items() if isinstance(members, dict) else members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if content else None)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, linkname
    return info


def v7(members: dict[str, bytes]) -> bytes:
    """A tar from before there was a standard: without the word `ustar` in its headers."""
    data = b""
    for name, content in members.items():
        header = bytearray(member(name, size=len(content)).tobuf(tarfile.USTAR_FORMAT))
        header[257:512] = bytes(255)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data += bytes(header) + content + bytes(-len(content) % 512)
    return data + bytes(1024)


def pax(record: bytes, *rest: tuple) -> bytes:
    """A tar in which `record` says more about the members that follow."""
    return tar([(member("pax", tarfile.XHDTYPE, len(record)), record), *rest])


# A corpus, in all the ways that it can be packed ---------------------------------------------------------------------


def shards(count: int) -> dict[str, list[bytes]]:
    """Documents in several scripts, by the name of the shard that they are in."""
    generator = random.Random(count)
    return {
        f"urlsf_subset{i % 2:02d}-{i}_data": [
            f"{i}.{j} {''.join(generator.choices(FOREIGN, k=200))}".encode() + b"\n" * j for j in range(3)
        ]
        for i in range(count)
    }


def as_files(corpus: dict[str, list[bytes]], name: str = "openwebtext/{}.xz") -> dict[str, bytes]:
    return {
        name.format(shard): xz(tar({f"{i:07d}.txt": content for i, content in enumerate(contents)}))
        for shard, contents in corpus.items()
    }


def as_outer_tars(corpus: dict[str, list[bytes]]) -> dict[str, bytes]:
    files = as_files(corpus)
    return {
        f"subset{i:02d}.tar": tar({name: content for name, content in files.items() if f"subset{i:02d}" in name})
        for i in range(2)
    }


def spread(files: dict[str, bytes]) -> dict[str, bytes]:
    return {
        f"{'zyx'[i % 3]}/{'deep/' * (i % 4)}{Path(name).name}": data for i, (name, data) in enumerate(files.items())
    }


NESTINGS = {
    "xz files": as_files,
    "xz files at depth": lambda corpus: spread(as_files(corpus)),
    "outer tars": as_outer_tars,
    "outer tars at depth": lambda corpus: {f"down/here/{name}": data for name, data in as_outer_tars(corpus).items()},
    "tar.xz files": lambda corpus: as_files(corpus, "{}.tar.xz"),
    "tars and files": lambda corpus: {
        **as_files({name: texts for name, texts in corpus.items() if "subset00" in name}),
        **{name: data for name, data in as_outer_tars(corpus).items() if "subset01" in name},
    },
    "plain text": lambda corpus: {f"{name}.txt": documents(texts).encode() for name, texts in corpus.items()},
    "packed text": lambda corpus: {f"{name}.xz": xz(documents(texts).encode()) for name, texts in corpus.items()},
}


# Other data than text ------------------------------------------------------------------------------------------------

COMPRESSED = {
    "gzip": (gzip.compress(b"text"), "gunzip"),
    "bzip2": (bz2.compress(b"text"), "bunzip2"),
    "zip": (b"PK\3\4\x14\0\0\0\x08\0" + bytes(20) + b"word/document.xml", "unzip"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x58" + b"text" * 9, "zstd -d"),
    "xz": (xz(b"text"), "xz -d"),
    "lz4": (b"\x04\x22\x4d\x18\x64\x40\xa7" + b"text", "lz4 -d"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(range(100)), "7z x"),
    "rar": (b"Rar!\x1a\x07\1\0" + bytes(range(100)), "unrar x"),
}
README = "README, .Other kinds of data."
BINARY = {
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(100)), "take it out"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(range(100)), "take it out"),
    "GIF": (b"GIF89a\x20\0\x20\0\x80\0\0", "take it out"),
    "PDF": (b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\n", README),
    "parquet": (b"PAR1\x15\x04\x15\x10\x15\x14\x4c" + b"text" * 9 + b"PAR1", README),
    "Arrow": (b"ARROW1\0\0" + bytes(range(100)), README),
    "SQLite": (b"SQLite format 3\0\x10\0\1\1" + bytes(80), README),
    "Office": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(80), README),
    "Linux program": (b"\x7fELF\2\1\1\0" + bytes(56), "take it out"),
    "Windows program": (b"MZ\x90\0\3\0\0\0\4\0\0\0\xff\xff\0\0" + bytes(48), "take it out"),
    "RIFF": (b"RIFF\x24\x08\0\0WAVEfmt " + bytes(30), "take it out"),
    "Ogg": (b"OggS\0\2" + bytes(30), "take it out"),
    "MP3": (b"ID3\4\0\0\0\0\0\x23TSSE", "take it out"),
    "MP4": (b"\0\0\0\x20ftypisom\0\0\2\0", "take it out"),
    "binary": (random.Random(2).randbytes(5000), "take it out"),  # of no kind that is known by name
}
LIKE_TEXT = [  # what begins like other data, and is text
    b"BZhang is a name\n",
    b"MZ is what programs begin with\n",
    b"GIF89a is the name of a format, GIF87a another\n",
    b"PAR1 is the label of the first part\n",
    b"PK is short for Phil Katz\n",
    b"RIFF is a container, and so is WAVE\n",
    b"OggS! cried the hero\n",
    b"ID3 tags hold the names of songs\n",
    b"%PDF is how those begin\n",
    b"7z, Rar! and ustar are archives\n",
    bytes(512) + b"after 512 NULs\n",
    bytes(20_000) + b"after more of them\n",
    b"in between" + bytes(5000) + b"\n" + bytes(700) + b"and once more\n",
    b"\x1b[1mbold\x1b[0m and o\bover\n" * 90,
]


# What should come out, and what did ----------------------------------------------------------------------------------


def plain(data: bytes) -> str:
    return data.removeprefix(BOM).decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")


def text_file(data: bytes) -> str:
    """What a .txt comes to: a text of its own, which ends with a newline."""
    text = plain(data)
    return text if text.endswith("\n") or not text else text + "\n"


def documents(contents: list[bytes]) -> str:
    return "".join(text + "\n\n" for text in (plain(content).rstrip("\n") for content in contents) if text)


def invalid_sequences(data: bytes) -> int:
    count = 0

    def handler(error):
        nonlocal count
        count += 1
        return "", error.end

    codecs.register_error("count", handler)
    data.decode("utf-8", "count")
    return count


def three_files(texts: list[str]) -> list[bytes]:
    if len(texts) == 1:
        cut = int(0.9 * len(texts[0]))
        train, val = texts[0][:cut], texts[0][cut:]
    else:
        cut = max(1, int(0.9 * len(texts)))
        train, val = "".join(texts[:cut]), "".join(texts[cut:])
    vocabulary = "".join(f"{character}\n" for character in sorted(set(train + val)))
    return [train.encode(), val.encode(), vocabulary.encode()]


def read_three(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in NAMES]


# Damage --------------------------------------------------------------------------------------------------------------

NOISE = random.Random(1).randbytes(15_000).hex().encode()  # hardly compressible, so that damage falls into data
PACKED = xz(tar({"a.txt": NOISE, "b.txt": NOISE}))
SHORT = xz(tar({"a.txt": b"a" * 700}))
AB = {"a": b"a", "b": b"b"}
OUTER = tar({"x/1.xz": SHORT, "x/2.xz": SHORT, "x/3.xz": SHORT})
OUTER_MEMBER = 512 + len(SHORT) + -len(SHORT) % 512


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGED = {
    "cut short.xz": PACKED[:-1000],
    "flipped byte.xz": flip(PACKED, len(PACKED) // 2),
    "cut tar inside.xz": xz(tar({"a.txt": NOISE})[:-20_000]),
    "cut header inside.xz": xz(tar({"a.txt": b"a", "b.txt": b"b"})[:1324]),
    "text.xz": b"just text",
    "empty.xz": b"",
    "trailing text.xz": PACKED + b"text",
    "xz inside.xz": xz(tar({"a.txt": b"a", "b.xz": SHORT})),
    "tar inside.xz": xz(tar({"a.txt": b"a", "b.tar": OUTER})),
    "tar inside.tar": tar({"a.txt": b"a", "b.tar": OUTER}),
    "xz inside.txt": tar({"a.txt": b"a", "b.xz": SHORT}),
    "text.tar": b"just text" * 1000,
    "empty.tar": b"",
    "packed.tar": PACKED,
    "negative size.xz": xz(pax(b"12 size=-10\n", ("a.txt", b"a" * 3000))),
    "minus one.xz": xz(pax(b"11 size=-1\n", ("a.txt", b"a" * 3000))),
    "no number.xz": xz(pax(b"13 size=many\n", ("a.txt", b"a" * 3000))),
    "absurd size.xz": xz(pax(b"25 size=9999999999999999\n", ("a.txt", b"a" * 3000))),
    "endless number.xz": xz(pax(b"5012 size=" + b"9" * 5000 + b"\n", ("a.txt", b"a"))),
    "absurd size.tar": pax(b"25 size=9999999999999999\n", ("a.txt", b"a" * 3000)),
    "gzip.txt": gzip.compress(b"text"),
    "gzip.xz": xz(gzip.compress(b"text")),
    "sparse.tar": tar([(member("a.txt", tarfile.GNUTYPE_SPARSE), b"")]),
    "another encoding.txt": "你好，世界。\n".encode("gbk") * 100,
    "\x80bad name.xz": b"",
}
