"""Model files as a stranger might send them: pickles that call something when they are read, and impossible ones."""

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

import numpy as np
import torch

# Calls ---------------------------------------------------------------------------------------------------------------


class Call:
    """Pickled, it is a call that is made when the pickle is read."""

    def __init__(self, function, *arguments):
        self.called = (function, arguments)

    def __reduce__(self):
        return self.called


def calls(folder: Path) -> dict[str, Call]:
    """Return calls that leave a file `ran` in the folder."""
    code = f"open({str(folder / 'ran')!r}, 'w').close()"
    (folder / "hubconf.py").write_text(f"def make():\n    {code}\n", encoding="utf-8")
    legacy = io.BytesIO()
    torch.save(Call(exec, code), legacy, _use_new_zipfile_serialization=False)
    np.save(folder / "objects.npy", np.array([Call(exec, code)], dtype=object), allow_pickle=True)
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
        "numpy.load": Call(np.load, str(folder / "objects.npy"), None, True),
        "partial": Call(functools.reduce, partial(exec), [code, {}]),
        "attrgetter": Call(map, Call(operator.attrgetter("touch"), folder / "ran"), [0o600]),
        "_reconstructor": Call(map, Call(getattr, Call(copyreg._reconstructor, Runner, object, None), "run"), [code]),
    }


class Runner:
    run = staticmethod(exec)


# Pickles written by hand ---------------------------------------------------------------------------------------------


def text(characters: str) -> bytes:
    """Return the instruction that puts a text on the stack."""
    data = characters.encode()
    return b"X" + struct.pack("<I", len(data)) + data


HEAD = b"c__main__\nHead\n"  # a class
STAND_IN = HEAD + b")\x81"  # an instance of it
LOADER = b"ctorch.storage\n_load_from_bytes\n"  # a function that may be called
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def build(target: bytes, name: str, value: bytes) -> bytes:
    """Return the instructions that set an attribute, in both of the ways that a pickle has for it."""
    attributes = b"}" + text(name) + value + b"s"
    return target + attributes + b"b" + b"N" + attributes + b"\x86b"


# Nothing of this may change what a later file is read with, or get at anything that runs code.
ATTACKS = {
    "a dotted name": b"\x80\x04" + text("__main__") + text("Head.__init__.__globals__") + b"\x93.",
    "a dotted name of a known function": b"\x80\x04"
    + text("torch.storage")
    + text("_load_from_bytes.__globals__")
    + b"\x93.",
    "a name in the globals of a known function": b"\x80\x04" + text("model") + text("load_with_torch") + b"\x93.",
    "a method of a harmless class": b"\x80\x04" + text("pathlib") + text("Path.unlink") + text("x") + b"\x85R.",
    "the state of a class": b"\x80\x04" + build(HEAD, "__setstate__", LOADER) + b".",
    "the methods of an instance": b"\x80\x04" + build(STAND_IN, "__setstate__", LOADER) + b"}b.",
    "the class of an instance": b"\x80\x04" + build(STAND_IN, "__class__", b"ccollections\nOrderedDict\n") + b".",
    "the attributes of a module": b"\x80\x04" + build(STAND_IN, "attributes", b"K\x01") + b".",
    "the defaults of a function": b"\x80\x04" + build(REBUILD, "__defaults__", b"K\x01\x85") + b".",
    "the code of a function": b"\x80\x04" + build(LOADER, "__code__", b"K\x01") + b".",
    "the methods of a dict": b"\x80\x04"
    + build(b"ccollections\nOrderedDict\n)R", "keys", LOADER)
    + text("weights")
    + b"Ns.",
    "a registered extension": b"\x80\x04\x82\x01.",
    "a persistent object": b"\x80\x04" + text("a") + b"Q.",
}


# Archives ------------------------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """Stands for a storage in a pickle of `torch.save`."""

    kind: type = torch.FloatStorage
    key: object = "0"
    count: object = 16


class ArchivePickler(pickle.Pickler):
    def persistent_id(self, item):
        return ("storage", item.kind, item.key, "cpu", item.count) if isinstance(item, Stored) else None


def as_pickle(content, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    ArchivePickler(file, protocol).dump(content)
    return file.getvalue()


def as_archive(pickled: bytes, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return what torch.save makes of a pickle; storage 0 has 16 float32."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        standard = (("m/data.pkl", pickled), ("m/version", b"3\n"), ("m/byteorder", b"little"), ("m/data/0", bytes(64)))
        for name, content in (*standard, *members):
            archive.writestr(name, content)
    return file.getvalue()


def as_storage(pickled: bytes) -> bytes:
    """Return a storage, as in a bare pickle, that holds this pickle where its type and size should be."""
    inner = b"".join(as_pickle(part) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    return as_pickle(Call(torch.storage._load_from_bytes, inner + pickled), 4)


def tensor(size=(16,), stride=(1,), start=0, storage=Stored()) -> Call:  # noqa: B008
    return Call(torch._utils._rebuild_tensor_v2, storage, start, size, stride, False, {})


def one_weight(*arguments, **options) -> bytes:
    return as_archive(as_pickle({"token_embedding_table.weight": tensor(*arguments, **options)}))


def module(parameters: bytes = b"}", modules: bytes = b"}") -> bytes:
    """Return the instructions that make a module of these."""
    return STAND_IN + b"}(" + text("_parameters") + parameters + text("_modules") + modules + b"ub"


LAYER, LAYER_END = module(modules=b"}" + text("a") + b"|s").split(b"|")
LAYERS_AND_HEADS = [f"blocks.{i}.a" for i in range(10**4)] + [f"blocks.0.sa.heads.{i}.a" for i in range(10**4)]
EMBEDDINGS = ["token_embedding_table.weight", "position_embedding_table.weight"]
IMPOSSIBLE = {
    "nothing to take": b"\x80\x04\x86.",
    "no mark": b"\x80\x04t.",
    "no end": b"\x80\x04}",
    "nothing remembered": b"\x80\x04h\x05.",
    "an unknown instruction": b"\x80\x04\xff.",
    "a list in itself": b"\x80\x04]q\x00h\x00a.",
    "a module in itself": b"\x80\x04" + STAND_IN + b"q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb.",
    "modules in modules": b"\x80\x04" + LAYER * 5000 + b"N" + LAYER_END * 5000 + b".",
    "a list as a key": b"\x80\x04}]K\x01s.",
    "a text longer than the file": b"\x80\x04X\xff\xff\xff\x7fa.",
    "a far place to remember": b"\x80\x04]r\xff\xff\xff\x7f.",
    "bytes of 2^50": b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"a.",
    "bytes of 2^63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"a.",
    "layers times heads": as_archive(as_pickle(dict.fromkeys(EMBEDDINGS + LAYERS_AND_HEADS, tensor((4, 4), (4, 1))))),
    "attributes without names": b"\x80\x04" + STAND_IN + b"]b.",
    "a module for a weight": b"\x80\x04}" + text(EMBEDDINGS[0]) + module() + b"s.",
    "a start beyond the storage": one_weight(start=1),
    "a negative start": one_weight(start=-1),
    "a size beyond the storage": one_weight((17,)),
    "a stride beyond the storage": one_weight((2,), (16,)),
    "a size of 2^40": one_weight((2**40,), (0,)),
    "a negative size": one_weight((-1,)),
    "a size of text": one_weight(("1",)),
    "a storage of more numbers": one_weight(storage=Stored(count=17)),
    "a storage of a wider type": one_weight(storage=Stored(torch.DoubleStorage)),
    "a storage of whole numbers": one_weight(storage=Stored(torch.LongStorage, count=8), size=(8,)),
    "a storage that is missing": one_weight(storage=Stored(key="1")),
    "a storage outside": one_weight(storage=Stored(key="../data.pkl")),
    "no storage": one_weight(storage=None),
    "an inner storage of 2^62": as_storage(
        as_pickle(Stored()) + as_pickle(["0"]) + struct.pack("<q", 2**62) + bytes(4)
    ),
    "an inner storage of nothing": as_storage(as_pickle(None)),
    "compressed": as_archive(b"}.", compression=zipfile.ZIP_DEFLATED),
    "a bomb": as_archive(b"}.", ("m/data/1", bytes(10**8)), compression=zipfile.ZIP_DEFLATED),
    "two pickles": as_archive(b"}.", ("n/data.pkl", b"}.")),
    "a name outside": as_archive(b"}.", ("../outside.txt", b"x")),
    "an empty pickle": as_archive(b""),
}


def hostile_files(folder: Path) -> dict[str, bytes]:
    """Return the files above, and all calls in all packagings, by name. A call that is made leaves a file `ran`."""
    files = IMPOSSIBLE | ATTACKS
    for name, call in calls(folder).items():
        files |= {f"{name} {protocol}": pickle.dumps(call, protocol) for protocol in range(6)}
        files[f"{name} in a dict"] = pickle.dumps({"weights": {"token_embedding_table.weight": call}})
        files[f"{name} in an archive"] = as_archive(as_pickle({"weights": {}, "vocabulary": call}))
        files[f"{name} in a storage"] = as_storage(pickle.dumps(call, 2))
    return files
