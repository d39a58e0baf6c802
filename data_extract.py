"""Turn archives of text into `output_train.txt`, `output_val.txt` and `vocab.txt`.

    archives (.tar, .xz, .txt)  ->  documents  ->  clean UTF-8 text  ->  two files and a vocabulary

OpenWebText's `.xz` files are tars of documents inside; reading them as text would train a model on
tar headers. So every archive is opened by what it contains, also one that lies in another, and
other data than text never becomes corpus in silence. Worker processes unpack archives side by side,
each into a file of its own that is then appended to the output, so that neither memory nor
temporary files grow with the corpus.
"""

import argparse
import codecs
import errno
import io
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

DEFAULT_DATA_DIR = "openwebtext"
OUTPUT_NAMES = ("output_train.txt", "output_val.txt", "vocab.txt")
NEVER_CORPUS = {*OUTPUT_NAMES, "train_split.txt", "val_split.txt", "requirements.txt"}
ELSEWHERE = 'see README, "Other kinds of data"'
TRAIN_SHARE = 0.9
FEW = 10  # fewer archives are too coarse to share out: their text is cut
CHUNK = 2 << 20  # bytes of text handled at once
BLOCK = 512  # bytes, of which a tar is made
PACKED = (".xz", ".tar")
ENDLESS = 1 << 60  # bytes, where the size of a tar is not known before its end
DEEPEST = 20  # levels of archives in archives; OpenWebText as one file has three
AHEAD = 4  # archives per worker whose texts may wait: without a limit they could fill the disk
REPLACEMENT = "\ufffd"
HEAD = 8000  # bytes at the beginning of a text that hold no NUL, as git and grep have it
MOST_INVALID = 0.2  # of a text's characters; Chinese in GBK has 0.69, French in Windows-1252 0.04
SHARE = "{:.0f} % of its characters are not UTF-8 (NULs included)"
DOUBTFUL = 0.01  # an archive with a larger share is named in the summary
COMMON = b"\n\t" + bytes(range(32, 127))  # most of most texts
# What the system says of a lock that another process holds. Wine, a Windows on Linux, says 0.
HELD = {errno.EACCES, 0} if os.name == "nt" else {errno.EWOULDBLOCK}
# Invalid sequences become NULs, to be counted together with those.
codecs.register_error("NUL", lambda error: ("\0", error.end))


class DataError(Exception):
    """The data can't be used as it is. The message says which file, why, and what to do."""


class Damaged(Exception):
    """An archive is damaged. The message says what is wrong with "it"."""


class NotText(Damaged):
    """A file or a member of a tar is not text."""


@contextmanager
def name_file_in_errors(path: Path | str) -> Iterator[None]:
    """Name `path` in an OSError from the block. Python's own name a file only when it is opened."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, error.strerror or str(error), error.filename or str(path)
        ) from error


def show(line: str, stream: TextIO) -> None:
    """Print a line, with control characters as `ascii` writes them: a terminal obeys them."""
    control = r"[\x00-\x08\n-\x1f\x7f-\x9f]"
    print(re.sub(control, lambda found: ascii(found[0])[1:-1], line), file=stream, flush=True)


# Finding archives ---------------------------------------------------------------------------------


class Archive(NamedTuple):
    """One unit of the corpus: `size` bytes from `start` in a file; messages call it `name`."""

    name: str
    path: Path
    start: int
    size: int
    level: int = 1  # one more than that of the tar that it lies in


def find_archives(data_dir: Path) -> tuple[list[Archive], Counter[str]]:
    """Return all archives below `data_dir`, and how many files, folders and members don't count.

    Archives are sorted by their own file name, then by path. Those in a `.tar` are archives of
    their own, so a corpus comes out in one order, whether its outer tars are unpacked or not.
    Raises DataError if none is found.
    """
    archives, passed_over = [], Counter()
    folders, seen = [data_dir], {os.path.realpath(data_dir)}
    for folder in folders:  # it grows meanwhile
        # Sorted, so that of two links to one file the same one is followed on every system.
        for path in [folder / name for name in sorted(os.listdir(folder))]:
            reason = reason_in_name(path.name) or reason_in_kind(path, seen)
            if reason:
                passed_over[reason] += 1
            elif path.is_dir():
                folders.append(path)
            else:
                name, size = path.relative_to(data_dir).as_posix(), path.stat().st_size
                archives += list_archives(Archive(name, path, 0, size), passed_over)
    if not archives:
        counts = [f"; {reason}: {count:,}" for reason, count in passed_over.items()]
        raise DataError(
            f"{data_dir}: holds no .tar, .xz or .txt file; put your archives or texts there"
            + "".join(counts)
        )
    return sorted(archives, key=lambda one: (one.name.rpartition("/")[2], one.name)), passed_over


def reason_in_name(name: str) -> str:
    """Return why a file or a member of a tar with this name is not part of the corpus, or ""."""
    parts = name.split("/")
    if any(part.startswith(".") and part not in {".", ".."} for part in parts):
        return "passed over (hidden)"
    if parts[-1].lower() in NEVER_CORPUS:
        return "passed over (an output of these scripts, or requirements.txt)"
    return ""


def reason_in_kind(path: Path, seen: set[str]) -> str:
    """Return why a file or folder isn't read, or "". Its real path joins those already `seen`."""
    is_file = path.suffix.lower() in {".tar", ".xz", ".txt"} and path.is_file()
    if not is_file and not path.is_dir():
        return f"passed over (no .tar, .xz or .txt file; {ELSEWHERE})"
    real_path = os.path.realpath(path)
    if real_path in seen:  # so links to one folder neither double the corpus nor lead in circles
        return "passed over (a link to what is read anyway)"
    seen.add(real_path)
    return ""


def list_archives(archive: Archive, passed_over: Counter[str]) -> list[Archive]:
    """Return an archive itself, or in place of a tar those in it, at any depth.

    A tar is also returned itself if there are documents or nothing in it, or if it is damaged:
    reading it comes upon the damage, and reports it like that of any other archive.
    """
    if not archive.name.lower().endswith(".tar") or archive.level > DEEPEST:
        return [archive]
    inside, is_read_itself = [], False
    with name_file_in_errors(archive.path), open(archive.path, "rb") as file:
        file.seek(archive.start)
        try:
            for name, start, size in tar_members(file, archive.size, passed_over):
                if name.lower().endswith(PACKED):
                    member = Archive(
                        f"{archive.name}/{name}", archive.path, start, size, archive.level + 1
                    )
                    inside += list_archives(member, passed_over)
                else:
                    is_read_itself = True
        except Damaged:
            is_read_itself = True
    return [archive, *inside] if is_read_itself or not inside else inside


def take_sample(archives: list[Archive], rate: float, seed: int) -> list[Archive]:
    """Return a reproducible share of the archives. A higher rate adds to what a lower one takes."""
    order = random.Random(seed).sample(range(len(archives)), len(archives))
    taken = order[: max(1, round(rate * len(archives)))]
    return [archives[i] for i in sorted(taken)]


# Reading one archive ------------------------------------------------------------------------------


def read_archive(archive: Archive, counts: Counter[str]) -> Iterator[str]:
    """Yield an archive's text in bounded pieces, and count what it holds. Raises Damaged."""
    with name_file_in_errors(archive.path), open(archive.path, "rb") as file:
        file.seek(archive.start)
        yield from read_content(
            archive.name, file, archive.size, counts, archive.level, is_archive=True
        )


def read_content(
    name: str, stream: BinaryIO, size: int, counts: Counter[str], level: int, is_archive: bool
) -> Iterator[str]:
    """Return the text of the next `size` bytes of a stream, in pieces.

    Their name and what they begin with decide how they are read. They are an archive of their own,
    or else a member of a tar, `level` archives deep. Raises NotText and Damaged.
    """
    ending = name[-4:].lower()
    if ending.endswith(".xz"):
        return read_xz(stream, size, counts, level, is_archive)
    head = stream.read(min(BLOCK, size))
    if ending == ".tar" or is_tar_header(head):
        is_listed = is_archive and ending == ".tar"
        return read_tar(stream, head, size, counts, level, is_listed)
    return read_text(read_blocks(stream, head, size), counts, is_archive)


class Window:
    """The next `size` bytes of a stream, for LZMAFile."""

    def __init__(self, stream: BinaryIO, size: int):
        self.stream, self.left = stream, size
        self.is_read = False  # up to its end, and once more to see that it is the end

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.left))
        self.left -= len(data)
        self.is_read = not data
        return data

    def seekable(self) -> bool:
        return True  # LZMAFile may move forward, which it does by reading


def read_xz(
    packed: BinaryIO, size: int, counts: Counter[str], level: int, is_archive: bool
) -> Iterator[str]:
    """Yield the text of the .xz data in the next `size` bytes: of a tar, or of one text.

    That text is a shard, to be joined to others as it is. Raises NotText and Damaged.
    """
    window = Window(packed, size)
    unpacked = lzma.LZMAFile(window, format=lzma.FORMAT_XZ)  # noqa: SIM115
    stream = io.BufferedReader(unpacked, 64 << 10)  # bytes, few enough for a core's cache
    try:
        head = stream.read(BLOCK)
        if is_tar_header(head):
            yield from read_tar(stream, head, ENDLESS, counts, level, is_listed=False)
        else:
            yield from text_pieces(read_blocks(stream, head), counts, judge_at_end=is_archive)
            counts["documents"] += 1
    except (EOFError, lzma.LZMAError) as error:
        raise Damaged(f"it is not a sound .xz file ({error})") from None
    if not window.is_read:  # LZMAFile stops in silence where no further .xz data follows
        raise Damaged("something else follows the .xz data in it")


def read_tar(
    stream: BinaryIO, head: bytes, size: int, counts: Counter[str], level: int, is_listed: bool
) -> Iterator[str]:
    """Yield the text of a tar's documents, and of the archives in it. What is no text is left out.

    Its first block `head` has been read. If it `is_listed`, list_archives has listed the archives
    in it and counted what is no part of the corpus. Raises Damaged.
    """
    if level > DEEPEST:
        raise Damaged(f"it holds archives in archives, more than {DEEPEST} levels deep")
    passed_over = Counter() if is_listed else counts
    for name, _, length in tar_members(stream, size, passed_over, head):
        if is_listed and name.lower().endswith(PACKED):
            continue
        try:
            yield from read_content(name, stream, length, counts, level + 1, is_archive=False)
        except NotText:
            counts["passed over (not text)"] += 1


def read_text(blocks: Iterator[bytes], counts: Counter[str], is_archive: bool) -> Iterator[str]:
    """Yield a text in pieces; nothing if it holds line ends only. Raises NotText.

    An archive's own text ends with a line end. A document of a tar ends with a blank line, instead
    of all the line ends that it has there.
    """
    is_empty = True
    ends = ""  # line ends that only the next piece shows to be the last ones or not
    for piece in text_pieces(blocks, counts, judge_at_end=is_archive):
        piece = ends + piece
        text = piece.rstrip("\n")
        ends = piece[len(text) :][:CHUNK]  # so that a file of nothing else can't fill the memory
        if text:
            is_empty = False
            yield text
    if not is_empty:
        counts["documents"] += 1
        yield (ends or "\n") if is_archive else "\n\n"


def text_pieces(blocks: Iterator[bytes], counts: Counter, judge_at_end: bool) -> Iterator[str]:
    r"""Yield a text in pieces, with `\n` line ends. Only the last block is shorter than CHUNK.

    NULs and invalid sequences become U+FFFD and are counted. Raises NotText if they are too many in
    all of the text, or in the first piece of it: when the next is read, the first is written.
    """
    first, last = next(blocks, b""), b""
    is_plain = b"\r" not in first and b"\0" not in first and not first.startswith(codecs.BOM_UTF8)
    if is_plain and len(first) < CHUNK:
        with suppress(UnicodeDecodeError):  # most documents; the decoder below takes far longer
            yield first.decode()
            return
    is_utf16 = first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in first[:HEAD] and not is_utf16:
        raise NotText(f"it is not text: a NUL is among its first {HEAD:,} bytes ({ELSEWHERE})")
    characters = invalid = 0
    decoder = codecs.getincrementaldecoder("utf-16" if is_utf16 else "utf-8-sig")("NUL")
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    judged_at = last if judge_at_end else first
    for block in chain([first], blocks, [last]):
        text = lines.decode(block, final=not block)
        characters += len(text)
        invalid += text.count("\0")
        if block is judged_at and invalid > MOST_INVALID * characters:
            raise NotText(
                f"it is not text: {SHARE.format(100 * invalid / characters)} ({ELSEWHERE})"
            )
        yield text.replace("\0", REPLACEMENT)
    counts["invalid"] += invalid


def read_blocks(stream: BinaryIO, head: bytes = b"", size: int = ENDLESS) -> Iterator[bytes]:
    """Yield `head`, which has been read, and what follows, in blocks of CHUNK but for the last."""
    while block := head + stream.read(max(0, min(size, CHUNK) - len(head))):
        yield block
        head = b""
        size -= len(block)


# The format of a tar ------------------------------------------------------------------------------


def tar_members(
    stream: BinaryIO, size: int, passed_over: Counter[str], header: bytes = b""
) -> Iterator[tuple[str, int, int]]:
    """Yield name, place and size of each file in the tar that is the next `size` bytes of a stream.

    Those whose names are no part of the corpus are passed over and counted. The stream stands at
    the place of a file then, and the caller may read on from there, or not. The first header may
    have been read. Goes on behind an end mark, since tars may be joined by `cat`. Reads only the
    fields that matter here, which takes 1 s per GB of OpenWebText where `tarfile` takes 5 s
    (unpacking takes 8 s). Raises Damaged.
    """
    place = stream.tell() - len(header)
    end = place + size
    is_ended = False
    extra = b""  # headers that say more of the next member, with their content
    while header := header or stream.read(min(BLOCK, end - place)):
        place += len(header)
        is_ended = not header.strip(b"\0")  # NULs end a tar
        if not is_ended:
            kind = header[156:157]
            is_extra = kind in (b"L", b"K", b"x")
            name, size = parse_header(header, b"" if is_extra else extra)
            if is_extra:
                content = stream.read(min(size + -size % BLOCK, CHUNK))
                # Many tars have a header for the time of each member, which is not needed here.
                if kind != b"x" or b"path=" in content or b"size=" in content:
                    extra = (extra + header + content)[:CHUNK]  # tarfile refuses what is cut
            else:
                extra = b""
                is_file = kind in (b"0", b"\0", b"7") and not name.endswith("/")
                reason = reason_in_name(name)
                if is_file and reason:
                    passed_over[reason] += 1
                elif is_file:
                    yield name, place, size
            place = min(end, place + size + -size % BLOCK)
            stream.seek(place)
        header = b""
    if not is_ended:
        raise Damaged("it is cut short")


def is_tar_header(block: bytes) -> bool:
    """Return whether a member of a tar begins with this block, judged by the check sum in it."""
    field = block[148:156]
    digits = field.strip(b"\0 ").lstrip(b"0")
    if len(block) < BLOCK or not digits.isdigit():  # few texts get further
        return False
    total = sum(block) - sum(field) + 8 * ord(" ")  # made with blanks in its own place
    return digits == b"%o" % total


def parse_header(header: bytes, extra: bytes) -> tuple[str, int]:
    """Return a member's name and size. The fields' places are those of ustar.

    `extra` holds what stands before this header and belongs to the same member. Raises Damaged.
    """
    if not is_tar_header(header) or header[156:157] == b"S":  # whose content is a map and pieces
        raise Damaged("the tar in it is damaged, cut short or sparse, or something else follows it")
    path = header[:100].rstrip(b"\0")
    if header[257:263] == b"ustar\0":
        path = (header[345:500].rstrip(b"\0") + b"/" + path).lstrip(b"/")
    name = path.decode("utf-8", "replace")
    octal = header[124:136].strip(b"\0 ")
    if extra or octal.strip(b"01234567"):
        # tarfile reads long names and sizes above 8 GB, whatever program wrote them.
        file = io.BytesIO(extra + header)
        try:
            member = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="replace").next()
        except (tarfile.TarError, ValueError, RecursionError):
            raise Damaged("the tar in it is damaged") from None
        name, size = member.name, max(0, member.size)  # a negative one would lead back here
    else:
        size = int(octal or b"0", 8)
    # Links, devices and folders have no content, whatever size.
    return name, 0 if header[156:157] in b"123456" else size


# Extracting one archive, in worker processes ------------------------------------------------------


def start_worker() -> None:
    """Leave Ctrl-C, which reaches every process, to the parent, and end when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def extract_archive(archive: Archive, part: Path) -> tuple[Counter[str], Counter[str], str]:
    """Write an archive's clean text to a file of its own.

    Returns counts (documents, characters, invalid, members passed over), those of each character,
    and the damage.
    """
    counts = Counter()
    try:
        with name_file_in_errors(part), open(part, "w+b", CHUNK) as file:
            for text in read_archive(archive, counts):
                counts["characters"] += len(text)
                file.write(text.encode())
            file.seek(0)
            return counts, count_characters(read_blocks(file)), ""
    except Damaged as damage:
        return Counter(), Counter(), str(damage)


def count_characters(blocks: Iterable[bytes]) -> Counter[str]:
    """Count each character in UTF-8 text that may be cut anywhere; COMMON ones once per block.

    Counting all takes 7 s per GB, this 0.7 s: most of the common ones are found at once, and few
    others are left.
    """
    seen = Counter()
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in blocks:
        seen.update(chr(code) for code in COMMON if code in block)
        utf_32 = decoder.decode(block.translate(None, COMMON)).encode("utf-32-le")
        found = np.bincount(np.frombuffer(utf_32, dtype="<u4"))  # by code point
        seen.update({chr(code): int(found[code]) for code in np.flatnonzero(found)})
    return seen


# The whole corpus ---------------------------------------------------------------------------------


def extract(
    archives: list[Archive], passed_over: Counter, folder: Path, skip: bool, min_count: int
) -> list[str]:
    """Write the three files into `folder`, and return a summary. With `skip`, leave damage out.

    The first `int(0.9 * n)` of ten archives or more are training text and the rest validation text.
    The text of fewer is cut after `int(0.9 * characters)`. Raises DataError, and OSError when a
    file can't be read or written.
    """
    train, val, seen, notes = Counter(), Counter(), Counter(), []
    train_path, val_path, vocab_path = (folder / name for name in OUTPUT_NAMES)
    is_cut = len(archives) < FEW
    first_val = len(archives) if is_cut else int(TRAIN_SHARE * len(archives))
    with tqdm(
        total=sum(archive.size for archive in archives), unit="B", unit_scale=True, disable=None
    ) as bar:
        for index, (counts, found, damage) in enumerate(extract_all(archives, folder)):
            name, part = archives[index].name, folder / str(index)
            path, text = (train_path, train) if index < first_val else (val_path, val)
            if damage and not skip:
                raise DataError(f"{name}: {damage}; replace it, or leave it out with -skip_corrupt")
            if damage:
                notes.append(f"left out: {name}: {damage}")
            else:
                with name_file_in_errors(path), open(part, "rb") as file, open(path, "ab") as out:
                    shutil.copyfileobj(file, out, CHUNK)
            part.unlink()
            text.update(counts)
            seen.update(found)
            if counts["invalid"] > DOUBTFUL * counts["characters"]:
                share = SHARE.format(100 * counts["invalid"] / counts["characters"])
                notes.append(f"{name}: {share}")
            bar.set_postfix_str(f"{index + 1:,} of {len(archives):,} files", refresh=False)
            bar.update(archives[index].size)
    if is_cut and train["characters"]:
        keep = int(TRAIN_SHARE * train["characters"])
        move_end(train_path, val_path, keep)
        train["characters"], val["characters"] = keep, train["characters"] - keep
    counts = passed_over + train + val
    notes += [f"{what}: {n:,}" for what, n in counts.items() if what.startswith("passed over")]
    if not train["characters"] or not val["characters"]:
        raise DataError(
            "; ".join(["too little text: training and validation both need some; add more", *notes])
        )
    kept = {c for c, count in seen.items() if count >= min_count or c.isascii()}
    if len(kept) < len(seen):
        kept.add(REPLACEMENT)  # as which training reads the rare ones
    with (
        name_file_in_errors(vocab_path),
        open(vocab_path, "w", encoding="utf-8", newline="") as out,
    ):
        out.writelines(f"{character}\n" for character in sorted(kept))
    lines = [f"{'':10} {'documents':>12} {'characters':>16} {'megabytes':>12}"]
    for name, text, path in (("training", train, train_path), ("validation", val, val_path)):
        documents = f"of {counts['documents']:,}" if is_cut else f"{text['documents']:,}"
        lines.append(
            f"{name:10} {documents:>12} {text['characters']:16,} {path.stat().st_size / 1e6:12,.2f}"
        )
    lines.append(
        f"vocabulary: {len(kept):,} characters; "
        f"invalid sequences replaced by U+FFFD: {counts['invalid']:,}"
    )
    return lines + notes


def extract_all(archives: list[Archive], parts: Path) -> Iterator[tuple[Counter, Counter, str]]:
    """Yield what came out of each archive, in order. Worker processes write texts to `parts`."""
    # A container may see 64 cores and have two.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores, 16, len(archives))
    spawn = multiprocessing.get_context("spawn")  # the same on every system, safe beside threads
    with ProcessPoolExecutor(workers, spawn, start_worker) as pool:
        try:
            futures = (
                pool.submit(extract_archive, archive, parts / str(index))
                for index, archive in enumerate(archives)
            )
            waiting = deque(islice(futures, AHEAD * workers))
            while waiting:
                # In steps: on Windows, Ctrl-C ends no wait but only comes after it.
                while not waiting[0].done():
                    wait([waiting[0]], timeout=0.2)
                yield waiting.popleft().result()
                waiting.extend(islice(futures, 1))
        except (BrokenExecutor, MemoryError):
            raise DataError(
                "a worker process was killed, perhaps for want of memory; run again"
            ) from None
        finally:
            # On an error or Ctrl-C, don't wait for their archives.
            for process in multiprocessing.active_children():
                process.kill()


def move_end(source: Path, target: Path, keep: int) -> None:
    """Move the text from character `keep` on from one file to another."""
    size = 0
    with name_file_in_errors(target), open(source, "r+b") as old, open(target, "wb") as new:
        text = io.TextIOWrapper(old, encoding="utf-8", newline="")
        while piece := text.read(min(keep, CHUNK)):  # nothing is read when nothing is left
            keep -= len(piece)
            size += len(piece.encode())
        old.seek(size)
        shutil.copyfileobj(old, new, CHUNK)
        old.truncate(size)


# One run at a time, and three outputs or none -----------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during the block. Raises BlockingIOError if another process does.

    On a disk that knows no locks, such as a mounted cloud folder, the block runs without.
    """
    with open(path, "ab") as file:
        # A file without a name was that of a process which has ended since this one opened it.
        if not lock(file) or os.fstat(file.fileno()).st_nlink == 0:
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                "another run is at work on it; wait for its end",
                str(path.parent),
            )
        try:
            yield
        finally:
            if os.name == "nt":
                file.close()  # Windows removes no open file, nor one that others are about to lock
            with suppress(PermissionError):
                path.unlink(missing_ok=True)


def lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed or this process dies. Return False if another one holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in HELD
    return True


def write_outputs(args: argparse.Namespace, archives: list[Archive], passed_over: Counter) -> list:
    """Extract archives, then let the three outputs take the place of former ones, all or none.

    Returns a summary.
    """
    temporary = args.output_dir / "data_extract.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # what a run that was killed has left
    try:
        temporary.mkdir()
        summary = extract(archives, passed_over, temporary, args.skip_corrupt, args.min_count)
        move_outputs(temporary, args.output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def move_outputs(temporary: Path, folder: Path) -> None:
    """Move the outputs from `temporary` to `folder`. If one can't be moved, put former ones back.

    `vocab.txt` goes first and comes last: training refuses what a kill leaves in between. Raises
    OSError.
    """
    for name in OUTPUT_NAMES:
        # Or a power cut could leave an empty file under its name. Some disks know no fsync.
        with suppress(OSError), open(temporary / name, "r+b") as file:
            os.fsync(file.fileno())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what follows takes moments, and is all or nothing
    former = temporary / "former"
    former.mkdir()
    try:
        for name in reversed(OUTPUT_NAMES):
            if (folder / name).is_file():
                replace(folder / name, former / name)
        for name in OUTPUT_NAMES:
            replace(temporary / name, folder / name)
    except OSError as error:
        for moved in OUTPUT_NAMES:
            if not (temporary / moved).exists():
                os.rename(folder / moved, temporary / moved)
            if (former / moved).exists():
                os.rename(former / moved, folder / moved)
        raise OSError(error.errno, error.strerror, str(folder / name)) from error


def replace(source: Path, target: Path) -> None:
    """Rename a file, over another if there is one. Raises OSError.

    Windows refuses while another program has either of them open. So this tries again for three
    seconds.
    """
    deadline = time.monotonic() + 3
    while True:
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if time.monotonic() > deadline:
                raise PermissionError(
                    error.errno, f"{error.strerror}; does another program have it open?"
                ) from None
        time.sleep(0.1)


# The built-in sample ------------------------------------------------------------------------------


def write_sample(folder: Path) -> None:
    """Write the Python language reference, which CPython carries for `help()`, as plain ASCII."""
    from pydoc_data.topics import topics

    # No version of Python has every printable character in its topics. With this text, all have the
    # same vocabulary.
    intro = "\n   ".join(
        [
            "The printable characters of ASCII are the space and these:\n",
            string.digits,
            string.ascii_lowercase,
            string.ascii_uppercase,
            string.punctuation,
        ]
    )
    texts = [intro, *(topics[name] for name in sorted(topics))]
    text = "".join(f"{text.rstrip()}\n\n" for text in texts)
    marks = "\u2018\u2019\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212"
    text = text.translate(str.maketrans(marks, "''\"\"------"))
    text = unicodedata.normalize("NFKD", text)  # accents apart, an ellipsis as three dots
    text = re.sub(r"[^\n -~]", "", text)
    with name_file_in_errors(folder):
        (folder / "python_reference.txt").write_text(text, encoding="ascii", newline="\n")


# The command --------------------------------------------------------------------------------------


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.MetavarTypeHelpFormatter,  # "-seed int"
    )
    # Without this, -help would be -h with the value "elp".
    parser.add_argument("-help", action="help", help=argparse.SUPPRESS)
    parser.add_argument(
        "-skip_corrupt", action="store_true", help="leave damaged archives out, don't stop"
    )
    # fmt: off
    flags = [
        ("data_dir", Path, None,
            f"archives or texts (default: {DEFAULT_DATA_DIR} if it is there, else a sample)"),
        ("output_dir", Path, Path("."), "where to write the three files (default: %(default)s)"),
        ("sample_rate", float, 1.0,
            "share of the archives to use, up to 1 (default: %(default)s)"),
        ("min_count", int, 1, "leave rarer characters out of vocab.txt (default: %(default)s)"),
        ("seed", int, 1337,
            "decides which archives -sample_rate takes (default: %(default)s)"),
    ]
    # fmt: on
    for name, kind, default, help in flags:
        parser.add_argument(f"-{name}", type=kind, default=default, help=help)
    args = parser.parse_args(
        [re.sub(r"^--(?=\w+(=|$))", "-", argument) for argument in arguments]  # --seed is -seed
    )
    if not 0 < args.sample_rate <= 1:
        parser.error(f"argument -sample_rate: {args.sample_rate} is not above 0 and at most 1")
    if args.min_count < 1:
        parser.error(f"argument -min_count: {args.min_count} is not 1 or more")
    return args


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as sample:
        data_dir = args.data_dir or Path(DEFAULT_DATA_DIR)
        if not args.data_dir and not data_dir.is_dir():
            show(
                f"no {DEFAULT_DATA_DIR} folder here: "
                "using the built-in sample, the Python reference",
                sys.stderr,
            )
            data_dir = Path(sample)
            write_sample(data_dir)
        found, passed_over = find_archives(data_dir)
        archives = take_sample(found, args.sample_rate, args.seed)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with locked(args.output_dir / "data_extract.lock.tmp"):
            summary = write_outputs(args, archives, passed_over)
    if args.sample_rate < 1:
        summary.append(f"sample: {len(archives):,} of {len(found):,} archives")
    summary.append(f"wrote {', '.join(OUTPUT_NAMES)} in {os.path.abspath(args.output_dir)}")
    with name_file_in_errors("standard output"):
        for line in summary:
            show(line, sys.stdout)


def main() -> int:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as under pythonw
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # those of IDLE and Jupyter lack it
            # Names of archives may be of any encoding.
            stream.reconfigure(errors="backslashreplace")
    args = parse_args(sys.argv[1:])
    # So that temporary files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    status = 1
    try:
        run(args)
        return 0
    except DataError as error:
        message = str(error)
    except OSError as error:
        if not error.filename:
            raise  # where it comes from is not known, so better a traceback than a wrong reason
        message = f"{error.filename}: {error.strerror}"
        if error.filename == "standard output":
            sys.stdout = None  # or Python would try to write the rest once more at its end
    except KeyboardInterrupt:
        message, status = "interrupted; nothing was changed", 128 + signal.SIGINT
    show(f"data_extract.py: {message}", sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
