"""Archives of every kind, sound and damaged, and what should come out of them, plainly computed."""

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
        for name, content in dict(members).items():
            info = member(name, size=len(content)) if isinstance(name, str) else name
            archive.addfile(info, io.BytesIO(content) if content else None)
    return buffer.getvalue()


def member(
    name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, linkname: str = ""
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, linkname
    return info


def v7(members: dict[str, bytes]) -> bytes:
    """A tar from before there was a standard: a header is a name, a size and a check sum."""
    data = b""
    for name, content in members.items():
        fields = name.encode().ljust(124, b"\0") + b"%011o\0" % len(content)
        header = fields.ljust(148, b"\0") + b"%06o\0 " % sum(fields + b" " * 8)
        data += header.ljust(512, b"\0") + content + bytes(-len(content) % 512)
    return data + bytes(1024)


# A tar in which a record says more about the members that follow.
def pax(record: bytes, *rest: tuple) -> bytes:
    return tar([(member("pax", tarfile.XHDTYPE, len(record)), record), *rest])


def nested(levels: int, name: str, pack=bytes) -> bytes:
    """A text in a tar in a tar …; `pack=xz` makes a .tar.xz of each."""
    data = b"a text"
    for level in range(levels):
        data = pack(v7({name if level else "a.txt": data}))
    return data


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


def as_tars(corpus: dict[str, list[bytes]], name: str = "{}.tar", pack=bytes) -> dict[str, bytes]:
    return {
        name.format(shard): pack(tar({f"{i:07d}.txt": text for i, text in enumerate(texts)}))
        for shard, texts in corpus.items()
    }


def as_files(corpus: dict[str, list[bytes]], name: str = "openwebtext/{}.xz") -> dict[str, bytes]:
    return as_tars(corpus, name, xz)


def as_outer_tars(corpus: dict[str, list[bytes]], name: str = "{}.tar") -> dict[str, bytes]:
    files = as_files(corpus).items()
    return {
        name.format(outer): tar({name: data for name, data in files if outer in name})
        for outer in ("subset00", "subset01")
    }


def as_texts(corpus: dict[str, list[bytes]], name: str = "{}.txt", pack=bytes) -> dict[str, bytes]:
    return {name.format(shard): pack(documents(texts).encode()) for shard, texts in corpus.items()}


NESTINGS = {
    "xz files": as_files,
    # Folders in an order of their own.
    "xz files at depth": lambda corpus: as_files(corpus, "{0[15]}/deep/{0}.xz"),
    "outer tars": as_outer_tars,
    "outer tars at depth": lambda corpus: as_outer_tars(corpus, "down/here/{}.tar"),
    "outer tars in a tar": lambda corpus: {"all.tar": tar(as_outer_tars(corpus))},
    "tars in a tar in a tar": lambda corpus: {"all.tar": tar({"x/y.tar": tar(as_tars(corpus))})},
    "tar.xz files": lambda corpus: as_files(corpus, "{}.tar.xz"),
    "tar.xz files in a tar": lambda corpus: {"all.tar": tar(as_files(corpus, "{}.tar.xz"))},
    "tars and files": lambda corpus: {
        **{name: data for name, data in as_files(corpus).items() if "subset00" in name},
        **{name: data for name, data in as_outer_tars(corpus).items() if "subset01" in name},
    },
    "plain text": as_texts,
    "packed text": lambda corpus: as_texts(corpus, "{}.xz", xz),
}
# Members of one tar.xz, which keep their order.
IN_ONE_XZ = {
    "xz files": as_files,
    "outer tars": as_outer_tars,
    "outer tars without an ending": lambda corpus: as_outer_tars(corpus, "{}"),
    "tars": as_tars,
    "texts": as_texts,
    "packed texts": lambda corpus: as_texts(corpus, "{}.xz", xz),
    "tar.xz of tar.xz": lambda corpus: {"a.tar.xz": xz(tar(as_files(corpus, "{}.tar.xz")))},
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
    text = data.removeprefix(BOM).decode("utf-8", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def documents(contents: list[bytes]) -> str:
    texts = [plain(content).rstrip("\n") for content in contents]
    return "".join(f"{text}\n\n" for text in texts if text)


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

# Hardly compressible, so that damage falls into data.
PACKED = xz(tar(dict.fromkeys("ab", random.Random(1).randbytes(15_000).hex().encode())))
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
    "inside.tar.xz": xz(tar({"a.tar": tar({"1.xz": SHORT, "2.xz": SHORT[:-4]})})),
    "\x80bad name.xz": b"",
}
