"""Turn archives of text into `output_train.txt`, `output_val.txt` and `vocab.txt`.

    archives (.tar, .xz, .txt)  ->  documents  ->  clean UTF-8 text  ->  two files and the characters in them

OpenWebText's `.xz` files are tars of documents inside; reading them as text would train a model on tar headers. So
every archive is opened by what it contains, and what is no text never becomes corpus in silence. Worker processes
unpack archives side by side, each into a file of its own that is then appended to the output, so that neither memory
nor temporary files grow with the corpus.

A `.txt` is a text of its own and ends with a newline. `.xz` files of plain text are shards of one text and are joined
as they are. Each document of a tar is followed by a blank line. Some names are never corpus, in a folder as in a tar,
so that packing a folder changes nothing: the outputs of this script and of the tutorial's, `requirements.txt`, and
names that begin with a dot.
"""

import argparse
import codecs
import io
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

DEFAULT_DATA_DIR = "openwebtext"
OUTPUT_NAMES = ("output_train.txt", "output_val.txt", "vocab.txt")
NEVER_CORPUS = {*OUTPUT_NAMES, "train_split.txt", "val_split.txt", "requirements.txt"}
TRAIN_SHARE = 0.9

READ_SIZE = 256 << 10  # bytes read or unpacked at once, few enough to stay in a core's cache
CHUNK = 4 << 20  # bytes of text cleaned at once
AHEAD = 4  # archives per worker that may be unpacked before it is their turn to be written
XZ_MEMORY = 128 << 20  # `xz -9` needs 65 MB to unpack; a file that asks for more than this is refused
FEW = 10  # archives that the summary names
STATUS_SECONDS = 60  # between two lines of progress in a log file
END_MARK = bytes(tarfile.BLOCKSIZE)  # NULs end a tar
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
REPLACEMENT = "\ufffd"
ELSEWHERE = 'see README, "Other kinds of data"'

ENDING_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows lacks one
ALL_SIGNALS = [signal.SIGINT, *ENDING_SIGNALS]


class DataError(Exception):
    """The data can't be used as it is; the message says which file, why, and what to do."""


class Damaged(Exception):
    """An archive is cut short, corrupt, or no text; the message says what is wrong with "it" and what to do."""

    def __init__(self, what: str, remedy: str = "replace it"):
        super().__init__(f"{what}; {remedy}")


@contextmanager
def name_file_in_errors(path: Path | str) -> Iterator[None]:
    """Name `path` in any OSError from the block; Python's own errors name a file only when it is opened."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), error.filename or path) from error


def one_line(text: str) -> str:
    """Escape line ends, which file names may hold."""
    return text.replace("\n", r"\n")


def notify(message: str) -> None:
    print(one_line(message), file=sys.stderr)


# Finding archives ----------------------------------------------------------------------------------------------------


class Archive(NamedTuple):
    """One unit of the corpus: `size` bytes from `start` in the file `path`; messages call it `name`."""

    name: str
    path: Path
    start: int
    size: int

    @property
    def is_xz(self) -> bool:
        return self.name.lower().endswith(".xz")

    @property
    def is_tar(self) -> bool:
        return self.name.lower().endswith(".tar")


def find_archives(data_dir: Path) -> tuple[list[Archive], dict[str, list[str]]]:
    """Return all archives below `data_dir`, and the names of what is passed over, by reason.

    Archives are sorted by their own file name, then by path. The `.xz` members of a `.tar` are archives of their own,
    so a corpus comes out in the same order whether its outer tars are unpacked or not. Raises DataError if there are
    none.
    """

    def fail(error: OSError):
        raise error  # os.walk would pass over a folder that can't be read

    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; name the folder that holds your archives with -data_dir")
    archives = []
    passed_over = defaultdict(list)
    seen = {os.path.realpath(data_dir)}
    # Sorted, so that of two links to one folder the same one is followed on every system.
    for folder, subfolders, files in os.walk(data_dir, onerror=fail, followlinks=True):
        entered = []
        for name in sorted(subfolders) + sorted(files):
            path = Path(folder, name)
            shown = path.relative_to(data_dir).as_posix()
            reason = reason_to_pass_over(path, seen)
            if reason:
                passed_over[reason].append(shown)
            elif name in subfolders:
                entered.append(name)
            else:
                archive = Archive(shown, path, 0, path.stat().st_size)
                archives += archives_in_tar(archive, passed_over) if archive.is_tar else [archive]
        subfolders[:] = entered
    if not archives:
        problem = f"{data_dir}: holds no .tar, .xz or .txt file; put your archives or texts there"
        raise DataError("; ".join([problem, *describe_passed_over(passed_over)]))
    return sorted(archives, key=lambda archive: (archive.name.rpartition("/")[2], archive.name)), passed_over


def reason_to_pass_over(path: Path, seen: set[str]) -> str:
    """Return why a file or folder is no part of the corpus, or "", and add it to those `seen`.

    `seen` holds real paths, so that links to one folder neither double the corpus nor lead round in circles.
    """
    reason = reason_in_name(path.name)
    if reason:
        return reason
    if path.is_dir():
        if os.path.exists(path / "pyvenv.cfg"):
            return "a virtual environment"
    elif path.suffix.lower() not in {".tar", ".xz", ".txt"}:
        return f"not .tar, .xz or .txt; {ELSEWHERE}"
    elif not stat.S_ISREG(path.stat().st_mode):
        return "a pipe or device"  # which may never end
    real_path = os.path.realpath(path)
    if real_path in seen:
        return "a link to what is read anyway"
    seen.add(real_path)
    return ""


def reason_in_name(name: str) -> str:
    """Return why a file or a member of a tar with this name is no part of the corpus, or ""."""
    # Editors and macOS (`._name`) leave hidden files beside the text. Most names are cleared without looking at parts.
    if "/." in f"/{name}" and any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
        return "hidden"
    if name.rpartition("/")[2].lower() in NEVER_CORPUS:
        return "an output of these scripts, or requirements.txt"
    return ""


def describe_passed_over(passed_over: dict[str, list[str]]) -> list[str]:
    """Return a line for each reason, with some examples."""
    lines = []
    for reason, names in passed_over.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        lines.append(f"passed over ({reason}): {', '.join(names[:3])}{more}")
    return lines


def archives_in_tar(outer: Archive, passed_over: dict[str, list[str]]) -> list[Archive]:
    """Return the `.xz` members of a tar, and the tar itself if it holds documents too or is damaged."""
    archives = []
    no_corpus = []  # reported here, unless the tar is read itself, which reports them too
    read_itself = False
    with name_file_in_errors(outer.path), open(outer.path, "rb") as file:
        try:
            for name, size in tar_members(file, file.read(tarfile.BLOCKSIZE), check_headers=True):
                archive = Archive(f"{outer.name}/{name}", outer.path, file.tell(), size)
                reason = reason_in_name(name)
                if reason:
                    no_corpus.append((reason, archive.name))
                elif archive.is_xz:
                    archives.append(archive)
                else:
                    read_itself = True
                file.seek(min(size, outer.size), os.SEEK_CUR)  # what a damaged tar calls a size may be too much to seek
        except Damaged:
            read_itself = True  # reading it comes upon the damage and reports it like that of any other archive
    if read_itself or not archives:
        return [outer, *archives]
    for reason, name in no_corpus:
        passed_over[reason].append(name)
    return archives


def take_sample(archives: list[Archive], rate: float, seed: int) -> list[Archive]:
    """Return a reproducible share of the archives, in their order; a higher rate adds to what a lower one takes."""
    generator = random.Random(seed)
    # Every archive draws a rank, whatever the rate: that is why a higher rate keeps what a lower one took.
    ranks = [generator.random() for _ in archives]
    count = max(1, round(rate * len(archives)))
    last = sorted(ranks)[count - 1]
    return [archive for archive, rank in zip(archives, ranks) if rank <= last]


# Reading one archive -------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What came out of one archive, or of all archives in one of the two texts."""

    documents: int = 0
    characters: int = 0
    size: int = 0  # bytes of text
    replaced: int = 0  # invalid byte sequences that became U+FFFD
    control: int = 0  # control characters where any were looked for, see `clean`
    sample: bytes = b""  # the first of the text that is not UTF-8
    characters_seen: Counter[str] = field(default_factory=Counter)  # how often, or at least -min_count
    rare: Counter[str] = field(default_factory=Counter)  # those seen less often, which became U+FFFD
    left_out: Counter[str] = field(default_factory=Counter)  # members of tars that are no text, by kind
    examples: dict[str, str] = field(default_factory=dict)  # the name of one member of each kind
    doubtful: list[str] = field(default_factory=list)  # what to say about archives with many invalid sequences
    damage: str = ""

    def add(self, other: "Counts") -> None:
        self.documents += other.documents
        self.characters += other.characters
        self.size += other.size
        self.replaced += other.replaced
        self.characters_seen.update(other.characters_seen)
        self.left_out.update(other.left_out)
        self.examples = other.examples | self.examples  # the first of each kind stays
        self.doubtful += other.doubtful

    def add_piece(self, piece: bytes, characters: int, replaced: int, control: int) -> None:
        """Add what `clean` has found in a piece."""
        self.characters += characters
        if replaced or control:
            self.replaced += replaced
            self.control += control
            self.sample = self.sample or take_strange(piece)

    def leave_out(self, kind: str, name: str) -> None:
        self.left_out[kind] += 1
        self.examples.setdefault(kind, name)


class Window(io.RawIOBase):
    """The next `size` bytes of a file, read in place: an archive in an outer tar, or a document in a tar."""

    def __init__(self, file, size: int):
        self.file, self.left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(memoryview(buffer)[: self.left])
        self.left -= count
        if count == 0 and self.left:
            raise Damaged("it is cut short")
        return count


class Unxz(io.RawIOBase):
    """The unpacked bytes of an `.xz` file: lzma.LZMAFile, but with a limit to the memory that a file can ask for."""

    def __init__(self, file: Window):
        self.file = file
        self.start_stream()

    def start_stream(self) -> None:
        self.decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = b""
        while not data:
            packed = b""
            if self.decompressor.eof:
                # Another stream may follow, behind a padding of zeros.
                packed = self.decompressor.unused_data.lstrip(b"\0")
                while not packed:
                    block = self.file.read(READ_SIZE)
                    if not block:
                        return 0
                    packed = block.lstrip(b"\0")
                self.start_stream()
            elif self.decompressor.needs_input:
                packed = self.file.read(READ_SIZE)
                if not packed:
                    raise Damaged("it is cut short")
            data = self.decompressor.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def read_text(archive: Archive, counts: Counts) -> Iterator[bytes]:
    """Yield an archive's clean text in bounded pieces and count what is in it. Raises Damaged."""
    with name_file_in_errors(archive.path), open(archive.path, "rb", buffering=0) as file:
        file.seek(archive.start)
        window = Window(file, archive.size)
        stream = io.BufferedReader(Unxz(window) if archive.is_xz else window, READ_SIZE)
        try:
            head = stream.read(tarfile.BLOCKSIZE)
            # A tar may be empty, or joined to an empty one; a text may begin with as many NULs. The name decides.
            is_empty_tar = head == END_MARK and archive.name.lower().endswith((".tar", ".tar.xz"))
            if is_empty_tar or is_tar_header(head):
                yield from read_tar(archive, stream, head, counts)
            elif archive.is_tar:
                raise Damaged("it is not a tar file")
            else:
                yield from read_plain(archive, stream, head, counts)
            while stream.read(CHUNK):  # an .xz file is known to be sound only when read to its end
                pass
        except lzma.LZMAError as error:
            if "limit" in str(error):
                raise Damaged(f"it needs more than {XZ_MEMORY >> 20} MB to unpack", "unpack it with xz -d") from error
            raise Damaged(f"it is not a sound .xz file ({error})") from error


def read_plain(archive: Archive, stream: io.BufferedReader, head: bytes, counts: Counts) -> Iterator[bytes]:
    """Yield a text that begins with `head`. Raises Damaged if it turns out to be none."""
    if archive.is_xz and head == END_MARK:  # a text that begins with NULs, or a packed tar without any member
        head += stream.read(tarfile.RECORDSIZE - len(head))
        if not head.strip(b"\0") and not stream.peek(1):
            return
    require_text(find_signature(head))
    last = b"\n"
    for piece in split_safely(to_utf8(head, stream)):
        data, characters, replaced, control = clean(piece)
        counts.add_piece(piece, characters, replaced, control)
        last = data or last
        yield data
    # An encoding can be told only now: it is a question of shares.
    require_text(judge(counts.sample, counts.characters, counts.replaced, counts.control))
    counts.documents += 1
    if archive.name.lower().endswith(".txt") and not last.endswith((b"\n", b"\r")):
        counts.characters += 1
        yield b"\n"


def read_blocks(file) -> Iterator[bytes]:
    while block := file.read(CHUNK):
        yield block


def to_utf8(head: bytes, file) -> Iterator[bytes]:
    """Yield `head` and the rest of a file without a byte-order mark, decoded if the mark is that of UTF-16."""
    if not head.startswith(UTF16_MARKS):
        yield head.removeprefix(codecs.BOM_UTF8)
        yield from read_blocks(file)
        return
    decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
    for block in chain([head], read_blocks(file)):
        yield decoder.decode(block).encode("utf-8", "surrogatepass")
    if decoder.getstate()[0]:  # half a character at the end becomes a byte that is no UTF-8 either, so it is counted
        yield b"\xff"


def split_safely(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the same bytes, cut after a line or at least after a character, never between `\\r` and `\\n`."""
    rest = b""
    for block in blocks:
        rest += block
        end = rest.rfind(b"\n") + 1
        if not end:  # one endless line: keep its last character, whole or not, for the next piece
            end = last_character(rest)
        yield rest[:end]
        rest = rest[end:]
    yield rest


def last_character(data: bytes) -> int:
    """Return where the last character begins, which may lack some of its at most 4 bytes; the end if none does."""
    for place in range(len(data) - 1, max(len(data) - 5, -1), -1):
        if data[place] & 0xC0 != 0x80:  # no continuation byte
            return place
    return len(data)


def clean(piece: bytes) -> tuple[bytes, int, int, int]:
    """Return a piece of text as valid UTF-8, and the numbers of characters, invalid sequences and control characters.

    Invalid sequences become U+FFFD. Control characters are looked for only where there is reason to doubt that this is
    text at all, as that takes as long as all the rest; binary data has NULs from its beginning on.
    """
    try:
        characters = len(piece.decode())
    except UnicodeDecodeError:
        text = piece.decode(errors="replace")
        replaced = text.count(REPLACEMENT) - piece.count(REPLACEMENT.encode())
        return text.encode(), len(text), replaced, count_control(piece)
    control = count_control(piece) if b"\0" in piece[:1024] else 0
    return piece, characters, 0, control


# Tars ----------------------------------------------------------------------------------------------------------------


def is_tar_header(block: bytes) -> bool:
    """Whether a member of a tar begins with this block: told by the header's check sum, not by a name."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def read_tar(archive: Archive, stream: io.BufferedReader, header: bytes, counts: Counts) -> Iterator[bytes]:
    """Yield the documents of a tar, each without trailing newlines and followed by one blank line."""
    for name, size in tar_members(stream, header, check_headers=not archive.is_xz):
        reason = reason_in_name(name)
        lower = name.lower()
        if reason:
            counts.leave_out(reason, name)
            skip(stream, size)
        elif not lower.endswith((".xz", ".tar")):
            yield from read_member(name, stream, size, counts)
        elif archive.is_tar and lower.endswith(".xz"):
            skip(stream, size)  # an archive of its own, see archives_in_tar
        else:
            raise Damaged(f"it holds another archive, {name!r}", "unpack the outer one with tar -xf")


def tar_members(stream: io.BufferedReader, header: bytes, check_headers: bool) -> Iterator[tuple[str, int]]:
    """Yield name and size of the files in a tar, with the stream at their content: to be read or skipped.

    Goes on behind an end mark, since tars may be joined by `cat`. Headers need no check in an `.xz` file, which has
    check sums of its own. Reads only the fields that matter here, which takes 0.5 s per GB of OpenWebText where
    `tarfile` takes 4.9 s (unpacking takes 8 s).
    """
    magic = header[257:262]
    extended = {}
    ended = False
    while header:
        if END_MARK.startswith(header):  # or the padding after it
            ended = True
            header = stream.read(tarfile.BLOCKSIZE)
            continue
        if ended:
            # Another tar begins here, perhaps of another format; anything else would be lost without a word.
            if not is_tar_header(header):
                raise Damaged("what follows the end of the tar in it is no tar")
            magic = header[257:262]
            ended = False
        is_sound = len(header) == tarfile.BLOCKSIZE and header[257:262] == magic
        if not is_sound or (check_headers and not is_tar_header(header)):
            raise Damaged("the tar in it is damaged or cut short")
        # The fields' places are those of the ustar format, which all tars since 1979 share.
        kind = header[156:157]
        size = parse_size(header[124:136])
        if kind in (b"L", b"x"):  # GNU tar's and POSIX pax's way to give the next member a long name or a huge size
            record = read_exactly(stream, min(size, CHUNK))
            extended = {b"path": record} if kind == b"L" else parse_pax(record)
            skip(stream, size - len(record))
        else:
            path = header[:100]
            if header[257:263] == b"ustar\0":
                path = header[345:500].rstrip(b"\0") + b"/" + path
            if extended:
                size = int(extended.get(b"size", size))
                path = extended.get(b"path", path)
            name = path.rstrip(b"\0").decode("utf-8", "replace")
            if kind == b"S" or b"GNU.sparse" in extended:  # its content is a map and pieces
                raise Damaged(f"it holds a sparse file, {name!r}", "unpack it with tar -xf")
            extended = {}
            if kind in b"123456":  # links, devices and folders have no content, whatever size they name
                size = 0
            elif kind in (b"0", b"\0", b"7") and not name.endswith("/"):
                yield name, size
            else:
                skip(stream, size)
        padding = -size % tarfile.BLOCKSIZE
        block = stream.read(padding + tarfile.BLOCKSIZE)  # both at once, as calls cost more than bytes
        if len(block) < padding:
            raise Damaged("the tar in it is cut short")
        header = block[padding:]
    if check_headers and not ended:  # an .xz file has other means to know that it is whole
        raise Damaged("it is cut short")


def parse_size(field: bytes) -> int:
    """Return a member's size from octal digits, or from 8 GB on GNU tar's binary number."""
    try:
        size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        size = -1
    if size < 0:
        raise Damaged("the tar in it is damaged")
    return size


def parse_pax(record: bytes) -> dict[bytes, bytes]:
    """Return the fields of a pax header that matter here: path, size, and anything of GNU.sparse."""
    fields = dict(re.findall(rb"^\d+ (path|size|GNU\.sparse)(?:\.\w+)?=(.*)$", record, re.MULTILINE))
    if not re.fullmatch(rb"\d{1,20}", fields.get(b"size", b"0")):
        raise Damaged("the tar in it is damaged")
    return fields


def read_member(name: str, stream: io.BufferedReader, size: int, counts: Counts) -> Iterator[bytes]:
    """Yield a document of a tar in pieces, or nothing if it is empty or no text.

    That is judged by its first piece: when the next one is read, the first has been written.
    """
    head = read_exactly(stream, min(size, CHUNK))
    not_text = find_signature(head)
    if not_text:
        counts.leave_out(not_text.kind, name)
        skip(stream, size - len(head))
        return
    pieces = [head.removeprefix(codecs.BOM_UTF8)]
    if size > CHUNK or head.startswith(UTF16_MARKS):
        pieces = split_safely(to_utf8(head, Window(stream, size - len(head))))
    is_empty = True
    ends = b""  # line ends that only the next piece shows to be trailing or not
    for piece in pieces:
        piece = ends + piece
        text = piece.rstrip(b"\r\n")
        ends = piece[len(text) :][:CHUNK]  # no more, so that a file of nothing else can't fill the memory
        if not text:
            continue
        data, characters, replaced, control = clean(text)
        if is_empty:
            not_text = judge(text, characters, replaced, control)
        if not_text:
            counts.leave_out(not_text.kind, name)
            for _ in pieces:  # the next member begins after the rest of this one
                pass
            return
        counts.add_piece(text, characters, replaced, control)
        is_empty = False
        yield data
    if not is_empty:
        counts.documents += 1
        counts.characters += 2
        yield b"\n\n"


def read_exactly(stream: io.BufferedReader, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise Damaged("the tar in it is cut short")
    return data


def skip(stream: io.BufferedReader, size: int) -> None:
    while size > 0:
        size -= len(read_exactly(stream, min(size, CHUNK)))


# Telling text from other data ----------------------------------------------------------------------------------------


class NotText(NamedTuple):
    kind: str
    remedy: str


NO_USE = "take it out of the folder"
# How files of other kinds begin. Where a beginning is made of letters, so that a text may begin with it, more is asked.
SIGNATURES = [
    (rb"\x1f\x8b\x08", "gzip", "unpack it with gunzip"),
    (rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", "bzip2", "unpack it with bunzip2"),
    (rb"\x28\xb5\x2f\xfd", "zstd", "unpack it with zstd -d"),
    (rb"\xfd7zXZ\0", "xz", "unpack it with xz -d"),
    (rb"\x04\x22\x4d\x18", "lz4", "unpack it with lz4 -d"),
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "zip or Office (.docx)", f"unpack it with unzip, or {ELSEWHERE}"),
    (rb"7z\xbc\xaf\x27\x1c", "7z", "unpack it with 7z x"),
    (rb"Rar!\x1a\x07", "rar", "unpack it with unrar x"),
    (rb".{257}ustar", "tar", "unpack it with tar -xf"),
    (rb"PAR1[\0-\x08\x0e-\x1f]", "parquet", ELSEWHERE),
    (rb"ARROW1\0\0", "Arrow", ELSEWHERE),
    (rb"SQLite format 3\0", "SQLite", ELSEWHERE),
    (rb"%PDF-\d\.\d", "PDF", ELSEWHERE),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Office (.doc)", ELSEWHERE),
    (rb"\x89PNG\r\n\x1a\n", "PNG", NO_USE),
    (rb"\xff\xd8\xff", "JPEG", NO_USE),
    (rb"GIF8[79]a.[\0-\x1f].[\0-\x1f]", "GIF", NO_USE),
    (rb"RIFF.{4}(?:WAVE|WEBP|AVI )", "RIFF (.wav, .webp, .avi)", NO_USE),
    (rb"OggS\0", "Ogg", NO_USE),
    (rb"ID3[\x02-\x04]\0|\xff[\xf2\xf3\xfa\xfb]", "MP3", NO_USE),
    (rb"\0\0\0.ftyp", "MP4", NO_USE),
    (rb"\x7fELF", "Linux program", NO_USE),
    (rb"MZ...\0", "Windows program", NO_USE),
]
# One pattern for all of them: it takes 0.3 microseconds per document, of the 50 that unpacking and cleaning take.
ANY_SIGNATURE = re.compile(b"|".join(pattern for pattern, _, _ in SIGNATURES), re.DOTALL)

SAMPLE = 64 << 10  # bytes by which an encoding is guessed
# Encodings, and the commonest characters of what is written in them.
SEVERAL_BYTES = {
    "GBK": "的一是不了在人有我他",
    "BIG5": "的一是不了在人有我他",
    "EUC-KR": "이다는의에을가고하지",
    "SHIFT_JIS": "のにはをたがでてとし",
    "EUC-JP": "のにはをたがでてとし",
}
CYRILLIC = {"WINDOWS-1251": "оеаинтсрвл", "KOI8-R": "оеаинтсрвл"}
WESTERN = {"WINDOWS-1252": "éèêàáâçíóúñäöüßåæø’“”–"}

# Text may hold strange characters: byte sequences that are not UTF-8, control characters, runs of NULs. A run counts
# once, since texts may be padded with any number of NULs, whereas binary data has short runs of them everywhere. Data
# is no text if a fifth of its characters are strange: GBK read as UTF-8 has 69 %, French in Windows-1252 4 %.
STRANGE_SHARE = 0.2
STRANGE_COUNT = 8  # fewer are no evidence
DOUBTFUL_SHARE = 0.01  # an archive with more invalid sequences than this is named in the summary
TEXT_BYTES = bytes({*range(32, 256), *b"\a\b\t\n\v\f\r\x1b"})  # all but the control characters that text lacks


def find_signature(head: bytes) -> NotText | None:
    """Return what kind of file begins like this, or None if it may be text."""
    if ANY_SIGNATURE.match(head):
        for pattern, kind, remedy in SIGNATURES:
            if re.match(pattern, head, re.DOTALL):
                return NotText(f"{kind} data", remedy)
    return None


def count_control(data: bytes) -> int:
    """Return the number of control characters that text lacks; a run of NULs counts once."""
    if b"\0" in data:
        data = re.sub(rb"\0+", b"\0", data)
    return len(data.translate(None, TEXT_BYTES))


def take_strange(text: bytes) -> bytes:
    """Return the beginning of a text, or of its first line that is not UTF-8, to guess its encoding by."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        start = text.rfind(b"\n", 0, error.start) + 1
        text = text[start - start % 2 :]  # an even place, where the characters of UTF-16 begin
    return text[:SAMPLE]


def judge(text: bytes, characters: int, replaced: int, control: int) -> NotText | None:
    """Return what data is that has so much that is strange among its characters, or None if it is text."""
    strange = replaced + control
    if strange < max(STRANGE_COUNT, STRANGE_SHARE * characters):
        return None
    encoding = guess_encoding(take_strange(text), SEVERAL_BYTES | CYRILLIC)  # Western text is mostly ASCII
    if encoding:
        return NotText(f"text in another encoding (perhaps {encoding})", convert_from(encoding))
    if control > strange / 10:
        return NotText("binary data", NO_USE)
    return NotText("text in an unknown encoding", convert_from("ENCODING"))


def require_text(not_text: NotText | None) -> None:
    if not_text:
        raise Damaged(f"it holds {not_text.kind}, not UTF-8 text", not_text.remedy)


def convert_from(encoding: str) -> str:
    return f"convert it with iconv -f {encoding} -t UTF-8"


def guess_encoding(sample: bytes, encodings: dict[str, str]) -> str:
    """Return the encoding in which a sample of text makes most sense, or "" if it makes none."""
    # In UTF-16, every other byte of most texts is a NUL.
    for encoding, nuls in (("UTF-16LE", sample[1::2]), ("UTF-16BE", sample[::2])):
        if nuls.count(0) > 0.4 * len(nuls) and sample.count(0) < 1.1 * nuls.count(0):
            return encoding
    shares = {}
    for encoding, common in encodings.items():
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(sample)  # the last character may be cut
        except UnicodeDecodeError:
            continue
        foreign = [character for character in text if character > "\x7f"]
        shares[encoding] = sum(character in common for character in foreign) / max(1, len(foreign))
    # Text in an encoding of several bytes per character hardly ever follows the rules of another. Those of one byte
    # have no rules and need better evidence.
    candidates = [encoding for encoding in shares if encoding in SEVERAL_BYTES]
    if not candidates:
        candidates = [encoding for encoding in shares if shares[encoding] > 0.45]
    return max(candidates, key=shares.get, default="")


# Extracting one archive, in worker processes -------------------------------------------------------------------------


def start_worker() -> None:
    """Let the parent decide what to do about Ctrl-C and a closed terminal, which reach every process."""
    for number in {*ALL_SIGNALS} - {signal.SIGTERM}:  # by which a user may end a worker
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)  # the parent held them while it started this process
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


ascii_counts = np.zeros(128, dtype=np.int64)  # how often this process has seen each character


def extract_archive(archive: Archive, part: Path, min_count: int) -> Counts:
    """Write an archive's clean text to a file of its own; return what is in it, or what is wrong with it."""
    counts = Counts()
    try:
        with name_file_in_errors(part), open(part, "wb") as file:
            file.writelines(read_clean(archive, counts, min_count, ascii_counts))
    except Damaged as damage:
        return Counts(damage=str(damage))
    if counts.replaced > DOUBTFUL_SHARE * counts.characters:
        encoding = guess_encoding(counts.sample, CYRILLIC | WESTERN)
        reason = f"perhaps {encoding}; {convert_from(encoding)}" if encoding else "it may be damaged"
        share = counts.replaced / counts.characters
        counts.doubtful = [f"{archive.name}: {share:.1%} of its characters replaced, as not UTF-8 ({reason})"]
    return counts


def read_clean(archive: Archive, counts: Counts, enough: int = 1, earlier: np.ndarray | None = None) -> Iterator[bytes]:
    """Yield an archive's clean text, with `\\n` line ends, in chunks, and count what is in it. Raises Damaged.

    An ASCII character is counted only up to `enough` per process, then skipped: counting all costs 7 s per GB, this
    0.4 s. `earlier` holds how often earlier archives had each.
    """
    if earlier is None:
        earlier = np.zeros(128, dtype=np.int64)
    known = earlier.copy()
    for data in join_pieces(read_text(archive, counts)):
        if b"\r" in data:
            before = len(data)
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            counts.characters -= before - len(data)
        counts.size += len(data)
        # Deleting what is known well enough leaves little to decode: text is mostly made of a hundred characters.
        frequent = bytes(np.flatnonzero(known >= enough).tolist())
        utf_32 = data.translate(None, frequent).decode().encode("utf-32-le")
        found = np.bincount(np.frombuffer(utf_32, dtype="<u4"), minlength=128)  # by code point
        known += found[:128]
        codes = np.flatnonzero(found)
        characters = map(chr, codes.tolist())
        counts.characters_seen.update(dict(zip(characters, found[codes].tolist())))
        yield data
    earlier[:] = known  # only now: what a damaged archive holds is not counted


def join_pieces(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join pieces of text until they are worth a call of numpy."""
    waiting = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= CHUNK:
            yield b"".join(waiting)
            waiting = []
            size = 0
    yield b"".join(waiting)


# The whole corpus ----------------------------------------------------------------------------------------------------


class Progress:
    """Show how far a long job is: a bar on a terminal; elsewhere, as in a log file, a line a minute."""

    def __init__(self, doing: str, total: int, **bar_options):
        self.doing, self.total, self.done = doing, total, 0
        self.bar = tqdm(total=total, desc=doing, dynamic_ncols=True, disable=None, **bar_options)
        self.next_line = time.monotonic() + STATUS_SECONDS

    def update(self, amount: int, note: str) -> None:
        self.done += amount
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(amount)
        if self.bar.disable and time.monotonic() >= self.next_line:
            notify(f"{self.doing}: {self.done / self.total:.0%}, {note}")
            self.next_line = time.monotonic() + STATUS_SECONDS


def extract(
    archives: list[Archive],
    output_dir: Path,
    skip_corrupt: bool = False,
    min_count: int = 1,
    workers: int | None = None,
) -> tuple[Counts, Counts, list[str]]:
    """Write the three files into `output_dir`, all or none; return what is in each text and what was left out.

    The first `int(0.9 * n)` archives, at least one, are training text and the rest validation text; a single archive is
    cut after `int(0.9 * characters)`. Archives left out (`skip_corrupt`) are named with their damage. Raises DataError,
    and OSError when a file can't be read or written.
    """
    train, val = Counts(), Counts()
    left_out = []
    first_val = count_training(archives)
    with replace_together([output_dir / name for name in OUTPUT_NAMES]) as (temporary, parts):
        train_path, val_path, vocab_path = temporary
        progress = Progress("extracting", len(archives), unit=" archives")
        with progress.bar:
            for index, counts in enumerate(extract_all(archives, parts, workers, min_count)):
                part = parts / str(index)
                name = archives[index].name
                if counts.damage and not skip_corrupt:
                    raise DataError(f"{name}: {counts.damage}, or leave it out with -skip_corrupt")
                if counts.damage:
                    part.unlink()  # what came before the damage
                    left_out.append(f"{name}: {counts.damage}")
                elif index < first_val:
                    append(part, train_path)
                    train.add(counts)
                else:
                    append(part, val_path)
                    val.add(counts)
                progress.update(1, f"{(train.size + val.size) / 1e6:,.1f} MB of text")
        # One archive can't be shared out whole, so its text is cut.
        if len(archives) == 1 and not left_out:
            cut_off_validation(train_path, val_path, train, val)
        if not train.characters or not val.characters:
            problem = "too little text: training and validation both need some; add more"
            raise DataError("; ".join([problem, *left_out, *describe_left_out(train, val)]))
        seen = train.characters_seen + val.characters_seen
        frequent = find_frequent(seen, min_count)
        if seen.keys() - frequent:
            replace_rare(frequent, train_path, train, parts)
            replace_rare(frequent, val_path, val, parts)
        vocabulary = sorted(train.characters_seen | val.characters_seen)
        with name_file_in_errors(vocab_path), open_text(vocab_path, "w") as file:
            file.writelines(f"{character}\n" for character in vocabulary)
    return train, val, left_out


def count_training(archives: list[Archive]) -> int:
    return max(1, int(TRAIN_SHARE * len(archives)))


def append(part: Path, path: Path) -> None:
    """Append `part` to `path`, or move it there if `path` does not exist."""
    if not path.exists():
        shutil.move(part, path)  # `path` may be on another disk
        return
    with name_file_in_errors(path), open(part, "rb") as text, open(path, "ab") as file:
        shutil.copyfileobj(text, file, CHUNK)
    part.unlink()


def extract_all(archives: list[Archive], parts: Path, workers: int | None, min_count: int) -> Iterator[Counts]:
    """Yield what came out of each archive, in order, while worker processes write their texts to files in `parts`."""
    # Processes are spawned, not forked: that is the same on every system, and safe beside threads.
    workers = min(workers or available_cores(), len(archives), 61)  # Windows can't wait for more than 61 processes
    with starting_processes():
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    with pool:
        try:
            waiting = deque()
            for index, archive in enumerate(archives):
                with starting_processes():
                    waiting.append(pool.submit(extract_archive, archive, parts / str(index), min_count))
                # Finished texts wait on the disk for their turn; without a limit they could fill it.
                if len(waiting) == AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker process was killed, perhaps for want of memory; run again") from None
        finally:
            for process in multiprocessing.active_children():  # on an error or Ctrl-C, don't wait for their archives
                process.kill()


@contextmanager
def starting_processes() -> Iterator[None]:
    """Let signals wait until the block is done: a process that is just starting would not end quietly.

    Raises DataError if the system has no means for more processes, which Python's errors don't say.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    try:
        yield
    except OSError as error:
        needs = "they need a writable /dev/shm and some open files (ulimit -n)"
        raise DataError(f"worker processes can't be started: {error.strerror}; {needs}") from error
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux, where a container may have fewer cores than the machine
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def replace_together(outputs: list[Path]) -> Iterator[tuple[list[Path], Path]]:
    """Give temporary paths to write to, which replace `outputs` if the block succeeds, and a folder for the meantime.

    An output that is a link stays one: what it leads to, perhaps on a bigger disk, is replaced.
    """
    finals = [Path(os.path.realpath(path)) for path in outputs]
    temporary = [path.with_name(path.name + ".tmp") for path in finals]
    parts = finals[0].with_name("output_parts.tmp")
    for path in [*outputs, *temporary]:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no ordinary file"
            raise DataError(f"{path}: is {kind} where the output belongs; move it away or name another -output_dir")

    def clean_up() -> None:
        shutil.rmtree(parts, ignore_errors=True)
        for path in temporary:
            path.unlink(missing_ok=True)

    try:
        clean_up()  # what a killed run has left
        parts.mkdir()
        yield temporary, parts
        # What is renamed must be on the disk first, or a power cut could leave an empty file under the right name.
        for path in temporary:
            with name_file_in_errors(path), open(path, "r+b") as file:
                os.fsync(file.fileno())
        for path, final in zip(temporary, finals):
            os.replace(path, final)
    finally:
        clean_up()


def cut_off_validation(train_path: Path, val_path: Path, train: Counts, val: Counts) -> None:
    """Move the end of the training text, from character `int(0.9 * characters)` on, to the validation text."""
    keep = int(TRAIN_SHARE * train.characters)
    left = keep
    size = 0
    with name_file_in_errors(val_path), open_text(train_path) as old, open_text(val_path, "w") as new:
        while piece := old.read(min(left, CHUNK)):  # nothing is read when nothing is left
            left -= len(piece)
            size += len(piece.encode())
        shutil.copyfileobj(old, new, CHUNK)  # the rest
    os.truncate(train_path, size)
    val.characters, val.size = train.characters - keep, train.size - size
    train.characters, train.size = keep, size


def open_text(path: Path, mode: str = "r") -> TextIO:
    return open(path, mode, encoding="utf-8", newline="")  # as it is: line ends are not translated


def find_frequent(seen: Counter[str], min_count: int) -> set[str]:
    """Return the characters seen at least `min_count` times. Raises DataError if there are none."""
    frequent = {character for character, count in seen.items() if count >= min_count}
    if not frequent - {REPLACEMENT}:
        raise DataError(f"no character is seen {min_count:,} times; lower -min_count or add more text")
    return frequent | {REPLACEMENT}  # which is never rare, since it is what rare characters become


def replace_rare(frequent: set[str], path: Path, counts: Counts, parts: Path) -> None:
    """Put U+FFFD in the place of all but the frequent characters of a text, which is written anew in `parts`."""
    # The pattern names the frequent ones, sorted, since `re` finds them at once. If it named the rare ones, each
    # character would be compared with all rare emojis, one by one: 30 times the time on 100 MB.
    pattern = re.compile(f"[^{re.escape(''.join(sorted(frequent)))}]")
    # Not in place: U+FFFD has three bytes, what it replaces one to four.
    new_path = parts / path.name
    progress = Progress("replacing", counts.characters, unit=" characters", unit_scale=True)
    with progress.bar, name_file_in_errors(path), open_text(path) as old, open_text(new_path, "w") as new:
        while piece := old.read(READ_SIZE):
            new.write(pattern.sub(REPLACEMENT, piece))
            progress.update(len(piece), f"in {path.name.removesuffix('.tmp')}")
    path.unlink()
    shutil.move(new_path, path)  # `path` may be on another disk
    counts.size = path.stat().st_size
    for character in counts.characters_seen.keys() - frequent:
        counts.rare[character] = counts.characters_seen.pop(character)
    counts.characters_seen[REPLACEMENT] += counts.rare.total()


# The built-in sample -------------------------------------------------------------------------------------------------


def write_sample(folder: Path) -> None:
    """Pack the Python language reference, which every CPython carries for `help()`, into a tar of plain ASCII texts."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python lacks pydoc_data, the built-in sample; name a folder with -data_dir") from None
    path = folder / "python_reference.tar"
    with name_file_in_errors(path), tarfile.open(path, "w") as tar:
        for name in sorted(topics):
            content = to_ascii(topics[name]).encode()
            member = tarfile.TarInfo(f"{name}.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def to_ascii(text: str) -> str:
    """Replace typographic characters by their nearest ASCII (quotes, dashes, ellipses, accents) and drop the rest."""
    text = text.translate(str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212", "''\"\"------"))
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


# The command ---------------------------------------------------------------------------------------------------------


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        description="Turn archives of text into output_train.txt, output_val.txt and vocab.txt.",
    )
    parser.add_argument("-help", action="help", help=argparse.SUPPRESS)  # else argparse takes it for -h and "elp"

    def flag(name: str, metavar: str, help: str, **options) -> None:
        parser.add_argument(name, metavar=metavar, help=f"{help} (default: %(default)s)", **options)

    source = f"where the .tar, .xz and .txt files are (default: {DEFAULT_DATA_DIR} if it is there, else a sample)"
    parser.add_argument("-data_dir", metavar="FOLDER", type=Path, help=source)
    flag("-output_dir", "FOLDER", "where to write the three files", type=Path, default=Path("."))
    parser.add_argument("-skip_corrupt", action="store_true", help="leave damaged archives out instead of stopping")
    flag("-sample_rate", "SHARE", "share of the archives to use, above 0 and up to 1", type=float, default=1.0)
    flag("-min_count", "N", "characters seen fewer times than this become U+FFFD", type=int, default=1)
    flag("-seed", "N", "decides which archives -sample_rate takes", type=int, default=1337)
    args = parser.parse_args([re.sub(r"^--(?=\w)", "-", argument) for argument in arguments])  # --seed is -seed
    if not 0 < args.sample_rate <= 1:
        parser.error(f"argument -sample_rate: {args.sample_rate} is not above 0 and at most 1")
    if args.min_count < 1:
        parser.error(f"argument -min_count: {args.min_count} is not 1 or more")
    return args


def run(args: argparse.Namespace) -> None:
    data_dir = args.data_dir or Path(DEFAULT_DATA_DIR)
    if args.data_dir or data_dir.is_dir():
        extract_folder(data_dir, args)
        return
    notify(f"no {DEFAULT_DATA_DIR} folder here: using the built-in sample, the Python reference")
    with name_file_in_errors("a temporary folder for the sample"):
        folder = tempfile.TemporaryDirectory()
    with folder as name:
        write_sample(Path(name))
        extract_folder(Path(name), args)


def extract_folder(data_dir: Path, args: argparse.Namespace) -> None:
    started = time.perf_counter()
    archives, passed_over = find_archives(data_dir)
    for line in describe_passed_over(passed_over):
        notify(line)
    archives = take_sample(archives, args.sample_rate, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train, val, left_out = extract(archives, args.output_dir, args.skip_corrupt, args.min_count)
    lines = summarize(archives, train, val, left_out, args.min_count)
    names = ", ".join(str(args.output_dir / name) for name in OUTPUT_NAMES)
    lines.append(f"wrote {names} in {time.perf_counter() - started:.1f} s")
    with name_file_in_errors("standard output"):
        print("\n".join(lines), flush=True)


def summarize(archives: list[Archive], train: Counts, val: Counts, left_out: list[str], min_count: int) -> list[str]:
    """Return the lines that say what is in the two texts and what is not."""
    lines = [f"{'':10} {'documents':>12} {'characters':>16} {'megabytes':>12}"]
    for name, counts in (("training", train), ("validation", val)):
        documents = f"{counts.documents:,}" if len(archives) > 1 else f"of {train.documents:,}"
        lines.append(f"{name:10} {documents:>12} {counts.characters:16,} {counts.size / 1e6:12,.2f}")
    vocabulary_size = len(train.characters_seen | val.characters_seen)
    replaced = train.replaced + val.replaced
    lines.append(f"vocabulary: {vocabulary_size:,} characters; invalid sequences replaced by U+FFFD: {replaced:,}")
    rare = train.rare + val.rare
    if rare:
        times = f"{rare.total():,} ({len(rare):,} different)"
        lines.append(f"characters seen fewer than {min_count:,} times replaced by U+FFFD: {times}")
    doubtful = train.doubtful + val.doubtful
    lines += doubtful[:FEW]
    if len(doubtful) > FEW:
        lines.append(f"and more than {DOUBTFUL_SHARE:.0%} in {len(doubtful) - FEW:,} more archives")
    lines += describe_left_out(train, val)
    lines += [f"left out: {line}" for line in left_out]
    if 1 < len(archives) <= FEW:
        first_val = count_training(archives)
        lines.append(f"training text is from {', '.join(archive.name for archive in archives[:first_val])}")
        lines.append(f"validation text is from {', '.join(archive.name for archive in archives[first_val:])}")
    return lines


def describe_left_out(train: Counts, val: Counts) -> list[str]:
    """Return a line for each kind of tars' members that are no corpus."""
    examples = val.examples | train.examples
    return [
        f"members of tars left out ({kind}): {count:,}, such as {one_line(examples[kind])}"
        for kind, count in (train.left_out + val.left_out).most_common()
    ]


def main() -> int:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the program was started with `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    args = parse_args(sys.argv[1:])
    if hasattr(sys.stdout, "reconfigure"):  # those of IDLE and Jupyter can't
        sys.stdout.reconfigure(errors="backslashreplace")  # names of archives need not be valid in any encoding
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    tqdm.monitor_interval = 0  # no thread of its own, which could receive a signal that is held
    try:
        run(args)
        return 0
    except DataError as error:
        message = str(error)
    except OSError as error:
        path = error.filename2 or error.filename
        if not path:
            raise  # where it comes from is not known, so better a traceback than a wrong reason
        message = f"{path}: {error.strerror}"
        if path == "standard output":
            sys.stdout = None  # or Python would try to write to it once more
    except KeyboardInterrupt:
        notify("data_extract.py: interrupted; nothing was changed")
        return 128 + signal.SIGINT
    notify(f"data_extract.py: {message}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
