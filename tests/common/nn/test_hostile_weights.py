"""Weight files made to do harm: refused in one line, without running, crashing or filling memory.

Each is read in a process of its own, with 1 GiB to spare, so that a crash is a failed test.
"""

import io
import json
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np

from tests.common.nn.test_weights import ORDERED_DICT, dump, name_of, pickled, tensor, torch_file

READ = """
import json, resource, sys
from common.io.errors import UserError
from common.nn.weights.backbone_weights import read_state_dict
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for path in sys.argv[1:]:
    try:
        print(json.dumps([path, sorted(read_state_dict(path))]), flush=True)
    except UserError as error:
        print(json.dumps([path, str(error)]), flush=True)
"""


def read_all(paths):
    """What reading each file gave: names of tensors, or an error of one line."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    results = dict(map(json.loads, done.stdout.splitlines()))
    assert done.returncode == 0, f"after {len(results)} of {len(paths)}: {done.stderr[-800:]}"
    return [results[str(path)] for path in paths]


def zipped(data_pkl, members=(), **options):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, content in members:
            archive.writestr(f"archive/data/{name}", content)
    return stream.getvalue()


def numpy_type(code, state):
    made = name_of("numpy", "dtype") + dump((code, False, True)) + b"R"
    return made + dump(state) + b"b"


def numpy_array(dtype, shape, data):
    rebuild = name_of("numpy._core.multiarray", "_reconstruct")
    kind = name_of("numpy", "ndarray")
    made = rebuild + dump((kind, (0,), b"C\x01b")) + b"R"
    content = b"B" + struct.pack("<I", len(data)) + data
    return made + dump((1, shape, dtype, False, content)) + b"b"


PLAIN = (3, "<", b"N", b"N", b"N", -1, -1, 0)
FLOAT = numpy_type("f4", PLAIN)
# A state that makes a type of bytes one of objects: the bytes would be taken for pointers.
OBJECTS = numpy_type("u8", (3, "|", b"N", b"N", b"N", -1, -1, 63))
ONE = np.ones(1, np.float32)


def laughs(opening, closing):
    """A container of two references to one of two references to ... (2^60 elements)."""
    text = b"K\x01q\x000"
    for level in range(60):
        refer = bytes([ord("h"), level])
        text += opening + refer + refer + closing + bytes([ord("q"), level + 1]) + b"0"
    return text + b"h" + bytes([60])


CRAFTED = {
    "object pointers": (numpy_array(OBJECTS, (1,), b"A" * 8), "state of a NumPy type"),
    "object type": (numpy_array(numpy_type("O8", PLAIN), (1,), b"A" * 8), "refused the NumPy type"),
    "record type": (numpy_type("V8", PLAIN), "refused the NumPy type"),
    "constructor": (name_of("numpy", "ndarray") + dump(((9,),)) + b"R", "found a call of object"),
    "array without its bytes": (numpy_array(FLOAT, (1 << 40,), b"1234"), "found 4 bytes, expected"),
    "state of a dictionary's type": (ORDERED_DICT + dump((1, 2)) + b"b", "refused to set"),
    "new object": (name_of("collections", "OrderedDict") + b")\x81", "refused the pickle instr"),
    "memo of 2^31": (b"N" + b"r" + struct.pack("<I", 1 << 31), "expected a state dict"),
    "text of 2^32": (b"\x8d" + struct.pack("<Q", 1 << 32) + b"abc", "no readable torch checkpoint"),
    "lists of lists": (laughs(b"](", b"e"), "expected a state dict"),
    "keys of tuples": (b"}(" + laughs(b"(", b"t") + b"Nu", "found a key of type tuple"),
    "depth": (b"]" * 200_000 + b"a" * 199_999, "no readable torch checkpoint"),
    "integer of a megabyte": (b"\x8b" + struct.pack("<i", 1 << 20) + b"\x01" * (1 << 20), "bits"),
    "negative shape": (tensor("0", ONE, (0, (1,)), False, (-5,)), "expected a size"),
    "repeats one value": (tensor("0", ONE, (0, (0,)), False, (1 << 40,)), "repeats a storage"),
}


def test_crafted_pickles_are_refused_in_one_line(tmp_path):
    paths = []
    for number, (value, _) in enumerate(CRAFTED.values()):
        paths.append(tmp_path / f"{number}.pth")
        paths[-1].write_bytes(zipped(pickled({"weight": value}), [("0", ONE.tobytes())]))
    started = time.monotonic()
    for (case, (_, message)), result in zip(CRAFTED.items(), read_all(paths), strict=True):
        assert isinstance(result, str) and message in result and "\n" not in result, (case, result)
    assert time.monotonic() - started < 60


def test_arrays_and_scalars_of_numpy_are_read(tmp_path):
    scalar = name_of("numpy.core.multiarray", "scalar") + dump((FLOAT, b"C\x04" + ONE.tobytes()))
    metadata = ORDERED_DICT + dump({"_metadata": {}}) + b"b"
    content = {
        "state_dict": {"bias": numpy_array(FLOAT, (1,), ONE.tobytes())},
        "best": scalar + b"R",
        "extra": metadata,
    }
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(pickled(content)))
    assert read_all([path]) == [["bias"]]


def damaged_zips():
    good = torch_file({"a": np.arange(64, dtype=np.float32)}, legacy=False)
    name = good.index(b"archive/data/0")  # of the local header of the storage
    central = good.rindex(b"archive/data/0") - 46
    encrypted = bytearray(good)
    encrypted[name - 30 + 6] |= 1
    encrypted[central + 8] |= 1
    unknown = bytearray(good)
    unknown[name - 30 + 8] = unknown[central + 10] = 77
    changed = bytearray(good)
    changed[name + len("archive/data/0") + 5] ^= 1
    wrong_size = bytearray(good)
    wrong_size[central + 24 : central + 28] = struct.pack("<I", 1 << 31)
    zeros = np.zeros(1 << 28, np.uint8)
    value = tensor("0", zeros.view(np.float32), (0, (1,)), False)
    bomb = zipped(pickled({"a": value}), [("0", zeros)], compression=zipfile.ZIP_DEFLATED)
    return {
        "encrypted": (encrypted, "unreadable member"),
        "method": (unknown, "unreadable member"),
        "checksum": (changed, "unreadable member"),
        "size": (wrong_size, ""),
        "bomb": (bomb, "in a zip file of"),
    }


def test_damaged_zip_files_are_told_in_one_line(tmp_path):
    paths, messages = [], []
    for case, (data, message) in damaged_zips().items():
        for suffix in (".pth", ".whl"):
            paths.append(tmp_path / f"{case}{suffix}")
            renamed = bytes(data).replace(b"archive/data/0", b"archive/aa.pth")
            paths[-1].write_bytes(data if suffix == ".pth" else renamed)
            messages.append(message)
    for path, message, result in zip(paths, messages, read_all(paths), strict=True):
        assert isinstance(result, str) and message in result and "\n" not in result, (path, result)
