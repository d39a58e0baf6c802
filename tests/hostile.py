"""Model files as a stranger might send them: pickles that call something when they are read, that
change what is around them, and impossible ones.

One of each kind is written out here; the mutations of fuzz.py make thousands.
"""

import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

# Calls --------------------------------------------------------------------------------------------


class Call(tuple):
    """A function and its arguments: pickled, a call that is made when the pickle is read."""

    def __reduce__(self):
        return self[0], self[1:]


def calls(folder: Path) -> dict[str, Call]:
    """Return calls that leave a file `ran` in the folder."""
    code = f"open({str(folder / 'ran')!r}, 'w').close()"
    (folder / "hubconf.py").write_text(f"def make():\n    {code}\n", encoding="utf-8")
    load_hub = functools.partial(torch.hub.load, source="local")
    legacy = torch_dumps(Call((exec, code)), _use_new_zipfile_serialization=False)
    script = [sys.executable, "-c", code]
    return {
        "os.system": Call((os.system, subprocess.list2cmdline(script))),
        "exec": Call((exec, code)),
        "Popen": Call((subprocess.Popen, script)),
        "_load_from_bytes": Call((torch.storage._load_from_bytes, legacy)),
        "torch.hub.load": Call((load_hub, str(folder), "make")),
        "partial": Call((functools.reduce, functools.partial(exec), [code, {}])),
    }


# Archives -----------------------------------------------------------------------------------------


def torch_dumps(content, **options) -> bytes:
    """Return what torch.save writes, as pickle.dumps does for pickle.dump."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    """Return a zip archive, as torch.save makes one, of these files by name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


BESIDE_A_PICKLE = {"m/version": b"3\n", "m/byteorder": b"little"}  # in an archive of torch.save


# Pickles written by hand --------------------------------------------------------------------------


def text(characters: str) -> bytes:
    """Return the instruction that puts a text on the stack."""
    return b"X" + struct.pack("<I", len(characters)) + characters.encode("ascii")


HEAD = b"c__main__\nHead\n"  # a class
STAND_IN = HEAD + b")\x81"  # an instance of it
LOADER = b"ctorch.storage\n_load_from_bytes\n"  # a function that may be called
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
METHOD = text("pathlib") + text("Path.unlink") + b"\x93"
MODULE = STAND_IN + b"}" + text("_modules") + b"}" + text("a")  # with a module `a` in it, to follow


def build(target: bytes, name: str, value: bytes) -> bytes:
    """Return the pickle that sets an attribute, in both of the ways that a pickle has for it."""
    attributes = b"}" + text(name) + value + b"s"
    return b"\x80\x04" + target + attributes + b"b" + b"N" + attributes + b"\x86b."


HAND_WRITTEN = {
    # May get at nothing that runs code, nor change what a later file is read with.
    "a dotted name": b"\x80\x04" + text("__main__") + text("Head.__init__.__globals__") + b"\x93.",
    "a name of model.py": b"\x80\x04cmodel\natomic_write\n" + text("x") + b"\x85R.",
    "a method": b"\x80\x04" + METHOD + text("x") + b"\x85R.",
    "the state of a class": build(HEAD, "__setstate__", LOADER),
    "the methods of an instance": build(STAND_IN, "__setstate__", LOADER)[:-1] + b"}b.",
    "the defaults of a function": build(REBUILD, "__defaults__", b"K\x01\x85"),
    "the code of a function": build(LOADER, "__code__", b"K\x01"),
    "the methods of a dict": build(b"ccollections\nOrderedDict\n)R", "items", LOADER),
    "a registered extension": b"\x80\x04\x82\x01.",
    "a persistent object": b"\x80\x04" + text("a") + b"Q.",
    # Can't be what they claim to be.
    "a list in itself": b"\x80\x04]q\x00h\x00a.",
    "modules in modules": b"\x80\x04" + MODULE * 5000 + b"N" + b"ssb" * 5000 + b".",
    "a list as a key": b"\x80\x04}]K\x01s.",
    "a module for a weight": b"\x80\x04}" + text("token_embedding_table.weight") + STAND_IN + b"s.",
    "control characters": b"\x80\x04}" + text("model") + b"c\x1b]0;x\x07\x9b31m\nX\n" + b"s.",
    "two pickles": zipped({"m/data.pkl": b"}.", **BESIDE_A_PICKLE, "n/data.pkl": b"}."}),
    "an empty pickle": zipped({"m/data.pkl": b"", **BESIDE_A_PICKLE}),
}


def hostile_files(folder: Path, weights: dict) -> dict[str, bytes]:
    """Return the files above, and all calls in all packagings, by the name of a file.

    A call that is made leaves a file `ran` in the folder.
    """
    files = {**HAND_WRITTEN}
    for name, call in calls(folder).items():
        files |= {f"{name} {protocol}": pickle.dumps(call, protocol) for protocol in (0, 2, 4, 5)}
        pickled = pickle.dumps({"weights": {}, "vocabulary": call}, 2)
        archive = zipped({"m/data.pkl": pickled, **BESIDE_A_PICKLE})
        checkpoint = {"model": weights, "more": call}
        files |= {
            f"{name} in an archive": archive,
            f"{name} in an archive in a pickle": pickle.dumps(
                Call((torch.storage._load_from_bytes, archive))
            ),
            f"{name} beside weights": pickle.dumps(checkpoint),
            f"{name} beside weights in an archive": torch_dumps(checkpoint),
        }
    return {f"{name}.pkl": content for name, content in files.items()}
