"""Turn archives of text into `output_train.txt`, `output_val.txt` and `vocab.txt`.

    archives (.tar, .xz, .txt)  ->  documents  ->  clean UTF-8 text  ->  two files and the characters in them

OpenWebText's `.xz` files are tars of documents inside; reading them as text would train a model on tar headers. So
every archive is opened by what it contains, and other data than text never becomes corpus in silence. Worker
processes unpack archives side by side, each into a file of its own that is then appended to the output, so that
neither memory nor temporary files grow with the corpus.
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
import string
import sys
import tempfile
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
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
READ_SIZE = 64 << 10  # bytes unpacked at once, few enough to stay in a core's cache
CHUNK = 2 << 20  # bytes of text handled at once
BLOCK = 512  # bytes, of which a tar is made
AHEAD = 4  # archives per worker whose texts may wait for their turn: without a limit they could fill the disk
REPLACEMENT = "\ufffd"
HEAD = 8000  # bytes at the beginning of a text that hold no NUL, as git and grep have it
MOST_INVALID = 0.2  # of the characters of a text; Chinese in GBK has 0.69, French in Windows-1252 has 0.04
SHARE = "{:.0f} % of its characters are not UTF-8 (NULs included)"
DOUBTFUL = 0.01  # an archive with a larger share is named in the summary
PAX_FIELD = re.compile(rb"^\d+ (path|size|GNU\.sparse)(?:\.\w+)?=(.*)$", re.MULTILINE)
codecs.register_error("NUL", lambda error: ("\0", error.end))  # so that invalid sequences and NULs are counted as one
COMMON = b"\n\t" + bytes(range(32, 127))  # most of most texts


class DataError(Exception):
    """The data can't be used as it is. The message says which file, why, and what to do."""


class Damaged(Exception):
    """An archive is damaged. The message says what is wrong with "it"."""


class NotText(Damaged):
    """A file or a member of a tar is not text."""


@contextmanager
def name_file_in_errors(path: Path | str) -> Iterator[None]:
    """Name `path` in an OSError from the block. Python's own errors name a file only when it is opened."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(path)) from error


def show(line: str, stream: TextIO) -> None:
    """Print one line, with control characters in the names of files as `ascii` writes them: a terminal obeys them."""
    print(re.sub(r"[\x00-\x08\n-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], line), file=stream, flush=True)


# Finding archives ----------------------------------------------------------------------------------------------------


class Archive(NamedTuple):
    """One unit of the corpus: `size` bytes from `start` in the file `path`; messages call it `name`."""

    name: str
    path: Path
    start: int
    size: int


def find_archives(data_dir: Path) -> tuple[list[Archive], Counter[str]]:
    """Return all archives below `data_dir`, and how many files, folders and members of outer tars are passed over.

    Archives are sorted by their own file name, then by path. The `.xz` members of a `.tar` are archives of their own,
    so a corpus comes out in one order, whether its outer tars are unpacked or not. Raises DataError if none is found.
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
                archive = Archive(path.relative_to(data_dir).as_posix(), path, 0, path.stat().st_size)
                archives += archives_in_tar(archive, passed_over) if path.suffix.lower() == ".tar" else [archive]
    if not archives:
        problem = f"{data_dir}: holds no .tar, .xz or .txt file; put your archives or texts there"
        raise DataError("; ".join([problem, *(f"{reason}: {count:,}" for reason, count in passed_over.items())]))
    return sorted(archives, key=lambda archive: (archive.name.rpartition("/")[2], archive.name)), passed_over


def reason_in_name(name: str) -> str:
    """Return why a file or a member of a tar with this name is not part of the corpus, or ""."""
    if re.search(r"(^|/)\.(?!\.?(/|$))", name):  # a part begins with a dot, but is not "." or ".."
        return "passed over (hidden)"
    if name.rpartition("/")[2].lower() in NEVER_CORPUS:
        return "passed over (an output of these scripts, or requirements.txt)"
    return ""


def reason_in_kind(path: Path, seen: set[str]) -> str:
    """Return why a file or folder can't be read or has been `seen`, or "", and add its real path to those `seen`."""
    if not path.is_dir() and not (path.suffix.lower() in {".tar", ".xz", ".txt"} and path.is_file()):
        return f"passed over (no .tar, .xz or .txt file; {ELSEWHERE})"
    real_path = os.path.realpath(path)
    if real_path in seen:  # so links to one folder neither double the corpus nor lead round in circles
        return "passed over (a link to what is read anyway)"
    seen.add(real_path)
    return ""


def archives_in_tar(outer: Archive, passed_over: Counter[str]) -> list[Archive]:
    """Return the `.xz` members of a tar, and the tar itself if it holds documents too, is empty or is damaged."""
    archives, is_read_itself = [], False
    with name_file_in_errors(outer.path), open(outer.path, "rb") as file:
        try:
            for name, size, blocks in tar_members(file):
                reason = reason_in_name(name)
                if reason:
                    passed_over[reason] += 1
                elif name.lower().endswith(".xz"):
                    archives.append(Archive(f"{outer.name}/{name}", outer.path, file.tell(), size))
                else:
                    is_read_itself = True
                blocks.close()  # not to be read: a tar has gigabytes, and a damaged one may name any size
                file.seek(min(size, outer.size), os.SEEK_CUR)
        except Damaged:
            is_read_itself = True  # reading it comes upon the damage and reports it like that of any other archive
    return [outer, *archives] if is_read_itself or not archives else archives


def take_sample(archives: list[Archive], rate: float, seed: int) -> list[Archive]:
    """Return a reproducible share of the archives, in their order; a higher rate adds to what a lower one takes."""
    order = random.Random(seed).sample(range(len(archives)), len(archives))
    return [archives[i] for i in sorted(order[: max(1, round(rate * len(archives)))])]


# Reading one archive -------------------------------------------------------------------------------------------------


class Window:
    """The next `size` bytes of a file, for `lzma.open`: an `.xz` in an outer tar is read in place."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left = file, size
        self.is_read = False  # up to its end, and once more to see that it is the end

    def read(self, size: int) -> bytes:
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        self.is_read = not data
        return data


def read_archive(archive: Archive, counts: Counter[str]) -> Iterator[str]:
    """Yield an archive's text in bounded pieces, and count documents and invalid characters. Raises Damaged."""
    ending = Path(archive.name).suffix.lower()
    is_xz = ending == ".xz"
    with name_file_in_errors(archive.path), open(archive.path, "rb") as file:
        file.seek(archive.start)
        packed = Window(file, archive.size)
        stream = io.BufferedReader(lzma.open(packed, format=lzma.FORMAT_XZ), READ_SIZE) if is_xz else file  # noqa: SIM115
        try:
            head = stream.peek(BLOCK)[:BLOCK]
            is_tar = ending == ".tar" or is_tar_header(head) or (is_xz and head == bytes(BLOCK))  # NULs: an empty tar
            yield from (read_tar if is_tar else read_plain)(ending, stream, counts)
        except (EOFError, lzma.LZMAError) as error:
            raise Damaged(f"it is not a sound .xz file ({error})") from None
        if is_xz and not packed.is_read:  # the lzma module stops in silence where no further .xz data follows
            raise Damaged("something else follows the .xz data in it")


def read_plain(ending: str, stream: BinaryIO, counts: Counter[str]) -> Iterator[str]:
    """Yield a plain text in pieces. A `.txt` ends with a newline; `.xz` are joined as they are. Raises NotText."""
    last = "\n"
    for text in decode(iter(partial(stream.read, CHUNK), b""), counts, judge_at_end=True):
        yield text
        last = text or last
    counts["documents"] += 1
    if ending == ".txt" and not last.endswith("\n"):
        yield "\n"


def read_tar(ending: str, stream: BinaryIO, counts: Counter[str]) -> Iterator[str]:
    """Yield the documents of a tar, and pass over what is no text, such as another archive. Raises Damaged."""
    for name, _, blocks in tar_members(stream):
        reason = reason_in_name(name)
        if ending == ".tar" and (reason or name.lower().endswith(".xz")):
            continue  # archives_in_tar has counted or listed it
        if reason:
            counts[reason] += 1
        else:
            try:
                yield from read_document(blocks, counts)
            except NotText:
                counts["passed over (not text)"] += 1


def read_document(blocks: Iterator[bytes], counts: Counter[str]) -> Iterator[str]:
    """Yield a document without trailing line ends, then a blank line; nothing if it is empty. Raises NotText."""
    is_empty = True
    ends = ""  # line ends that only the next piece shows to be trailing or not
    for piece in decode(blocks, counts, judge_at_end=False):
        piece = ends + piece
        text = piece.rstrip("\n")
        ends = piece[len(text) :][:CHUNK]  # no more, so that a file of nothing else can't fill the memory
        if text:
            is_empty = False
            yield text
    if not is_empty:
        counts["documents"] += 1
        yield "\n\n"


def decode(blocks: Iterator[bytes], counts: Counter[str], judge_at_end: bool) -> Iterator[str]:
    r"""Yield a text in pieces, with `\n` line ends. Blocks of CHUNK bytes come in, of which only the last is shorter.

    NULs and invalid sequences become U+FFFD and are counted. Raises NotText if they are too many in all of the text, or
    in the first piece of a document: when the next one is read, the first has been written.
    """
    first = next(blocks, b"")
    if len(first) < CHUNK and b"\r" not in first and b"\0" not in first and not first.startswith(codecs.BOM_UTF8):
        with suppress(UnicodeDecodeError):  # most documents are like that, and the decoder below takes far longer
            yield first.decode()
            return
    is_utf16 = first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in first[:HEAD] and not is_utf16:
        raise NotText(f"it is not text: a NUL is among its first {HEAD:,} bytes ({ELSEWHERE})")
    characters = invalid = 0
    decoder = codecs.getincrementaldecoder("utf-16" if is_utf16 else "utf-8-sig")("NUL")
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    for block in chain([first], blocks, [b""]):
        text = lines.decode(block, final=not block)
        characters += len(text)
        invalid += text.count("\0")
        is_judged = not block if judge_at_end else block is first
        if is_judged and invalid > MOST_INVALID * characters:
            raise NotText(f"it is not text: {SHARE.format(100 * invalid / characters)} ({ELSEWHERE})")
        yield text.replace("\0", REPLACEMENT)
    counts["invalid"] += invalid


def tar_members(stream: BinaryIO) -> Iterator[tuple[str, int, Iterator[bytes]]]:
    """Yield name, size and content of each file in a tar; content that isn't read is skipped.

    Goes on behind an end mark, since tars may be joined by `cat`. Reads only the fields that matter here, which takes
    1 s per GB of OpenWebText where `tarfile` takes 5 s (unpacking takes 8 s). Raises Damaged.
    """
    is_ended = False
    extended = {}  # what extra headers say of the next member
    while header := stream.read(BLOCK):
        is_ended = not header.strip(b"\0")  # NULs end a tar
        if is_ended:
            continue
        if not is_tar_header(header):
            raise Damaged("the tar in it is damaged or cut short, or something else follows it")
        name, size = parse_header(header, extended)
        blocks = read_blocks(stream, size)
        kind = header[156:157]
        if kind == b"L":  # GNU tar's way to give a long name
            extended[b"path"] = next(blocks, b"")
        elif kind == b"x":  # and that of pax, also for a huge size
            extended |= PAX_FIELD.findall(next(blocks, b""))
        elif kind == b"S" or b"GNU.sparse" in extended:  # its content is a map and pieces
            raise Damaged(f"it holds a sparse file, {name!r} (unpack it with tar -xf)")
        else:
            extended = {}
            if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
                yield name, size, blocks
        for _ in blocks:
            pass
        stream.read(-size % BLOCK)  # what fills the last block
    if not is_ended:
        raise Damaged("it is cut short")


def is_tar_header(block: bytes) -> bool:
    """Return whether a member of a tar begins with this block, judged by the check sum in it."""
    digits = block[148:156]
    total = sum(block) - sum(digits) + len(digits) * ord(" ")  # the sum is made with blanks in its own place
    return len(block) == BLOCK and digits.strip(b"\0 ").lstrip(b"0") == b"%o" % total


def parse_header(header: bytes, extended: dict[bytes, bytes]) -> tuple[str, int]:
    """Return a member's name and size. The fields' places are those of the ustar format. Raises Damaged."""
    path = header[:100].rstrip(b"\0")
    if header[257:263] == b"ustar\0":
        path = (header[345:500].rstrip(b"\0") + b"/" + path).lstrip(b"/")
    digits = header[124:136]
    is_binary = digits[0] & 0x80  # as GNU tar has it from 8 GB on
    try:
        size = int.from_bytes(digits[1:], "big") if is_binary else int(digits.rstrip(b"\0 ") or b"0", 8)
        size = max(0, int(extended.get(b"size", size)))  # a negative one would lead back here
    except ValueError:
        raise Damaged("the tar in it is damaged") from None
    if header[156:157] in b"123456":  # links, devices and folders have no content, whatever size they name
        size = 0
    return extended.get(b"path", path).rstrip(b"\0").decode("utf-8", "replace"), size


def read_blocks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the next `size` bytes in blocks of CHUNK, the last one shorter. Raises Damaged if there are fewer."""
    while size > 0:
        block = stream.read(min(size, CHUNK))
        if len(block) < min(size, CHUNK):
            raise Damaged("the tar in it is cut short")
        size -= len(block)
        yield block


# Extracting one archive, in worker processes -------------------------------------------------------------------------


def start_worker() -> None:
    """Let the parent decide what to do about Ctrl-C, which reaches every process, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def extract_archive(archive: Archive, part: Path) -> tuple[Counter[str], Counter[str], str]:
    """Write an archive's clean text to a file of its own.

    Returns counts (documents, characters, invalid, members passed over), those of each character, and the damage.
    """
    counts = Counter()
    try:
        with name_file_in_errors(part), open(part, "w+b", CHUNK) as file:
            for text in read_archive(archive, counts):
                counts["characters"] += len(text)
                file.write(text.encode())
            file.seek(0)
            return counts, count_characters(iter(partial(file.read, CHUNK), b"")), ""
    except Damaged as damage:
        return Counter(), Counter(), str(damage)


def count_characters(blocks: Iterable[bytes]) -> Counter[str]:
    """Return how often each character is in UTF-8 text that may be cut anywhere; of COMMON ones, only that they are.

    Counting all takes 7 s per GB, this 0.7 s: most of the common ones are found at once, and few others are left.
    """
    seen = Counter()
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in blocks:
        seen.update(chr(code) for code in COMMON if code in block)
        utf_32 = decoder.decode(block.translate(None, COMMON)).encode("utf-32-le")
        found = np.bincount(np.frombuffer(utf_32, dtype="<u4"))  # by code point
        codes = np.flatnonzero(found)
        seen.update(dict(zip(map(chr, codes.tolist()), found[codes].tolist())))
    return seen


# The whole corpus ----------------------------------------------------------------------------------------------------


def extract(archives: list[Archive], passed_over: Counter, folder: Path, skip: bool, min_count: int) -> list[str]:
    """Write the three files into `folder`, all or none, and return a summary. With `skip`, leave damaged archives out.

    The first `int(0.9 * n)` of ten archives or more are training text and the rest validation text. The text of fewer
    is cut after `int(0.9 * characters)`. Raises DataError, and OSError when a file can't be read or written.
    """
    train, val, seen, notes = Counter(), Counter(), Counter(), []
    is_cut = len(archives) < FEW
    first_val = len(archives) if is_cut else int(TRAIN_SHARE * len(archives))
    bar = tqdm(total=sum(archive.size for archive in archives), unit="B", unit_scale=True, disable=None)
    with outputs_in(folder) as temporary, bar:
        train_path, val_path, vocab_path = (temporary / name for name in OUTPUT_NAMES)
        for index, (counts, found, damage) in enumerate(extract_all(archives, temporary)):
            name, part = archives[index].name, temporary / str(index)
            path, text = (train_path, train) if index < first_val else (val_path, val)
            if damage and not skip:
                raise DataError(f"{name}: {damage}; replace it, or leave it out with -skip_corrupt")
            if damage:
                notes.append(f"left out: {name}: {damage}")
            else:
                with name_file_in_errors(path), open(part, "rb") as file, open(path, "ab") as output:
                    shutil.copyfileobj(file, output, CHUNK)
            part.unlink()
            text.update(counts)
            seen.update(found)
            if counts["invalid"] > DOUBTFUL * counts["characters"]:
                notes.append(f"{name}: {SHARE.format(100 * counts['invalid'] / counts['characters'])}")
            bar.set_postfix_str(f"{index + 1:,} of {len(archives):,} files", refresh=False)
            bar.update(archives[index].size)
        if is_cut and train["characters"]:
            keep = int(TRAIN_SHARE * train["characters"])
            move_end(train_path, val_path, keep)
            train["characters"], val["characters"] = keep, train["characters"] - keep
        counts = passed_over + train + val
        notes += [f"{what}: {count:,}" for what, count in counts.items() if what.startswith("passed over")]
        if not train["characters"] or not val["characters"]:
            raise DataError("; ".join(["too little text: training and validation both need some; add more", *notes]))
        rare = {c for c, count in seen.items() if count < min_count and not c.isascii()}  # ASCII is never rare
        kept = seen.keys() - rare | ({REPLACEMENT} if rare else set())  # training reads rare ones as that
        with name_file_in_errors(vocab_path), open(vocab_path, "w", encoding="utf-8", newline="") as file:
            file.writelines(f"{character}\n" for character in sorted(kept))
        lines = [f"{'':10} {'documents':>12} {'characters':>16} {'megabytes':>12}"]
        for name, text, path in (("training", train, train_path), ("validation", val, val_path)):
            documents = f"of {counts['documents']:,}" if is_cut else f"{text['documents']:,}"
            lines.append(f"{name:10} {documents:>12} {text['characters']:16,} {path.stat().st_size / 1e6:12,.2f}")
    lines.append(f"vocabulary: {len(kept):,} characters; invalid sequences replaced by U+FFFD: {counts['invalid']:,}")
    return lines + notes


def extract_all(archives: list[Archive], parts: Path) -> Iterator[tuple[Counter[str], Counter[str], str]]:
    """Yield what came out of each archive, in order, while worker processes write their texts to files in `parts`."""
    # A container may see 64 cores and have two.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, 16, len(archives))
    # Processes are spawned, not forked: that is the same on every system, and safe beside threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            waiting = deque()
            for index, archive in enumerate(archives):
                waiting.append(pool.submit(extract_archive, archive, parts / str(index)))
                if len(waiting) == AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except (BrokenProcessPool, MemoryError):
            raise DataError("a worker process was killed, perhaps for want of memory; run again") from None
        finally:
            for process in multiprocessing.active_children():  # on an error or Ctrl-C, don't wait for their archives
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


@contextmanager
def outputs_in(folder: Path) -> Iterator[Path]:
    """Give a folder for temporary files. The three outputs in it move to `folder` together if the block succeeds.

    Raises DataError if another extraction is at work in the folder.
    """
    temporary, lock_path = folder / "data_extract.tmp", folder / "data_extract.lock.tmp"
    with open(lock_path, "ab") as file:
        try:
            lock(file)
            # A run that ended after this file was opened has removed it: then its name leads to another file.
            if not os.path.samestat(os.fstat(file.fileno()), lock_path.stat()):
                raise FileNotFoundError
        except (BlockingIOError, PermissionError, FileNotFoundError):
            raise DataError(f"{folder}: another extraction is at work there; wait for its end") from None
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # what a killed run has left
            temporary.mkdir()
            yield temporary
            # What is renamed must be on the disk first, or a power cut could leave an empty file under the right name.
            for name in OUTPUT_NAMES:
                with name_file_in_errors(temporary / name), open(temporary / name, "r+b") as output:
                    os.fsync(output.fileno())
            for name in OUTPUT_NAMES:
                os.replace(temporary / name, folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if os.name == "nt":
                file.close()  # Windows removes no open file, nor one that another run is about to lock
            with suppress(PermissionError):
                lock_path.unlink()


def lock(file: BinaryIO) -> None:
    """Lock a file until it is closed or this process dies. Raises OSError if another process has locked it."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# The built-in sample -------------------------------------------------------------------------------------------------


def write_sample(folder: Path) -> None:
    """Write the Python language reference, which every CPython carries for `help()`, as a plain ASCII text."""
    from pydoc_data.topics import topics

    # No version of Python has every printable character in its topics. With this text, all have the same vocabulary.
    groups = [string.digits, string.ascii_lowercase, string.ascii_uppercase, string.punctuation]
    characters = "The printable characters of ASCII are the space and these:\n\n   " + "\n   ".join(groups)
    nearest = str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212", "''\"\"------")
    text = "".join(f"{text.rstrip()}\n\n" for text in [characters, *(topics[name] for name in sorted(topics))])
    text = unicodedata.normalize("NFKD", text.translate(nearest))  # accents apart, an ellipsis as three dots
    with name_file_in_errors(folder):
        (folder / "python_reference.txt").write_text(re.sub(r"[^\n -~]", "", text), encoding="ascii", newline="\n")


# The command ---------------------------------------------------------------------------------------------------------


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.MetavarTypeHelpFormatter  # "-seed int"
    flag = parser.add_argument
    flag("-help", action="help", help=argparse.SUPPRESS)  # else it would be -h with a value, "elp"
    flag("-data_dir", type=Path, help=f"archives or texts (default: {DEFAULT_DATA_DIR} if it is there, else a sample)")
    flag("-output_dir", type=Path, default=Path("."), help="where to write the three files (default: %(default)s)")
    flag("-skip_corrupt", action="store_true", help="leave damaged archives out instead of stopping")
    flag("-sample_rate", type=float, default=1.0, help="share of the archives to use, up to 1 (default: %(default)s)")
    flag("-min_count", type=int, default=1, help="leave rarer characters out of vocab.txt (default: %(default)s)")
    flag("-seed", type=int, default=1337, help="decides which archives -sample_rate takes (default: %(default)s)")
    args = parser.parse_args([re.sub(r"^--(?=\w+(=|$))", "-", argument) for argument in arguments])  # --seed is -seed
    if not 0 < args.sample_rate <= 1:
        parser.error(f"argument -sample_rate: {args.sample_rate} is not above 0 and at most 1")
    if args.min_count < 1:
        parser.error(f"argument -min_count: {args.min_count} is not 1 or more")
    return args


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as sample:
        data_dir = args.data_dir or Path(DEFAULT_DATA_DIR)
        if not args.data_dir and not data_dir.is_dir():
            show(f"no {DEFAULT_DATA_DIR} folder here: using the built-in sample, the Python reference", sys.stderr)
            data_dir = Path(sample)
            write_sample(data_dir)
        archives, passed_over = find_archives(data_dir)
        archives = take_sample(archives, args.sample_rate, args.seed)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        summary = extract(archives, passed_over, args.output_dir, args.skip_corrupt, args.min_count)
    with name_file_in_errors("standard output"):
        for line in [*summary, f"wrote {', '.join(OUTPUT_NAMES)} in {args.output_dir.resolve()}"]:
            show(line, sys.stdout)


def main() -> int:
    args = parse_args(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # those of IDLE and Jupyter lack it
            stream.reconfigure(errors="backslashreplace")  # names of archives need not be valid in any encoding
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    status = 1
    try:
        run(args)
        return 0
    except DataError as error:
        message = str(error)
    except OSError as error:
        if not error.filename:
            raise  # where it comes from is not known, so better a traceback than a wrong reason
        message = f"{error.filename2 or error.filename}: {error.strerror}"
        if error.filename == "standard output":
            sys.stdout = None  # or Python would try to write the rest once more at its end
    except KeyboardInterrupt:
        message, status = "interrupted; nothing was changed", 128 + signal.SIGINT
    show(f"data_extract.py: {message}", sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
