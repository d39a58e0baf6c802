"""Archives of every kind, sound and damaged, and a second, plain implementation of what should come
out of them.
"""

import io
import lzma
import random
import tarfile
from pathlib import Path

NAMES = ("output_train.txt", "output_val.txt", "vocab.txt")


# Making archives ----------------------------------------------------------------------------------

FOREIGN = (
    "Привет, мир. Γειά σου. 你好，世界。こんにちは。 नमस्ते. שלום. “Quoted” – café. 🙂🚀👩‍👩‍👧𝔘\ufeff"
)
BOM = "\ufeff".encode()
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


def member(
    name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, linkname: str = ""
) -> tarfile.TarInfo:
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


# A corpus, in all the ways that it can be packed --------------------------------------------------


def shards(count: int) -> dict[str, list[bytes]]:
    """Documents in several scripts, by the name of the shard that they are in."""
    generator = random.Random(count)
    return {
        f"urlsf_subset{i % 2:02d}-{i}_data": [
            f"{i}.{j} {''.join(generator.choices(FOREIGN, k=200))}".encode() + b"\n" * j
            for j in range(3)
        ]
        for i in range(count)
    }


def as_files(corpus: dict[str, list[bytes]], name: str = "openwebtext/{}.xz") -> dict[str, bytes]:
    packed = {
        shard: tar({f"{i:07d}.txt": text for i, text in enumerate(texts)})
        for shard, texts in corpus.items()
    }
    return {name.format(shard): xz(data) for shard, data in packed.items()}


def as_outer_tars(corpus: dict[str, list[bytes]]) -> dict[str, bytes]:
    files = as_files(corpus)
    names = ["subset00", "subset01"]
    return {
        f"{outer}.tar": tar({name: data for name, data in files.items() if outer in name})
        for outer in names
    }


NESTINGS = {
    "xz files": as_files,
    "xz files at depth": lambda corpus: as_files(
        corpus, "{0[15]}/deep/{0}.xz"
    ),  # folders in an order of their own
    "outer tars": as_outer_tars,
    "outer tars at depth": lambda corpus: {
        f"down/here/{name}": data for name, data in as_outer_tars(corpus).items()
    },
    "tar.xz files": lambda corpus: as_files(corpus, "{}.tar.xz"),
    "tars and files": lambda corpus: {
        **{name: data for name, data in as_files(corpus).items() if "subset00" in name},
        **{name: data for name, data in as_outer_tars(corpus).items() if "subset01" in name},
    },
    "plain text": lambda corpus: {
        f"{name}.txt": documents(texts).encode() for name, texts in corpus.items()
    },
    "packed text": lambda corpus: {
        f"{name}.xz": xz(documents(texts).encode()) for name, texts in corpus.items()
    },
}


# Other data than text -----------------------------------------------------------------------------

NOT_TEXT = {
    "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(100)),
    "noise without NULs": random.Random(2).randbytes(5000).replace(b"\0", b"\xff"),
    "GBK": "你好，世界。\n".encode("gbk") * 100,
    "Shift-JIS": "①これはある人の物語です。\n".encode("cp932") * 100,
    "UTF-16 without a mark": "A text without a byte-order mark.\n".encode("utf-16-le") * 9,
    "NULs, then text": bytes(20_000) + b"after NULs\n",
    "a NUL at byte 7,999": b"a" * 7_999 + b"\0" + b"a" * 9_000,
    "text, then NULs": b"a line of a log\n" * 20_000 + bytes(5_000_000),
    "a fifth and one more": b"a" * 7_999 + b"\xff" * 2_001,
}


# What should come out, and what did ---------------------------------------------------------------


def plain(data: bytes) -> str:
    return (
        data.removeprefix(BOM).decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    )


def text_file(data: bytes) -> str:
    """What a .txt comes to: a text of its own, which ends with a newline."""
    text = plain(data)
    return text if text.endswith("\n") or not text else text + "\n"


def documents(contents: list[bytes]) -> str:
    return "".join(
        text + "\n\n" for text in (plain(content).rstrip("\n") for content in contents) if text
    )


def three_files(texts: list[str]) -> list[bytes]:
    """The three files of these archives' texts: fewer than ten are cut as one."""
    parts = "".join(texts) if len(texts) < 10 else texts
    cut = int(0.9 * len(parts))
    train, val = "".join(parts[:cut]), "".join(parts[cut:])
    vocabulary = "".join(f"{character}\n" for character in sorted(set(train + val)))
    return [train.encode(), val.encode(), vocabulary.encode()]


def read_three(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in NAMES]


# Damage -------------------------------------------------------------------------------------------

NOISE = (
    random.Random(1).randbytes(15_000).hex().encode()
)  # hardly compressible, so that damage falls into data
PACKED = xz(tar({"a.txt": NOISE, "b.txt": NOISE}))
SHORT = xz(tar({"a.txt": b"a" * 700}))
OUTER = tar({"x/1.xz": SHORT, "x/2.xz": SHORT, "x/3.xz": SHORT})
OUTER_MEMBER = 512 + len(SHORT) + -len(SHORT) % 512


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGED = {
    "cut short.xz": PACKED[:-1000],
    "text.xz": b"just text",
    "trailing text.xz": PACKED + b"text",
    "text.tar": b"just text" * 1000,
    "empty.tar": b"",
    "negative size.xz": xz(pax(b"12 size=-10\n", ("a.txt", b"a" * 3000))),
    "no number.xz": xz(pax(b"13 size=many\n", ("a.txt", b"a" * 3000))),
    "absurd size.xz": xz(pax(b"25 size=9999999999999999\n", ("a.txt", b"a" * 3000))),
    "absurd size.tar": pax(b"25 size=9999999999999999\n", ("a.txt", b"a" * 3000)),
    "\x80bad name.xz": b"",
}
