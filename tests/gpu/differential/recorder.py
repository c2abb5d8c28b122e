"""Calls of the CUDA driver through ctypes, each told as a line of JSON: what was asked, and what was answered.

What may differ between two runs although nothing is wrong is told by name: an address as the allocation that it lies in
and how far into it, a handle by the name of what it belongs to or by when it was first seen, an amount of free memory
as whether there is any. A line is written before each call, so that whoever reads them knows which call did not return.
"""

import ctypes
import json
import os
import time

MIB = 1 << 20
GRANULE = 2 * MIB
# What output places hold before a call: what a call has not written is seen.
POISON = 0xA5
PLACE = 256

RESULTS = {
    0: "SUCCESS",
    1: "INVALID_VALUE",
    2: "OUT_OF_MEMORY",
    3: "NOT_INITIALIZED",
    4: "DEINITIALIZED",
    34: "STUB_LIBRARY",
    100: "NO_DEVICE",
    101: "INVALID_DEVICE",
    200: "INVALID_IMAGE",
    201: "INVALID_CONTEXT",
    205: "MAP_FAILED",
    209: "NO_BINARY_FOR_GPU",
    215: "UNSUPPORTED_LIMIT",
    216: "CONTEXT_ALREADY_IN_USE",
    217: "PEER_ACCESS_UNSUPPORTED",
    218: "INVALID_PTX",
    300: "INVALID_SOURCE",
    301: "FILE_NOT_FOUND",
    304: "OPERATING_SYSTEM",
    400: "INVALID_HANDLE",
    401: "ILLEGAL_STATE",
    500: "NOT_FOUND",
    600: "NOT_READY",
    700: "ILLEGAL_ADDRESS",
    704: "PEER_ACCESS_ALREADY_ENABLED",
    705: "PEER_ACCESS_NOT_ENABLED",
    708: "PRIMARY_CONTEXT_ACTIVE",
    709: "CONTEXT_IS_DESTROYED",
    712: "HOST_MEMORY_ALREADY_REGISTERED",
    713: "HOST_MEMORY_NOT_REGISTERED",
    719: "LAUNCH_FAILED",
    800: "NOT_PERMITTED",
    801: "NOT_SUPPORTED",
    802: "SYSTEM_NOT_READY",
    900: "STREAM_CAPTURE_UNSUPPORTED",
    901: "STREAM_CAPTURE_INVALIDATED",
    906: "STREAM_CAPTURE_IMPLICIT",
    907: "CAPTURED_EVENT",
    908: "STREAM_CAPTURE_WRONG_THREAD",
    999: "UNKNOWN",
}


class Named(int):
    """An address or a handle, with the name that the report has for it."""

    def __new__(cls, value, label):
        made = super().__new__(cls, value)
        made.label = label
        return made

    def __add__(self, offset):
        sign = "+" if offset >= 0 else "-"
        return Named(int(self) + offset, f"{self.label}{sign}{size(abs(offset))}")

    def __sub__(self, offset):
        return self + -offset


def size(value):
    """A number of bytes, as short as it can be said exactly."""
    for unit, name in ((1 << 30, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if value >= unit and value % unit == 0:
            return f"{value // unit}{name}"
    return str(value)


class Out:
    """A place for an answer of so many bytes, of a kind that says how it is told. `name` is the name of what is made."""

    def __init__(self, kind, name=None, bytes_=None, extent=None):
        self.kind, self.name, self.extent = kind, name, extent
        self.place = (ctypes.c_ubyte * (bytes_ or PLACE))(*([POISON] * (bytes_ or PLACE)))

    def fresh(self):
        """Another place of the same sort."""
        return Out(self.kind, self.name, len(self.place), self.extent)

    @property
    def address(self):
        return ctypes.addressof(self.place)

    @property
    def data(self):
        return bytes(self.place)

    @property
    def width(self):
        """How many bytes were written: up to the last that is no longer as it was."""
        return len(self.data.rstrip(bytes([POISON])))

    @property
    def value(self):
        """The number there; 0 if nothing was written."""
        return int.from_bytes(self.data[: min(self.width, 8)], "little")


class In:
    """Bytes that the caller passes by address, and how they are told."""

    def __init__(self, data, label):
        self.place = ctypes.create_string_buffer(bytes(data), max(1, len(bytes(data))))
        self.label = label

    @property
    def address(self):
        return ctypes.addressof(self.place)


class Recorder:
    """The driver. `recorder.cuMemFree_v2(pointer)` makes the call and tells it."""

    def __init__(self, pause=0.0):
        self.library = ctypes.CDLL("libcuda.so.1")
        self.pause = pause
        # (name, first, size) of what was allocated, the newest last.
        self.ranges = []
        # The names of handles, a table for each kind.
        self.handles = {}
        self.say(simulated=hasattr(self.library, "nvsharesim_counters"))

    def say(self, **fields):
        os.write(1, (json.dumps(fields) + "\n").encode())

    # What is passed.

    def out(self, kind="raw", name=None, extent=None, bytes_=None):
        return Out(kind, name, bytes_, extent)

    def handle(self, kind, name):
        """A place for a handle that gets this name."""
        return Out("handle:" + kind, name)

    def adopt(self, kind, name, value):
        """A handle that is known from elsewhere."""
        self.handles.setdefault(kind, {})[value] = name
        return Named(value, name)

    def text(self, value):
        return In(value.encode() + b"\0", json.dumps(value))

    def words(self, *values, width=8):
        """An array of numbers, which may be places for answers."""
        numbers = [value.address if isinstance(value, (Out, In)) else int(value) for value in values]
        data = b"".join(number.to_bytes(width, "little", signed=number < 0) for number in numbers)
        return In(data, "[" + ", ".join(self.argument(value) for value in values) + "]")

    def argument(self, value):
        if value is None:
            return "null"
        if isinstance(value, Out):
            return "out"
        if isinstance(value, (In, Named)):
            return value.label
        if isinstance(value, ctypes.Structure):
            return getattr(value, "label", type(value).__name__)
        return size(value) if value >= 1 << 10 else str(value)

    @staticmethod
    def passed(value):
        if value is None:
            return ctypes.c_void_p(None)
        if isinstance(value, (Out, In)):
            return ctypes.c_void_p(value.address)
        if isinstance(value, ctypes.Structure):
            return value
        return ctypes.c_uint64(int(value) & (1 << 64) - 1)

    # Calls.

    def __getattr__(self, function):
        if not function.startswith(("cu", "cuda")):
            raise AttributeError(function)
        return lambda *arguments, **others: self.call(function, *arguments, **others)

    def call(self, function, *arguments, more=(), note="", library=None):
        """Makes a call; `more` are places that it writes to through an array. Returns the result's number."""
        told = f"{function}({', '.join(map(self.argument, arguments))})" + (f" {note}" if note else "")
        if self.pause:
            time.sleep(self.pause)
        self.say(call=told)
        try:
            entry = getattr(library or self.library, function)
        except AttributeError:
            self.say(result="missing", outputs=[])
            return 500
        entry.restype = ctypes.c_int
        code = entry(*map(self.passed, arguments))
        places = [argument for argument in arguments if isinstance(argument, Out)] + list(more)
        if code == 0:
            for place in places:
                self.learn(place)
        self.say(result=RESULTS.get(code, str(code)), outputs=[self.told(place) for place in places])
        return code

    def each_null(self, function, *arguments, **others):
        """The call with all of its places for answers, with each of them null, and with none."""
        at = [index for index, argument in enumerate(arguments) if isinstance(argument, Out)]
        left_out = [set(), *({index} for index in at), *([set(at)] if len(at) > 1 else [])]
        for missing in left_out:
            passed = [
                None if index in missing else argument.fresh() if isinstance(argument, Out) else argument
                for index, argument in enumerate(arguments)
            ]
            self.call(function, *passed, **others)

    # What is answered.

    def learn(self, place):
        """Something was made: from now on its address or handle has a name."""
        if place.name is None or not place.width:
            return
        if place.kind in ("address", "host"):
            self.ranges.append((place.name, place.value, place.extent or 1))
        elif place.kind.startswith("handle:"):
            self.adopt(place.kind.partition(":")[2], place.name, place.value)

    def forget(self, name):
        """What had this name is freed: another allocation may be there."""
        self.ranges = [known for known in self.ranges if known[0] != name]

    def address_told(self, value):
        if value == 0:
            return "0"
        for name, first, extent in reversed(self.ranges):
            if first <= value < first + extent:
                return name + (f"+{size(value - first)}" if value > first else "")
        for name, first, extent in reversed(self.ranges):
            if value == first + extent:
                return f"the end of {name}"
            if 0 < first - value < GRANULE:
                return f"before {name}, in its granule"
        return "elsewhere"

    def handle_told(self, kind, value):
        if value == 0:
            return "0"
        known = self.handles.setdefault(kind, {})
        return known.setdefault(value, f"{kind}#{len(known) + 1}")

    def told(self, place):
        """What is in a place after a call."""
        if not place.width:
            return "-"
        kind = place.kind
        if kind in ("address", "host"):
            return self.address_told(place.value)
        if kind.startswith("handle:"):
            return self.handle_told(kind.partition(":")[2], place.value)
        if kind == "amount":
            return "some" if place.value else "0"
        if kind == "opaque":
            return "written"
        if kind == "int":
            return str(int.from_bytes(place.data[:4], "little", signed=True))
        if kind == "text":
            return place.data.split(b"\0")[0].decode(errors="replace")
        if kind == "chars":
            pointer = ctypes.c_char_p(place.value).value
            return "null" if pointer is None else pointer.decode(errors="replace")
        if kind == "runtime attributes":
            # cudaPointerAttributes: type, device, and the pointers on the device and the host.
            kind_and_device = [int.from_bytes(place.data[at : at + 4], "little", signed=True) for at in (0, 4)]
            pointers = [self.address_told(int.from_bytes(place.data[at : at + 8], "little")) for at in (8, 16)]
            return "type {} device {}: {}, {}".format(*kind_and_device, *pointers)
        if place.width > 8:
            data = place.data[: -(-place.width // 4) * 4]
            return " ".join(f"{int.from_bytes(data[at : at + 4], 'little'):x}" for at in range(0, len(data), 4))
        return f"{place.value}" + (f" in {place.width} bytes" if kind == "raw" else "")

    # What most sequences begin with.

    def primary(self):
        """The primary context of GPU 0, current."""
        self.cuInit(0)
        context = self.out("handle:context", "primary")
        self.cuDevicePrimaryCtxRetain(context, 0)
        self.cuCtxSetCurrent(Named(context.value, "primary"))
        return Named(context.value, "primary")

    def allocate(self, name, bytes_, function="cuMemAlloc_v2", *more):
        """An allocation by this name."""
        place = self.out("address", name, extent=bytes_)
        self.call(function, place, bytes_, *more)
        return Named(place.value, name)

    def free(self, pointer, function="cuMemFree_v2", *more):
        self.call(function, pointer, *more)
        self.forget(pointer.label)
