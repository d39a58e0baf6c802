"""Model files as a stranger might send them: pickles that call something when they are read, and
impossible ones.
"""

import copyreg
import functools
import io
import operator
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

# Calls --------------------------------------------------------------------------------------------


class Call:
    """Pickled, it is a call that is made when the pickle is read."""

    def __init__(self, function, *arguments):
        self.called = (function, arguments)

    def __reduce__(self):
        return self.called


class Runner:
    run = staticmethod(exec)


def calls(folder: Path) -> dict[str, Call]:
    """Return calls that leave a file `ran` in the folder."""
    code = f"open({str(folder / 'ran')!r}, 'w').close()"
    (folder / "hubconf.py").write_text(f"def make():\n    {code}\n", encoding="utf-8")
    legacy = io.BytesIO()
    torch.save(Call(exec, code), legacy, _use_new_zipfile_serialization=False)
    script = [sys.executable, "-c", code]
    touch = Call(getattr, folder / "ran", "touch")
    return {
        "os.system": Call(os.system, subprocess.list2cmdline(script)),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "getattr": Call(map, touch, [0o600]),
        "Popen": Call(subprocess.Popen, script),
        "_load_from_bytes": Call(torch.storage._load_from_bytes, legacy.getvalue()),
        "torch.hub.load": Call(partial(torch.hub.load, source="local"), str(folder), "make"),
        "partial": Call(functools.reduce, partial(exec), [code, {}]),
        "attrgetter": Call(map, Call(operator.attrgetter("touch"), folder / "ran"), [0o600]),
        "_reconstructor": Call(
            map, Call(getattr, Call(copyreg._reconstructor, Runner, object, None), "run"), [code]
        ),
    }


# Archives -----------------------------------------------------------------------------------------


@dataclass
class Stored:
    """Stands for a storage in a pickle of `torch.save`."""

    kind: type = torch.FloatStorage
    key: object = "0"
    count: object = 16


class ArchivePickler(pickle.Pickler):
    def persistent_id(self, item):
        return (
            ("storage", item.kind, item.key, "cpu", item.count)
            if isinstance(item, Stored)
            else None
        )


def as_pickle(content, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    ArchivePickler(file, protocol).dump(content)
    return file.getvalue()


def as_archive(pickled: bytes, *members: tuple[str, bytes]) -> bytes:
    """Return what torch.save makes of a pickle; storage 0 has 16 float32."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        standard = (
            ("m/data.pkl", pickled),
            ("m/version", b"3\n"),
            ("m/byteorder", b"little"),
            ("m/data/0", bytes(64)),
        )
        for name, content in (*standard, *members):
            archive.writestr(name, content)
    return file.getvalue()


def as_storage(pickled: bytes) -> bytes:
    """Return a storage, as in a bare pickle, that holds this pickle where its type and size should
    be.
    """
    inner = b"".join(as_pickle(part) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    return as_pickle(Call(torch.storage._load_from_bytes, inner + pickled), 4)


def one_weight(size=(16,), stride=(1,), start=0, storage=Stored()) -> bytes:  # noqa: B008
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, start, size, stride, False, {})
    return as_archive(as_pickle({"token_embedding_table.weight": tensor}))


# Pickles written by hand --------------------------------------------------------------------------


def text(characters: str) -> bytes:
    """Return the instruction that puts a text on the stack."""
    data = characters.encode()
    return b"X" + struct.pack("<I", len(data)) + data


HEAD = b"c__main__\nHead\n"  # a class
STAND_IN = HEAD + b")\x81"  # an instance of it
LOADER = b"ctorch.storage\n_load_from_bytes\n"  # a function that may be called
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def build(target: bytes, name: str, value: bytes) -> bytes:
    """Return the pickle that sets an attribute, in both of the ways that a pickle has for it."""
    attributes = b"}" + text(name) + value + b"s"
    return b"\x80\x04" + target + attributes + b"b" + b"N" + attributes + b"\x86b."


# Nothing of this may change what a later file is read with, or get at anything that runs code.
ATTACKS = {
    "a dotted name": b"\x80\x04" + text("__main__") + text("Head.__init__.__globals__") + b"\x93.",
    "in a known function": b"\x80\x04"
    + text("torch.storage")
    + text("_load_from_bytes.__globals__")
    + b"\x93.",
    "a name of model.py": b"\x80\x04"
    + text("model")
    + text("atomic_write")
    + text("x")
    + b"\x85R.",
    "a method of a harmless class": b"\x80\x04"
    + text("pathlib")
    + text("Path.unlink")
    + text("x")
    + b"\x85R.",
    "the state of a class": build(HEAD, "__setstate__", LOADER),
    "the methods of an instance": build(STAND_IN, "__setstate__", LOADER)[:-1] + b"}b.",
    "the class of an instance": build(STAND_IN, "__class__", b"ccollections\nOrderedDict\n"),
    "the defaults of a function": build(REBUILD, "__defaults__", b"K\x01\x85"),
    "the code of a function": build(LOADER, "__code__", b"K\x01"),
    "an attribute of a function": build(REBUILD, "harm", b"K\x01"),
    "the methods of a dict": build(b"ccollections\nOrderedDict\n)R", "items", LOADER),
    "an attribute of a library's class": build(b"ccollections\nOrderedDict\n", "harm", b"K\x01"),
    "a registered extension": b"\x80\x04\x82\x01.",
    "a persistent object": b"\x80\x04" + text("a") + b"Q.",
}
MODULE = (
    STAND_IN + b"}" + text("_modules") + b"}" + text("a")
)  # with a module `a` in it, which comes next
IMPOSSIBLE = {
    "a list in itself": b"\x80\x04]q\x00h\x00a.",
    "a module in itself": b"\x80\x04" + MODULE.replace(b")\x81", b")\x81q\x00") + b"h\x00ssb.",
    "modules in modules": b"\x80\x04" + MODULE * 5000 + b"N" + b"ssb" * 5000 + b".",
    "a list as a key": b"\x80\x04}]K\x01s.",
    "attributes without names": b"\x80\x04" + STAND_IN + b"]b.",
    "a module for a weight": b"\x80\x04}" + text("token_embedding_table.weight") + STAND_IN + b"s.",
    "control characters": b"\x80\x04}" + text("model") + b"c\x1b]0;x\x07\x9b31m\nX\n" + b"s.",
    "a start beyond the storage": one_weight(start=1),
    "a size beyond the storage": one_weight((17,)),
    "a negative size": one_weight((-1,)),
    "a storage of more numbers": one_weight(storage=Stored(count=17)),
    "a storage that is missing": one_weight(storage=Stored(key="1\x1b[31m\nx")),
    "a storage outside": one_weight(storage=Stored(key="../data.pkl")),
    "two pickles": as_archive(b"}.", ("n/data.pkl", b"}.")),
    "an empty pickle": as_archive(b""),
}


def hostile_files(folder: Path) -> dict[str, bytes]:
    """Return the files above, and all calls in all packagings, by name. A call that is made leaves
    a file `ran`.
    """
    files = IMPOSSIBLE | ATTACKS
    for name, call in calls(folder).items():
        files |= {f"{name} {protocol}": pickle.dumps(call, protocol) for protocol in range(6)}
        files[f"{name} in a dict"] = pickle.dumps(
            {"weights": {"token_embedding_table.weight": call}}
        )
        archive = as_archive(as_pickle({"weights": {}, "vocabulary": call}))
        files[f"{name} in an archive"] = archive
        files[f"{name} in an archive in a pickle"] = pickle.dumps(
            Call(torch.storage._load_from_bytes, archive)
        )
        files[f"{name} in a storage"] = as_storage(pickle.dumps(call, 2))
    return files
