"""Says what the driver and NVML tell about memory, as programs in Python ask them: ctypes, and so dlopen and dlsym.

A line on the standard input is a step; a line on the standard output has what each of them says then. Knows nothing
of nvshare."""

import ctypes
import os
import sys

nvml = ctypes.CDLL("libnvidia-ml.so.1")
cuda = ctypes.CDLL("libcuda.so.1")


class Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class MemoryV2(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint)] + [
        (name, ctypes.c_ulonglong) for name in ("total", "reserved", "free", "used")
    ]


def call(function, *arguments):
    code = function(*arguments)
    assert code == 0, (function.__name__, code)


def from_nvml():
    handle, first = ctypes.c_void_p(), Memory()
    second = MemoryV2(version=ctypes.sizeof(MemoryV2) | 2 << 24)
    call(nvml.nvmlDeviceGetHandleByIndex_v2, 0, ctypes.byref(handle))
    call(nvml.nvmlDeviceGetMemoryInfo, handle, ctypes.byref(first))
    call(nvml.nvmlDeviceGetMemoryInfo_v2, handle, ctypes.byref(second))
    return [first.total, first.free, first.used, second.total, second.reserved, second.free, second.used]


def from_a_child():
    """NVML again, in a child of fork that goes on with what its parent has."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, repr(from_nvml()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child died"
    return [int(word) for word in said.strip("[]").split(",")]


def driver_function(name, version):
    """As the CUDA runtime finds it."""
    found, status = ctypes.c_void_p(), ctypes.c_int()
    call(
        cuda.cuGetProcAddress_v2, name, ctypes.byref(found), version, ctypes.c_ulonglong(0), ctypes.byref(status)
    )
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(found.value)


def from_driver():
    found, total, old = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_uint()
    call(cuda.cuDeviceTotalMem_v2, ctypes.byref(total), 0)
    call(driver_function(b"cuDeviceTotalMem", 13000), ctypes.addressof(found), 0)
    call(driver_function(b"cuDeviceTotalMem", 3000), ctypes.addressof(old), 0)
    return [total.value, found.value, old.value]


def info():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call(cuda.cuMemGetInfo_v2, ctypes.byref(free), ctypes.byref(total))
    return [free.value, total.value]


def main():
    call(nvml.nvmlInit_v2)
    context, pointer = ctypes.c_void_p(), ctypes.c_uint64()
    for step in sys.stdin:
        name, *words = step.split()
        if name == "nvml":
            said = from_nvml()
        elif name == "child":
            said = from_a_child()
        elif name == "init":
            call(cuda.cuInit, 0)
            said = []
        elif name == "driver":
            said = from_driver()
        elif name == "create":
            call(cuda.cuCtxCreate_v2, ctypes.byref(context), 0, 0)
            said = []
        elif name == "alloc":
            call(cuda.cuMemAlloc_v2, ctypes.byref(pointer), ctypes.c_size_t(int(words[0])))
            said = []
        elif name == "free":
            call(cuda.cuMemFree_v2, pointer)
            said = []
        elif name == "info":
            said = info()
        print("0", " ".join(map(str, said)), flush=True)


if __name__ == "__main__":
    main()
