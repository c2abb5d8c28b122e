"""What cudaMalloc and cudaFree cost under nvshare, against without it.

    python3 tests/gpu/alloc_cost.py --bin target/release [--calls] [--simulated]

The same program (this file, `--measure`) runs natively and under nvshare, in turn, so that both see the same machine; medians
and their ratio, in microseconds. For each size:

    again   cuMemAlloc and cuMemFree of the same size, again and again: one pair
    fresh   cuMemAlloc of sizes that were never freed before: the allocation alone, and then its cuMemFree
    held    as `again`, with an allocation of the same size held all the time
    used    as `again`, with a memset of the whole and a synchronisation in between (not counted)
    mixed   as `again`, with an allocation and a free of each of the other sizes before each pair (not counted)

With --calls, also what the driver's calls for mapped memory cost for each size of chunk, natively: create, map, access for each
chunk and in one call over all, unmap for each chunk and in one call over all (or what the driver says to that), release; and a
release whose memory is created again at once. The wanted bounds: 64 MiB at most 1.2 x, 4 GiB at most 1.5 x.
"""

import argparse
import contextlib
import ctypes
import json
import pathlib
import statistics
import subprocess
import sys
import time

import harness
from harness import GIB, MIB

WANTED = {64 * MIB: 1.2, 4 * GIB: 1.5}
SIZES = (2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB, 4 * GIB)
ROUNDS = 30


class Cuda:
    """The driver's calls, each of which must come off."""

    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)
        self.context = ctypes.c_void_p()
        self("cuCtxCreate_v2", ctypes.byref(self.context), 0, 0)

    def __call__(self, name, *arguments):
        result = self.call(name, *arguments)
        if result:
            raise RuntimeError(f"{name} said {result}")

    def call(self, name, *arguments):
        return getattr(self.library, name)(*arguments)

    def alloc(self, size):
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address

    def free(self, address):
        self("cuMemFree_v2", address)


class Timer:
    def __init__(self):
        self.times = []

    @contextlib.contextmanager
    def __call__(self):
        began = time.perf_counter_ns()
        yield
        self.times.append((time.perf_counter_ns() - began) / 1e3)

    def median(self):
        return statistics.median(self.times)


def pairs(cuda, size, between=lambda address: None, others=()):
    """A median pair, after three that do not count. Before each, one of each of the other sizes is allocated and freed."""
    alloc, free = Timer(), Timer()
    for _ in range(ROUNDS + 3):
        for other in others:
            cuda.free(cuda.alloc(other))
        with alloc():
            address = cuda.alloc(size)
        between(address)
        with free():
            cuda.free(address)
    both = [a + f for a, f in zip(alloc.times[3:], free.times[3:])]
    return statistics.median(both)


def fresh(cuda, size):
    """Allocations of a size each that nobody had before, freed after all are there."""
    total = ctypes.c_size_t()
    left = ctypes.c_size_t()
    cuda("cuMemGetInfo_v2", ctypes.byref(left), ctypes.byref(total))
    count = max(1, min(10, int(left.value * 0.6 // size)))
    alloc, free, addresses = Timer(), Timer(), []
    for index in range(count):
        with alloc():
            addresses.append(cuda.alloc(size + index * 2 * MIB))
    for address in addresses:
        with free():
            cuda.free(address)
    # What was kept for a moment is gone when the next size begins.
    time.sleep(1.5)
    return alloc.median(), free.median()


def measure(sizes):
    cuda = Cuda()

    def use(address, size):
        cuda("cuMemsetD8_v2", address, ctypes.c_ubyte(1), ctypes.c_size_t(size))
        cuda("cuCtxSynchronize")

    # What a client allocates that has not run is only mapped when it does.
    use(cuda.alloc(2 * MIB), 2 * MIB)
    for size in sizes:
        alloc, free = fresh(cuda, size)
        again = pairs(cuda, size)
        used = pairs(cuda, size, lambda address: use(address, size))
        held = cuda.alloc(size)
        beside = pairs(cuda, size)
        cuda.free(held)
        several = pairs(cuda, size, others=[other for other in sizes if other != size])
        figures = {"again": again, "held": beside, "used": used, "mixed": several, "fresh alloc": alloc, "fresh free": free}
        print(json.dumps({"size": size, "us": figures}), flush=True)


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Prop(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class Access(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


def measure_calls(whole):
    """The driver's calls for `whole` bytes in chunks, microseconds for all of it."""
    cuda = Cuda()
    device = Location(1, 0)
    size = ctypes.c_size_t
    for exportable in (0, 1):
        prop = Prop(1, exportable, device)
        access = Access(device, 3)
        for chunk in (2 * MIB, 32 * MIB, 64 * MIB, 256 * MIB, GIB, whole):
            if chunk > whole:
                continue
            count, times = whole // chunk, {}

            def timed(name, act):
                times.setdefault(name, Timer())
                with times[name]():
                    act()

            for _ in range(7):
                base = ctypes.c_uint64()
                timed("reserve", lambda: cuda("cuMemAddressReserve", ctypes.byref(base), size(whole), size(2 * MIB), ctypes.c_uint64(0), ctypes.c_uint64(0)))
                handles = [ctypes.c_uint64() for _ in range(count)]
                at = [ctypes.c_uint64(base.value + index * chunk) for index in range(count)]

                def create():
                    for handle in handles:
                        cuda("cuMemCreate", ctypes.byref(handle), size(chunk), ctypes.byref(prop), ctypes.c_uint64(0))

                def each(name, *rest):
                    for address in at:
                        cuda(name, address, size(chunk), *rest)

                def map_all():
                    for address, handle in zip(at, handles):
                        cuda("cuMemMap", address, size(chunk), size(0), handle, ctypes.c_uint64(0))

                def release():
                    for handle in handles:
                        cuda("cuMemRelease", handle)

                one = (ctypes.byref(access), size(1))
                timed("create", create)
                timed("map", map_all)
                timed("access each", lambda: each("cuMemSetAccess", *one))
                timed("unmap each", lambda: each("cuMemUnmap"))
                timed("map again", map_all)
                timed("access in one", lambda: cuda("cuMemSetAccess", base, size(whole), *one))
                said = []
                timed("unmap in one", lambda: said.append(cuda.call("cuMemUnmap", base, size(whole))))
                if said[0]:
                    each("cuMemUnmap")
                timed("release", release)
                timed("create after release", create)
                timed("release again", release)
                timed("free addresses", lambda: cuda("cuMemAddressFree", base, size(whole)))
            medians = {name: round(timer.median(), 1) for name, timer in times.items()}
            print(json.dumps({"whole": whole, "chunk": chunk, "exportable": bool(exportable), "unmap in one said": said[0], "us": medians}), flush=True)


def objects(output):
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def ask(arguments, environment=None, before=()):
    command = [*before, sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    sys.stderr.write(done.stderr)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.returncode}\n{done.stdout}")
    return objects(done.stdout)


def compare(binaries, sizes, rounds):
    """Medians over the rounds, natively and under nvshare in turn."""
    arguments = ["--measure", *map(str, sizes)]
    native, shared, own = {}, {}, harness.native_environment()
    with harness.Arbiter(binaries) as arbiter:
        for _ in range(rounds):
            for into, environment in ((native, own), (shared, own | arbiter.environment())):
                for row in ask(arguments, environment):
                    for name, figure in row["us"].items():
                        into.setdefault((row["size"], name), []).append(figure)
    for key, figures in native.items():
        alone, ours = statistics.median(figures), statistics.median(shared[key])
        size, name = key
        row = {"size": size, "what": name, "native_us": round(alone, 1), "nvshare_us": round(ours, 1), "ratio": round(ours / alone, 2)}
        if name == "again" and size in WANTED:
            row |= {"wanted": WANTED[size], "good": ours <= WANTED[size] * alone}
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("target/release"))
    parser.add_argument("--calls", action="store_true", help="measure the driver's calls too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--simulated", action="store_true", help="on a simulated GPU: says nothing about speed")
    parser.add_argument("--measure", nargs="*", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure-calls", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[size // MIB for size in SIZES], help="MiB")
    options = parser.parse_args()
    if options.measure is not None:
        return measure(options.measure)
    if options.measure_calls:
        return measure_calls(options.measure_calls)
    sizes = SIZES[:3] if options.simulated else [size * MIB for size in options.sizes]
    with contextlib.ExitStack() as stack:
        if options.simulated:
            stack.enter_context(harness.simulated_gpu(options.bin.resolve(), MEMORY="4GiB"))
        rows = list(compare(options.bin.resolve(), sizes, options.rounds))
        for row in rows:
            print(json.dumps(row), flush=True)
        if options.calls:
            for row in ask(["--measure-calls", str(sizes[-1])], harness.native_environment()):
                print(json.dumps(row), flush=True)
    return 0 if options.simulated or all(row.get("good", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
