"""Model files as a stranger might send them: pickles that call something when they are read, and absurd ones."""

import io
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
    """Calls that leave a file `ran` in the folder."""
    code = f"open({str(folder / 'ran')!r}, 'w').close()"
    (folder / "hubconf.py").write_text(f"def make():\n    {code}\n", encoding="utf-8")
    legacy = io.BytesIO()
    torch.save(Call(exec, code), legacy, _use_new_zipfile_serialization=False)
    np.save(folder / "objects.npy", np.array([Call(exec, code)], dtype=object), allow_pickle=True)
    script = [sys.executable, "-c", code]
    return {
        "os.system": Call(os.system, subprocess.list2cmdline(script)),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "getattr": Call(map, Call(getattr, folder / "ran", "touch"), [0o600]),
        "Popen": Call(subprocess.Popen, script),
        "_load_from_bytes": Call(torch.storage._load_from_bytes, legacy.getvalue()),
        "torch.hub.load": Call(partial(torch.hub.load, source="local"), str(folder), "make"),
        "numpy.load": Call(np.load, str(folder / "objects.npy"), None, True),
    }


# Packagings ----------------------------------------------------------------------------------------------------------


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
    """What torch.save makes of a pickle; storage 0 has 16 float32."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in (("m/data.pkl", pickled), ("m/data/0", bytes(64)), *members):
            archive.writestr(name, content)
    return file.getvalue()


def as_storage(pickled: bytes) -> bytes:
    """A storage that holds this pickle where its type and size should be."""
    inner = b"".join(as_pickle(part) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    return as_pickle(Call(torch.storage._load_from_bytes, inner + pickled), 4)


def tensor(size=(16,), stride=(1,), start=0, storage=Stored()) -> Call:  # noqa: B008
    return Call(torch._utils._rebuild_tensor_v2, storage, start, size, stride, False, {})


def one_weight(*arguments, **options) -> bytes:
    return as_archive(as_pickle({"lm_head.bias": tensor(*arguments, **options)}))


def text(characters: str) -> bytes:
    data = characters.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def module(parameters: bytes = b"}", modules: bytes = b"}") -> bytes:
    """The instructions that make a module of these."""
    return HEAD + b"}(" + text("_parameters") + parameters + text("_modules") + modules + b"ub"


def storage(described: object, count: int, numbers: bytes) -> bytes:
    return as_storage(as_pickle(described) + as_pickle(["0"]) + struct.pack("<q", count) + numbers)


# Absurd pickles ------------------------------------------------------------------------------------------------------

HEAD = b"c__main__\nHead\n)\x81"
DEEP = b")" + b"\x85" * 60000  # nested tuples, on which hash() crashes
WIDE = b")q\x00" + b"".join(b"(h%ch%ctq%c" % (i, i, i + 1) for i in range(200))  # 2^200 items
LAYER, LAYER_END = module(modules=b"}" + text("a") + b"|s").split(b"|")
MANY_WEIGHTS = b"}(" + b"".join(text(str(i)) + b"K\x01" for i in range(20000)) + b"u"
SAME_HASH = [i * (2**61 - 1) for i in range(1, 30000)]
FLAT = tensor((4, 4), (4, 1))
LAYERS_AND_HEADS = [f"blocks.{i}.a" for i in range(10**4)] + [f"blocks.0.sa.heads.{i}.a" for i in range(10**4)]
EMBEDDINGS = ["token_embedding_table.weight", "position_embedding_table.weight"]
ABSURD = {
    "nothing to take": b"\x80\x02\x86.",
    "no mark": b"\x80\x02t.",
    "a mark that is gone": b"\x80\x02]K\x01(0000e.",
    "no end": b"\x80\x02}",
    "nothing remembered": b"\x80\x02h\x05.",
    "an unknown instruction": b"\x80\x02\xff.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a module in itself": b"\x80\x02" + HEAD + b"q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb.",
    "wide": b"\x80\x02" + WIDE + b".",
    "wide as a key": b"\x80\x02}" + WIDE + b"K\x01s.",
    "wide by doubling": b"\x80\x02)" + b"2\x86" * 200 + b".",
    "deep as a key": b"\x80\x02}" + DEEP + b"K\x01s.",
    "deep in a set": b"\x80\x02c__builtin__\nset\n]" + DEEP + b"a\x85R.",
    "deep as a name": b"\x80\x04" + DEEP + text("a") + b"\x93.",
    "deep as an attribute": b"\x80\x02" + HEAD + b"]" + DEEP + b"K\x01\x86ab.",
    "deep as a storage's key": as_archive(b"\x80\x02(" + text("storage") + b"N" + DEEP + b"NK\x10tQ."),
    "deep as a vocabulary": as_archive(b"\x80\x02}(" + text("weights") + b"}" + text("vocabulary") + DEEP + b"u."),
    "deep lists": b"\x80\x02" + b"]" * 30000 + b"a" * 29999 + b".",
    "deep modules": b"\x80\x02" + LAYER * 5000 + b"N" + LAYER_END * 5000 + b".",
    "a long name before many": b"\x80\x02"
    + module(modules=b"}" + text("a" * 10**5) + module(MANY_WEIGHTS) + b"s")
    + b".",
    "a long text many times": text("a" * 10**5) + b"q\x00(" + b"c_codecs\nencode\nh\x00N\x86R" * 10**5 + b"l.",
    "a list as a key": b"\x80\x02}]K\x01s.",
    "a set of lists": b"\x80\x04\x8f(]]\x90.",
    "keys of the same hash": b"}(" + b"".join(b"L%dL\nN" % i for i in SAME_HASH) + b"u.",
    "places of the same hash": b"]" + b"".join(b"p%d\n" % i for i in SAME_HASH) + b".",
    "a far place": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a text of 2^60": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a.",
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "bytes of 2^63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"a.",
    "a number of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "a number of -1 bytes": b"\x80\x02\x8b\xff\xff\xff\xff\x01.",
    "a number of 10^6 digits": b"L" + b"9" * 10**6 + b"L\n.",
    "a number of 10^6 bytes": as_pickle({"weights": {}, "config": {"n_embd": 2 ** (8 * 10**6)}}),
    "layers times heads": as_archive(as_pickle(dict.fromkeys(EMBEDDINGS + LAYERS_AND_HEADS, FLAT))),
    "attributes without names": b"\x80\x02" + HEAD + b"]b.",
    "a module for a weight": b"\x80\x02}" + text("a") + module() + b"s.",
    "a start beyond the storage": one_weight(start=1),
    "a negative start": one_weight(start=-1),
    "a start of 2^70": one_weight(start=2**70),
    "a size beyond the storage": one_weight((17,)),
    "a stride beyond the storage": one_weight((2,), (16,)),
    "a size of 2^40": one_weight((2**40,), (0,)),
    "a size of 2^64": one_weight((2**32, 2**32), (0, 0)),
    "a size of 2^80": one_weight((2**40, 2**40), (0, 0)),
    "a negative size": one_weight((-1,)),
    "another order": one_weight((4, 4), (1, 4)),
    "a size of text": one_weight(("1",)),
    "a negative stride": one_weight((2,), (-1,), 2),
    "a stride of 2^62": one_weight((2,), (2**62,)),
    "a storage of more numbers": one_weight(storage=Stored(count=17)),
    "a storage of a wider type": one_weight(storage=Stored(torch.DoubleStorage)),
    "a storage that is missing": one_weight(storage=Stored(key="1")),
    "a storage outside": one_weight(storage=Stored(key="../data.pkl")),
    "a storage without a key": one_weight(storage=Stored(key=0)),
    "no storage": one_weight(storage=None),
    "an inner storage cut short": storage(Stored(), 2, bytes(4)),
    "an inner storage of 2^62": storage(Stored(), 2**62, bytes(4)),
    "an inner storage of nothing": storage(None, 1, bytes(4)),
    "compressed": as_archive(b"}.", compression=zipfile.ZIP_DEFLATED),
    "a bomb": as_archive(b"}.", ("m/data/1", bytes(10**8)), compression=zipfile.ZIP_DEFLATED),
    "two pickles": as_archive(b"}.", ("n/data.pkl", b"}.")),
    "a name twice": as_archive(b"}.", ("m/data/1", b"more")).replace(b"m/data/1", b"m/data/0"),
    "a name outside": as_archive(b"}.", ("../outside.txt", b"x")),
    "an empty pickle": as_archive(b""),
}


def deep_storages() -> bytes:
    pickled = as_pickle(None)
    for _ in range(2000):
        pickled = as_storage(pickled)
    return pickled


def hostile_files(folder: Path) -> dict[str, bytes]:
    """The absurd files, and all calls in all packagings, by name. A call that is made leaves a file in the folder."""
    files = ABSURD | {"deep storages": deep_storages()}
    for name, call in calls(folder).items():
        files |= {f"{name} {protocol}": pickle.dumps(call, protocol) for protocol in range(6)}
        files[f"{name} in a dict"] = pickle.dumps({"weights": {"lm_head.bias": call}})
        files[f"{name} in an archive"] = as_archive(as_pickle({"weights": {}, "vocabulary": call}))
        files[f"{name} in a storage"] = as_storage(pickle.dumps(call, 2))
    return files
