"""What the programs of the matrix share.

Each does its work again and again for `--seconds`, from the same start, and every round must give the same digest;
so the digest that it reports does not depend on how often it came round, and can be compared between runs. Its last
line on the standard output is one JSON object: {"ok", "digest", "framework", "figures"}, or {"ok", "skip": why}.

Beside its own memory each holds a `Ballast`: plain memory that nvshare can always move, so that switches are forced
in programs whose own memory is pinned too, and data that nobody but the driver knows of is checked as well.
"""

import argparse
import ctypes
import hashlib
import json
import os
import pathlib
import sys
import time

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "simcuda" / "kernels.ptx"
MIB = 1 << 20
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def parse(description, add=lambda parser: None):
    """The command line: --seconds and what `add` adds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="how long to go on (default 8)")
    add(parser)
    return parser.parse_args()


def digest(*parts):
    """SHA-256 of bytes, of what has a buffer, and of the text of anything else."""
    hashed = hashlib.sha256()
    for part in parts:
        try:
            data = memoryview(part).cast("B")
        except TypeError:
            data = str(part).encode()
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()


def same_each_time(seconds, work, at_least=2, agree=bool):
    """Does `work` for so many seconds. Its digest must be the same each time. Returns it and the rounds. Processes
    that must go on together settle it in `agree`."""
    first, rounds, until = None, 0, time.monotonic() + seconds
    while agree(rounds < at_least or time.monotonic() < until):
        found = work()
        if first is None:
            first = found
        check(found == first, f"round {rounds} gave {found}, and the first one {first}")
        rounds += 1
    return first, rounds


def check(right, what):
    """Ends the program with the reason unless it is so. (An assert would go with -O.)"""
    if not right:
        raise AssertionError(what)


def report(framework, digest, rounds, **figures):
    """Says that all went well."""
    result = {"ok": True, "digest": digest, "framework": framework, "figures": {"rounds": rounds, **figures}}
    print(json.dumps(result), flush=True)


def skip(why):
    """Ends the program because something is not there to be tested."""
    print(json.dumps({"ok": False, "digest": "", "skip": why, "figures": {}}), flush=True)
    sys.exit(0)


def torch_that_repeats():
    """PyTorch, set up so that the same program gives the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    # Only a warning where there is no such algorithm: rounds that differ are seen anyway.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # As programs are run: what is allocated holds what it held.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # The backward passes of the fused kernels add in any order.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)
    return torch


def bits(tensor):
    """The bytes of a PyTorch tensor of any type."""
    torch = sys.modules["torch"]
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()


class Driver:
    """The driver's API by ctypes, as a program without a framework would use it; one primary context."""

    def __init__(self, device=0):
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        self.device = device
        self.context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self.functions = {}
        with self:
            self.module = ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(self.module), ctypes.c_char_p(KERNELS.read_bytes()))
            self.stream = ctypes.c_void_p()
            self.call("cuStreamCreate", ctypes.byref(self.stream), 1)

    def __enter__(self):
        """Its context is the thread's current one for a while: a framework may have another."""
        self.call("cuCtxPushCurrent_v2", self.context)
        return self

    def __exit__(self, *_):
        self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def call(self, name, *arguments, allowed=(0,)):
        """Calls a function; an error that is not allowed has its name and number."""
        status = getattr(self.library, name)(*arguments)
        check(status in allowed, f"{name} said {status}")
        return status

    def memory(self):
        """Bytes that are free, and all."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def alloc(self, size):
        """Bytes on the GPU."""
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def free(self, pointer):
        self.call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def launch(self, name, *arguments):
        """Starts one of our kernels: all of their arguments are 64 bits wide."""
        if name not in self.functions:
            function = ctypes.c_void_p()
            self.call("cuModuleGetFunction", ctypes.byref(function), self.module, name.encode())
            self.functions[name] = function
        values = [ctypes.c_uint64(value & WORD) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.call("cuLaunchKernel", self.functions[name], 1024, 1, 1, 256, 1, 1, 0, self.stream, pointers, None)

    def synchronize(self):
        self.call("cuStreamSynchronize", self.stream)

    def read_words(self, pointer, count=1):
        words = (ctypes.c_uint64 * count)()
        self.call("cuMemcpyDtoHAsync_v2", words, ctypes.c_uint64(pointer), ctypes.c_size_t(8 * count), self.stream)
        self.synchronize()
        return list(words)

    def checksum(self, out, pointer, words):
        """The checksum of words, by the GPU; `out` has room for one."""
        self.call("cuMemsetD32Async", ctypes.c_uint64(out), 0, ctypes.c_size_t(2), self.stream)
        self.launch("nvshare_checksum_u64", out, pointer, words)
        return self.read_words(out)[0]


def iota_checksum(words, seed):
    """The checksum of `nvshare_iota_u64`, in closed form: the sum of (seed + i) * GOLDEN * (2 i + 1)."""
    squares = words * (words - 1) * (2 * words - 1) // 6
    linear = words * (words - 1) // 2
    return (2 * squares + (2 * seed + 1) * linear + seed * words) * GOLDEN & WORD


class Ballast:
    """Plain memory of the driver's that must keep what was written into it from one turn to the next."""

    def __init__(self, mib=512, device=0, driver=None):
        self.driver = driver or Driver(device)
        self.words, self.seed = mib * MIB // 8, 1
        with self.driver:
            self.pointer, self.out = self.driver.alloc(8 * self.words), self.driver.alloc(8)
            self.write()

    def write(self):
        self.driver.launch("nvshare_iota_u64", self.pointer, self.words, self.seed)
        self.driver.synchronize()

    def turn(self):
        """Checks every word, then writes others."""
        with self.driver:
            found = self.driver.checksum(self.out, self.pointer, self.words)
            expected = iota_checksum(self.words, self.seed)
            check(found == expected, f"the ballast's checksum is {found:x}, not {expected:x}, in turn {self.seed}")
            self.seed += 1
            self.write()
