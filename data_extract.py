"""Turn archives of text into `output_train.txt`, `output_val.txt` and `vocab.txt`.

    archives (.tar, .xz, .txt)  ->  documents  ->  clean UTF-8 text  ->  two files and the characters in them

OpenWebText's `.xz` files are tars of documents inside; reading them as text would train a model on tar headers. Here
every archive is opened by what it contains. Worker processes unpack archives side by side, each into a file of its own
that is then appended to the output, so that neither memory nor temporary files grow with the corpus.
"""

import argparse
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
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

DEFAULT_DATA_DIR = "openwebtext"
OUTPUT_NAMES = ("output_train.txt", "output_val.txt", "vocab.txt")
TRAIN, VAL, VOCAB = range(3)
TRAIN_SHARE = 0.9

READ_SIZE = 256 << 10  # bytes unpacked at once, few enough to stay in a core's cache
CHUNK = 4 << 20  # bytes of text cleaned at once
AHEAD = 4  # archives per worker that may be unpacked before it is their turn to be written
XZ_MEMORY = 128 << 20  # `xz -9` needs 65 MB to unpack; a file that asks for more than this is refused
REPLACEMENT = "\ufffd"


class DataError(Exception):
    """The data can't be used as it is; the message says which file, why, and what to do."""


class Damaged(Exception):
    """An archive is cut short, corrupt, or not what its name says."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name the file that the block reads or writes; Python's own do so only for its opening."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or path) from error


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


def find_archives(data_dir: Path, ignore: set[str]) -> list[Archive]:
    """All archives below `data_dir` but the files in `ignore`, sorted by their own file name, then by path.

    The `.xz` members of a `.tar` are archives of their own, so a corpus comes out in the same order whether its outer
    tars are unpacked or not. Raises DataError if there is nothing to read.
    """

    def fail(error: OSError):
        raise error

    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; name the folder that holds your archives with -data_dir")
    archives = []
    for folder, subfolders, files in os.walk(data_dir, onerror=fail):
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        for path in (Path(folder, name) for name in files if not is_hidden(name)):
            if path.suffix.lower() not in {".tar", ".xz", ".txt"} or os.path.realpath(path) in ignore:
                continue
            status = path.stat()
            if stat.S_ISREG(status.st_mode):  # not a pipe or a device, which may never end
                archive = Archive(path.relative_to(data_dir).as_posix(), path, 0, status.st_size)
                archives += archives_in_tar(archive) if archive.is_tar else [archive]
    if not archives:
        raise DataError(f"{data_dir}: holds no .tar, .xz or .txt file; put your archives or texts there")
    return sorted(archives, key=lambda archive: (archive.name.rpartition("/")[2], archive.name))


def is_hidden(name: str) -> bool:
    """Whether a path has a dotfile in it: editors and macOS (`._name`) leave such files beside the text."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def archives_in_tar(outer: Archive) -> list[Archive]:
    """The `.xz` members of a tar, and the tar itself if it holds documents too or is damaged."""
    archives, read_itself = [], False
    with naming(outer.path), open(outer.path, "rb") as file:
        try:
            for name, size in tar_members(file, file.read(tarfile.BLOCKSIZE), is_outer=True):
                archive = Archive(f"{outer.name}/{name}", outer.path, file.tell(), size)
                if archive.is_xz:
                    archives.append(archive)
                else:
                    read_itself = True
                file.seek(min(size, outer.size), os.SEEK_CUR)
        except Damaged:
            read_itself = True  # reading it comes upon the damage and reports it like that of any other archive
    return archives if archives and not read_itself else [outer, *archives]


def take_sample(archives: list[Archive], rate: float, seed: int) -> list[Archive]:
    """A reproducible share of the archives, in their order; a higher rate only adds to what a lower one takes."""
    generator = random.Random(seed)
    ranks = [generator.random() for _ in archives]
    chosen = sorted(range(len(archives)), key=ranks.__getitem__)[: max(1, round(rate * len(archives)))]
    return [archives[i] for i in sorted(chosen)]


# Reading one archive -------------------------------------------------------------------------------------------------


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
        self.decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = b""
        while not data:
            packed = self.decompressor.unused_data
            if self.decompressor.eof:  # an .xz file may hold several streams in a row, padded with zeros
                while not (packed := packed.lstrip(b"\0")):
                    if not (packed := self.file.read(1 << 16)):
                        return 0
                self.decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
            elif self.decompressor.needs_input and not (packed := self.file.read(1 << 16)):
                raise Damaged("it is cut short")
            data = self.decompressor.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def read_documents(archive: Archive) -> Iterator[tuple[bytes, bool]]:
    """Yield an archive's text in bounded pieces, each with whether it ends a document. Raises Damaged.

    No piece ends inside a character or between `\\r` and `\\n`.
    """
    with naming(archive.path), open(archive.path, "rb", buffering=0) as file:
        file.seek(archive.start)
        window = Window(file, archive.size)
        stream = io.BufferedReader(Unxz(window) if archive.is_xz else window, READ_SIZE)
        try:
            head = stream.read(tarfile.BLOCKSIZE)
            if is_tar_header(head):
                yield from read_tar(stream, head, archive.is_tar)
            elif archive.is_tar:
                raise Damaged("it is not a tar file")
            elif head.startswith(b"\xfd7zXZ\0"):
                raise Damaged("it holds an .xz file where text belongs; unpack that with xz -d")
            elif head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) and b"\0" in head:
                raise Damaged("it is UTF-16 text; save it as UTF-8")
            else:
                yield from ((piece, False) for piece in split_safely(head.removeprefix(BOM_UTF8), stream))
                yield b"", True
            while stream.read(CHUNK):  # an .xz file is known to be sound only when read to its end
                pass
        except lzma.LZMAError as error:
            raise Damaged(f"it is not a sound .xz file ({error})") from error


def is_tar_header(block: bytes) -> bool:
    """Whether a file that begins with this block is a tar: told by the header's check sum, not by a name."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return len(block) == tarfile.BLOCKSIZE and not any(block)  # the end mark alone: a tar without members
    return True


def read_tar(stream: io.BufferedReader, header: bytes, is_outer: bool) -> Iterator[tuple[bytes, bool]]:
    """Yield the documents of a tar, each without trailing newlines and followed by one blank line."""
    for name, size in tar_members(stream, header, is_outer):
        if not name.lower().endswith((".xz", ".tar")):
            yield from read_document(stream, size)
        elif is_outer and name.lower().endswith(".xz"):
            skip(stream, size)  # an archive of its own, see archives_in_tar
        else:
            raise Damaged(f"it holds another archive, {name!r}; unpack the outer one with tar -xf")


def tar_members(stream: io.BufferedReader, header: bytes, is_outer: bool) -> Iterator[tuple[str, int]]:
    """Yield name and size of a tar's members, less dotfiles, with the stream at their content: to be read or skipped.

    Reads only the fields that matter here, which takes 0.5 s per GB of OpenWebText where `tarfile` takes 4.9 s
    (unpacking takes 8 s).
    """
    magic, extended = header[257:262], {}
    while any(header):
        if len(header) < tarfile.BLOCKSIZE or header[257:262] != magic or (is_outer and not is_tar_header(header)):
            raise Damaged("the tar in it is damaged or cut short")
        kind, size = header[156:157], parse_size(header[124:136])
        if kind in (b"L", b"x"):  # GNU tar's and POSIX pax's way to give the next member a long name or a huge size
            record = read_exactly(stream, min(size, CHUNK))
            extended = {b"path": record} if kind == b"L" else parse_pax(record)
            skip(stream, size - len(record))
        else:
            size = int(extended.get(b"size", size))
            prefix = header[345:500].rstrip(b"\0") + b"/" if header[257:263] == b"ustar\0" else b""
            name = extended.get(b"path", prefix + header[:100]).rstrip(b"\0").decode("utf-8", "replace")
            extended = {}
            if kind in b"123456":  # links, devices and folders have no content, whatever size they name
                size = 0
            if kind not in (b"0", b"\0", b"7") or name.endswith("/") or is_hidden(name):
                skip(stream, size)
            else:
                yield name, size
        skip(stream, -size % tarfile.BLOCKSIZE)
        header = stream.read(tarfile.BLOCKSIZE)
    if is_outer and not header:  # an .xz file has other means to know that it is whole
        raise Damaged("it is cut short")


def parse_size(field: bytes) -> int:
    """A member's size: octal digits, or from 8 GB on GNU tar's binary number."""
    try:
        size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        size = -1
    if size < 0:
        raise Damaged("the tar in it is damaged")
    return size


def parse_pax(record: bytes) -> dict[bytes, bytes]:
    fields = dict(re.findall(rb"^\d+ (path|size)=(.*)$", record, re.MULTILINE))
    if not re.fullmatch(rb"\d{1,20}", fields.get(b"size", b"0")):
        raise Damaged("the tar in it is damaged")
    return fields


def read_document(stream: io.BufferedReader, size: int) -> Iterator[tuple[bytes, bool]]:
    head = read_exactly(stream, min(size, CHUNK)).removeprefix(BOM_UTF8)
    if size <= CHUNK:
        if text := head.rstrip(b"\r\n"):
            yield text + b"\n\n", True
        return
    empty, held = True, b""  # line ends that only the next piece shows to be trailing or not
    for piece in split_safely(head, Window(stream, size - CHUNK)):
        text = (held + piece).rstrip(b"\r\n")
        if text:
            empty = False
            yield text, False
        held = (held + piece)[len(text) :][:CHUNK]
    if not empty:
        yield b"\n\n", True


def split_safely(head: bytes, stream: io.IOBase) -> Iterator[bytes]:
    """Yield `head` and the rest of a stream, cut after a line or at least after a character."""
    rest = head
    while block := stream.read(CHUNK):
        rest += block
        end = rest.rfind(b"\n") + 1
        if not end:  # one endless line: keep its last character, whole or not, for the next piece
            end = next((i for i in range(len(rest) - 1, len(rest) - 5, -1) if rest[i] & 0xC0 != 0x80), len(rest))
        yield rest[:end]
        rest = rest[end:]
    yield rest


def read_exactly(stream: io.BufferedReader, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise Damaged("the tar in it is cut short")
    return data


def skip(stream: io.BufferedReader, size: int) -> None:
    while size > 0:
        size -= len(read_exactly(stream, min(size, CHUNK)))


# Cleaning and writing, in worker processes ---------------------------------------------------------------------------


@dataclass
class Extracted:
    """What came out of one archive, or of all archives of a split."""

    documents: int = 0
    characters: int = 0
    size: int = 0  # bytes of text
    replaced: int = 0  # invalid byte sequences that became U+FFFD
    characters_seen: Counter[str] = field(default_factory=Counter)  # how often, or at least -min_count
    rare: Counter[str] = field(default_factory=Counter)  # those seen less often, which became U+FFFD
    damage: str = ""

    def add(self, other: "Extracted") -> None:
        self.documents += other.documents
        self.characters += other.characters
        self.size += other.size
        self.replaced += other.replaced
        self.characters_seen.update(other.characters_seen)


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


ascii_counts = np.zeros(128, dtype=np.int64)  # how often this process has seen each character


def extract_archive(archive: Archive, part: Path, min_count: int) -> Extracted:
    """Write an archive's clean text to a file of its own; runs in a worker."""
    found = Extracted()
    try:
        with naming(part), open(part, "wb") as file:
            file.writelines(read_clean(archive, found, min_count, ascii_counts))
    except Damaged as damage:
        return Extracted(damage=str(damage))
    return found


def read_clean(
    archive: Archive, found: Extracted, enough: int = 1, ascii_counts: np.ndarray | None = None
) -> Iterator[bytes]:
    """Yield an archive's text as valid UTF-8 with `\n` line ends, in chunks, and count in `found` what is in it.

    An ASCII character is counted until there are `enough` of it, those of earlier archives in `ascii_counts` included.
    """
    earlier = np.zeros(128, dtype=np.int64) if ascii_counts is None else ascii_counts
    counts = earlier.copy()  # by code point
    for data in read_chunks(archive, found):
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode(errors="replace")
            found.replaced += text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
            data = text.encode()
        found.characters += len(text)
        found.size += len(data)
        # Most characters are ASCII and soon known well enough. Deleting those takes 0.4 s per GB, counting them 7 s.
        frequent = np.flatnonzero(counts[:128] >= enough)
        more = np.bincount(code_points(data.translate(None, bytes(frequent.tolist()))), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
        yield data
    counts[:128] -= earlier
    earlier += counts[:128]
    seen = np.flatnonzero(counts)
    found.characters_seen = Counter(dict(zip(map(chr, seen.tolist()), counts[seen].tolist())))


def read_chunks(archive: Archive, found: Extracted) -> Iterator[bytes]:
    """Yield an archive's text, as it is, in pieces that are worth a call of numpy."""
    pieces, size = [], 0
    for piece, ends_document in read_documents(archive):
        pieces.append(piece)
        size += len(piece)
        found.documents += ends_document
        if size >= CHUNK:
            yield b"".join(pieces)
            pieces, size = [], 0
    yield b"".join(pieces)


def code_points(data: bytes) -> np.ndarray:
    return np.frombuffer(data.decode().encode("utf-32-le"), dtype=np.uint32)


# The whole corpus ----------------------------------------------------------------------------------------------------


def extract(
    archives: list[Archive],
    output_dir: Path,
    skip_corrupt: bool = False,
    min_count: int = 1,
    workers: int | None = None,
) -> tuple[Extracted, Extracted, list[str]]:
    """Write the three files into `output_dir`, all or none; return what is in each text and what was left out.

    The first `int(0.9 * n)` archives, at least one, are training text and the rest validation text; a single archive is
    cut after `int(0.9 * characters)`. Archives left out (`skip_corrupt`) are named with their damage. Raises DataError,
    and OSError when a file can't be read or written.
    """
    totals, left_out = (Extracted(), Extracted()), []
    first_val = max(1, int(TRAIN_SHARE * len(archives)))
    with replaced_together([output_dir / name for name in OUTPUT_NAMES]) as (outputs, parts):
        with tqdm(total=len(archives), unit=" archives", desc="extracting", dynamic_ncols=True) as bar:
            for index, found in enumerate(extract_all(archives, parts, workers, min_count)):
                part, split = parts / str(index), int(index >= first_val)
                if not found.damage:
                    append(part, outputs[split])
                elif skip_corrupt:
                    part.unlink()
                    left_out.append(f"{archives[index].name}: {found.damage}")
                else:
                    raise DataError(
                        f"{archives[index].name}: {found.damage}; replace it, or leave it out with -skip_corrupt"
                    )
                totals[split].add(found)
                bar.set_postfix_str(f"{(totals[TRAIN].size + totals[VAL].size) / 1e6:,.1f} MB of text", refresh=False)
                bar.update()
        if len(archives) == 1 and not left_out:
            cut_off_validation(outputs, totals)
        if not (totals[TRAIN].characters and totals[VAL].characters):
            raise DataError("; ".join(["too little text: training and validation both need some; add more", *left_out]))
        replace_rare(outputs, totals, min_count)
        vocabulary = totals[TRAIN].characters_seen | totals[VAL].characters_seen
        with naming(outputs[VOCAB]), open(outputs[VOCAB], "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{character}\n" for character in sorted(vocabulary))
    return *totals, left_out


def append(part: Path, path: Path) -> None:
    """Let a part end the output at `path`, or be it, if there is none yet."""
    if not path.exists():
        os.replace(part, path)
        return
    with naming(path), open(part, "rb") as text, open(path, "ab") as file:
        shutil.copyfileobj(text, file, CHUNK)
    part.unlink()


def extract_all(archives: list[Archive], parts: Path, workers: int | None, min_count: int) -> Iterator[Extracted]:
    """Yield what came out of each archive, in order, while worker processes write their texts to files in `parts`."""
    workers = min(workers or available_cores(), len(archives), 61)  # Windows can wait for no more than 61 processes
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            waiting = deque()
            for index, archive in enumerate(archives):
                with signals_held():  # or a signal might come while a process starts, which would not end quietly
                    waiting.append(pool.submit(extract_archive, archive, parts / str(index), min_count))
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
def signals_held() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block is done, and never reach a process started in it."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def replaced_together(paths: list[Path]) -> Iterator[tuple[list[Path], Path]]:
    """Give temporary paths to write to, which replace `paths` if the block succeeds, and a folder for the meantime."""
    temporary, parts = [path.with_name(path.name + ".tmp") for path in paths], paths[0].with_name("output_parts.tmp")
    for path in [*paths, *temporary]:
        if path.is_dir():
            raise DataError(f"{path}: is a folder where the output belongs; move it away or name another -output_dir")

    def clean_up() -> None:
        shutil.rmtree(parts, ignore_errors=True)
        for path in temporary:
            path.unlink(missing_ok=True)

    try:
        clean_up()  # what a killed run has left
        parts.mkdir()
        yield temporary, parts
        for path in temporary:
            with naming(path), open(path, "r+b") as file:
                os.fsync(file.fileno())
        for path, final in zip(temporary, paths):
            os.replace(path, final)
    finally:
        clean_up()


def cut_off_validation(outputs: list[Path], totals: tuple[Extracted, Extracted]) -> None:
    """Move the end of the training text, from character `int(0.9 * characters)` on, to the validation text."""
    whole = totals[TRAIN]
    keep = int(TRAIN_SHARE * whole.characters)
    with naming(outputs[VAL]), open(outputs[TRAIN], "r+b") as train, open(outputs[VAL], "wb") as val:
        offset, left = 0, keep
        for piece in split_safely(b"", train):
            kept = piece.decode()[:left]
            offset, left = offset + len(kept.encode()), left - len(kept)
            if not left:
                break
        train.seek(offset)
        shutil.copyfileobj(train, val, CHUNK)
        train.truncate(offset)
    totals[VAL].characters, totals[VAL].size = whole.characters - keep, whole.size - offset
    whole.characters, whole.size = keep, offset


def replace_rare(outputs: list[Path], totals: tuple[Extracted, Extracted], min_count: int) -> None:
    """Put U+FFFD in the place of all characters that both texts together hold fewer than `min_count` times."""
    counts = totals[TRAIN].characters_seen + totals[VAL].characters_seen
    rare = {character for character, count in counts.items() if count < min_count} - {REPLACEMENT}
    if not rare:
        return
    if not counts.keys() - rare - {REPLACEMENT}:
        raise DataError(f"no character is seen {min_count:,} times; lower -min_count or add more text")
    for path, total in zip(outputs, totals):
        rewrite(path, outputs[VOCAB], rare)  # a temporary file with nothing in it yet
        os.replace(outputs[VOCAB], path)
        seen, total.size = total.characters_seen, path.stat().st_size
        total.rare = Counter({character: seen.pop(character) for character in rare & seen.keys()})
        seen[REPLACEMENT] += total.rare.total()


def rewrite(path: Path, new: Path, rare: set[str]) -> None:
    """Copy a text with U+FFFD for its rare characters, which are looked for only where there is no frequent ASCII."""
    is_rare = np.zeros(sys.maxunicode + 1, dtype=bool)
    is_rare[[ord(character) for character in rare]] = True
    frequent = bytes(np.flatnonzero(~is_rare[:128]).tolist())
    may_start = bytes(byte >= 0xC0 or (byte < 0x80 and byte not in frequent) for byte in range(256))
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="replacing", dynamic_ncols=True)
    with bar, naming(path), open(path, "rb") as old, open(new, "wb") as file:
        for text in split_safely(b"", old):
            codes = code_points(text.translate(None, frequent))
            starts = np.flatnonzero(np.frombuffer(text.translate(may_start), dtype=bool))
            hits, end = is_rare[codes], 0
            for start, code in zip(starts[hits].tolist(), codes[hits].tolist()):
                file.write(text[end:start] + REPLACEMENT.encode())
                end = start + len(chr(code).encode())
            file.write(text[end:])
            bar.update(len(text))


# The built-in sample -------------------------------------------------------------------------------------------------


def write_sample(folder: Path) -> None:
    """Pack the Python language reference, which every CPython carries for `help()`, into a tar of plain ASCII texts."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python lacks pydoc_data, the built-in sample; name a folder with -data_dir") from None
    path = folder / "python_reference.tar"
    with naming(path), tarfile.open(path, "w") as tar:
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


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Turn archives of text into output_train.txt, output_val.txt and vocab.txt.",
    )

    def flag(name: str, **options):
        parser.add_argument(f"-{name}", f"--{name}", **options)

    source = f"folder with .tar, .xz or .txt files; without it, {DEFAULT_DATA_DIR} if it is there, else the sample"
    flag("data_dir", type=Path, help=source)
    flag("output_dir", type=Path, default=Path("."), help="folder for the three files")
    flag("skip_corrupt", action="store_true", help="leave damaged archives out instead of stopping")
    flag("sample_rate", type=float, default=1.0, help="share of the archives to use, above 0 and up to 1")
    flag("min_count", type=int, default=1, help="characters seen fewer times than this become U+FFFD; 1: none does")
    flag("seed", type=int, default=1337, help="which archives -sample_rate takes")
    args = parser.parse_args(arguments)
    if not 0 < args.sample_rate <= 1:
        parser.error(f"argument -sample_rate: {args.sample_rate} is not above 0 and at most 1")
    if args.min_count < 1:
        parser.error(f"argument -min_count: {args.min_count} is not 1 or more")
    return args


def run(args: argparse.Namespace, sample_folder: Path) -> None:
    started = time.perf_counter()
    data_dir = args.data_dir or Path(DEFAULT_DATA_DIR)
    if args.data_dir is None and not data_dir.is_dir():
        print(f"no {DEFAULT_DATA_DIR} folder here: using the built-in sample, the Python reference", file=sys.stderr)
        data_dir = sample_folder
        write_sample(sample_folder)
    archives = find_archives(data_dir, ignore={os.path.realpath(args.output_dir / name) for name in OUTPUT_NAMES})
    archives = take_sample(archives, args.sample_rate, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train, val, left_out = extract(archives, args.output_dir, args.skip_corrupt, args.min_count)

    documents = [f"{train.documents:,}", f"{val.documents:,}"] if len(archives) > 1 else [f"of {train.documents:,}"] * 2
    print(f"{'':10} {'documents':>12} {'characters':>16} {'megabytes':>12}")
    for name, count, total in zip(("training", "validation"), documents, (train, val)):
        print(f"{name:10} {count:>12} {total.characters:16,} {total.size / 1e6:12,.2f}")
    vocabulary_size = len(train.characters_seen | val.characters_seen)
    replaced = train.replaced + val.replaced
    print(f"vocabulary: {vocabulary_size:,} characters; invalid sequences replaced by U+FFFD: {replaced:,}")
    if rare := train.rare + val.rare:
        times = f"{rare.total():,} ({len(rare):,} different)"
        print(f"characters seen fewer than {args.min_count:,} times replaced by U+FFFD: {times}")
    for line in left_out:
        print(f"left out: {line}")
    names = ", ".join(str(args.output_dir / name) for name in OUTPUT_NAMES)
    print(f"wrote {names} in {time.perf_counter() - started:.1f} s", flush=True)


def main() -> int:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the program was started with `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    args = parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of archives need not be valid in any encoding
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tqdm.monitor_interval = 0  # no thread of its own, which could receive a signal that is held
    try:
        with tempfile.TemporaryDirectory() as sample_folder:
            run(args, Path(sample_folder))
    except DataError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename2 or error.filename or 'standard output'}: {error.strerror}"
        if not error.filename:
            sys.stdout = None  # or Python would try to write to it once more
    except KeyboardInterrupt:
        print("data_extract.py: interrupted; nothing was changed", file=sys.stderr)
        return 128 + signal.SIGINT
    else:
        return 0
    print("data_extract.py: " + message.replace("\n", r"\n"), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
