"""The kernels by which the shim finds granules that are all zero (shim/src/memory/zero_scan.ptx), and granules that have not changed
(shim/src/memory/fingerprint.ptx), on this machine's GPU: whether they are right, and how fast they are. Speaks to the driver directly and needs nothing but Python; prints a line of JSON for
each finding, and fails at the first wrong answer.

Right: memory in chunks of 1 to 32 granules, in any order, has single bytes that are not zero: at each place where a
16-byte load, a warp, a block or a granule begins or ends, and at random ones. The kernel's answer, on grids of several
sizes, is compared with what a copy of the memory on the host says.

The fingerprints of random granules are what their definition gives, computed here; nothing else of the table is written; and a granule
of which one bit has changed has another one, at each of the places above.

Fast: the median of 9 runs over --gib GiB in chunks of 64 MiB, timed on the GPU: all zero, dense, and one byte in each
hundredth granule."""

import argparse
import ctypes
import json
import pathlib
import random
import statistics
import struct
import sys
import time

GRANULE = 2 << 20
SLOTS = 32
PLACES = [0, 1, 15, 16, 511, 512, 4095, 4096, 8191, 12288, 16383, 16384, GRANULE // 2, GRANULE - 16384]
MASK = 2**64 - 1
PLACES += [GRANULE // 2 - 1, GRANULE - 16, GRANULE - 2, GRANULE - 1]
DEVICEMAP = 2

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--gib", type=float, default=16, help="memory to be timed on")
arguments.add_argument("--trials", type=int, default=40, help="random layouts to be compared")
arguments.add_argument("--seed", type=int, default=1)
arguments = arguments.parse_args()

library = ctypes.CDLL("libcuda.so.1")
u32, u64, size_t = ctypes.c_uint, ctypes.c_uint64, ctypes.c_size_t
pointer = ctypes.c_void_p
SIGNATURES = {
    "cuInit": [u32],
    "cuDriverGetVersion": [pointer],
    "cuDeviceGetName": [pointer, ctypes.c_int, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [pointer, ctypes.c_int],
    "cuCtxSetCurrent": [pointer],
    "cuModuleLoadData": [pointer, ctypes.c_char_p],
    "cuModuleGetFunction": [pointer, pointer, ctypes.c_char_p],
    "cuMemHostAlloc": [pointer, size_t, u32],
    "cuMemHostGetDevicePointer_v2": [pointer, pointer, u32],
    "cuMemAlloc_v2": [pointer, size_t],
    "cuMemFree_v2": [u64],
    "cuMemGetInfo_v2": [pointer, pointer],
    "cuMemsetD8Async": [u64, ctypes.c_ubyte, size_t, pointer],
    "cuMemcpyDtoH_v2": [pointer, u64, size_t],
    "cuMemcpyHtoD_v2": [u64, pointer, size_t],
    "cuStreamCreate": [pointer, u32],
    "cuEventCreate": [pointer, u32],
    "cuEventRecord": [pointer, pointer],
    "cuEventSynchronize": [pointer],
    "cuEventElapsedTime": [pointer, pointer, pointer],
    "cuLaunchKernel": [pointer] + [u32] * 7 + [pointer] * 3,
}


def call(name, *values):
    function = getattr(library, name)
    function.argtypes = SIGNATURES[name]
    result = function(*values)
    if result != 0:
        sys.exit(f"{name} said {result}")


def made(name, kind, *values):
    """What a call gives through its first argument."""
    result = kind()
    call(name, ctypes.byref(result), *values)
    return result


def free_memory():
    free, total = size_t(), size_t()
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def say(**finding):
    print(json.dumps(finding), flush=True)


class Kernel:
    """A kernel of the shim, loaded, with a table for so many chunks."""

    def __init__(self, chunks):
        ptx = pathlib.Path(__file__).resolve().parents[2] / "shim/src/memory" / self.PTX
        self.module = made("cuModuleLoadData", pointer, ptx.read_bytes() + b"\0")
        self.kernel = made("cuModuleGetFunction", pointer, self.module, self.NAME)
        self.host = made("cuMemHostAlloc", pointer, chunks * self.ENTRY.size, DEVICEMAP)
        self.device = made("cuMemHostGetDevicePointer_v2", u64, self.host, 0)
        self.table = (ctypes.c_ubyte * (chunks * self.ENTRY.size)).from_address(self.host.value)
        self.stream = made("cuStreamCreate", pointer, 1)
        self.began, self.ended = made("cuEventCreate", pointer, 0), made("cuEventCreate", pointer, 0)

    def fill(self, address, value, size):
        """In the order of the scans."""
        call("cuMemsetD8Async", address, value, size, self.stream)

    def run(self, slots, blocks, *keys):
        """Runs it over the table's first slots, and waits; the seconds that the GPU took."""
        values = [u64(self.device.value), u64(slots), *map(u64, keys)]
        parameters = (pointer * len(values))(*[ctypes.addressof(value) for value in values])
        call("cuEventRecord", self.began, self.stream)
        call("cuLaunchKernel", self.kernel, blocks or slots, 1, 1, 256, 1, 1, 0, self.stream, parameters, None)
        call("cuEventRecord", self.ended, self.stream)
        call("cuEventSynchronize", self.ended)
        return made_time(self.began, self.ended) / 1e3


class Scanner(Kernel):
    """The same as in shim/src/memory/zero_scan.rs."""

    PTX, NAME, ENTRY = "zero_scan.ptx", b"nvshare_zero_granules", struct.Struct("<QQ32s")

    def scan(self, chunks, blocks=None):
        """The bits of granules in use for each chunk, and the seconds that the GPU and the whole of it took."""
        slots = SLOTS * len(chunks)
        asked = time.monotonic()
        for index, (address, size) in enumerate(chunks):
            self.ENTRY.pack_into(self.table, index * self.ENTRY.size, address, size // GRANULE, bytes(32))
        called = time.monotonic()
        on_gpu = self.run(slots, blocks)
        answered = time.monotonic()
        bits = []
        for index, chunk in enumerate(chunks):
            address, granules, zero = self.ENTRY.unpack_from(self.table, index * self.ENTRY.size)
            if (address, granules) != (chunk[0], chunk[1] // GRANULE) or any(zero[granules:]):
                sys.exit(f"chunk {index}: the kernel wrote where it has no business: {address:x} {granules} {zero}")
            bits.append(sum(1 << i for i in range(granules) if zero[i] != 1))
        return bits, on_gpu, answered - called, called - asked


class Fingerprinter(Kernel):
    """The same as in shim/src/memory/fingerprint.rs."""

    PTX, NAME, ENTRY = "fingerprint.ptx", b"nvshare_fingerprints", struct.Struct("<QQ64Q")

    def __init__(self, chunks):
        super().__init__(chunks)
        self.keys = [random.getrandbits(64), random.getrandbits(64)]

    def scan(self, chunks, blocks=None):
        """The fingerprints of each chunk's granules, and the seconds that the GPU took."""
        slots = SLOTS * len(chunks)
        for index, (address, size) in enumerate(chunks):
            self.ENTRY.pack_into(self.table, index * self.ENTRY.size, address, size // GRANULE, *[0] * 64)
        on_gpu = self.run(slots, blocks, *self.keys)
        found = []
        for index, (address, size) in enumerate(chunks):
            at, granules, *prints = self.ENTRY.unpack_from(self.table, index * self.ENTRY.size)
            if (at, granules) != (address, size // GRANULE) or any(prints[2 * granules:]):
                sys.exit(f"chunk {index}: the kernel wrote where it has no business: {at:x} {granules} {prints}")
            found.append(list(zip(prints[::2], prints[1::2]))[:granules])
        return found, on_gpu

    def definition(self, data):
        """The fingerprint of a granule with these bytes."""
        sums, (key0, key1) = [], self.keys
        words = struct.unpack(f"<{GRANULE // 8}Q", data)
        for start, key in ((key0, key1 | 1), (key1, key0 | 1)):
            total = 0
            for thread in range(256):
                state = (start + thread) & MASK
                for block in range(0, len(words), 512):
                    for word in words[block + 2 * thread:block + 2 * thread + 2]:
                        product = (state ^ word) * key
                        state = (product & MASK) ^ (product >> 64)
                total += state
            sums.append(total & MASK)
        return tuple(sums)


def check_fingerprints(scanner):
    dice = random.Random(arguments.seed)
    given, base = allocate(SLOTS * GRANULE)
    whole = [(base, SLOTS * GRANULE)]
    for granule in (0, 13, SLOTS - 1):
        data = dice.randbytes(GRANULE)
        call("cuMemcpyHtoD_v2", base + granule * GRANULE, data, GRANULE)
        for blocks in (None, 1, 7):
            said, is_so = scanner.scan(whole, blocks)[0][0][granule], scanner.definition(data)
            if said != is_so:
                sys.exit(f"granule {granule}, {blocks} blocks: {said} is {is_so}")
    scanner.fill(base, 0x5A, SLOTS * GRANULE)
    before = scanner.scan(whole)[0][0]
    if len(set(before)) != 1:
        sys.exit(f"granules with the same contents have several fingerprints: {before}")
    for place in PLACES:
        for granule in (0, 13, SLOTS - 1):
            scanner.fill(base + granule * GRANULE + place, 0x5A ^ 1 << dice.randrange(8), 1)
            now = scanner.scan(whole)[0][0]
            changed = [index for index in range(SLOTS) if now[index] != before[index]]
            if changed != [granule]:
                sys.exit(f"byte {place} of granule {granule} has changed, the fingerprints of {changed}")
            scanner.fill(base + granule * GRANULE + place, 0x5A, 1)
    call("cuMemFree_v2", given)
    say(check="fingerprints", places=len(PLACES), right=True)


def measure_fingerprints(scanner, chunk_count):
    chunk = SLOTS * GRANULE
    given, base = allocate(chunk_count * chunk)
    scanner.fill(base, 1, chunk_count * chunk)
    chunks = [(base + index * chunk, chunk) for index in range(chunk_count)]
    on_gpu = statistics.median(scanner.scan(chunks)[1] for _ in range(9))
    gib = chunk_count * chunk / 2**30
    say(measure="fingerprints", gib=gib, gpu_ms=on_gpu * 1e3, gib_per_s=gib / on_gpu)
    call("cuMemFree_v2", given)


def made_time(began, ended):
    milliseconds = ctypes.c_float()
    call("cuEventElapsedTime", ctypes.byref(milliseconds), began, ended)
    return milliseconds.value


def allocate(size):
    """Memory that begins at a granule."""
    address = made("cuMemAlloc_v2", u64, size + GRANULE).value
    return address, -(-address // GRANULE) * GRANULE


def truth(chunks):
    """What a copy on the host says."""
    zero, granule, bits = bytes(GRANULE), ctypes.create_string_buffer(GRANULE), []
    for address, size in chunks:
        found = 0
        for index in range(size // GRANULE):
            call("cuMemcpyDtoH_v2", granule, address + index * GRANULE, GRANULE)
            found |= (granule.raw != zero) << index
        bits.append(found)
    return bits


def partition(dice, base, granules):
    chunks = []
    while granules > 0:
        size = min(granules, dice.choice([1, 2, 3, 7, 31, 32, dice.randint(1, 32)]))
        chunks.append((base, size * GRANULE))
        base, granules = base + size * GRANULE, granules - size
    dice.shuffle(chunks)
    return chunks


def compare(scanner, chunks, blocks, where):
    answer, expected = scanner.scan(chunks, blocks)[0], truth(chunks)
    for (address, size), said, is_so in zip(chunks, answer, expected):
        if said != is_so:
            chunk = f"chunk of {size // GRANULE} granules at {address:x}"
            sys.exit(f"{where}, {blocks} blocks: {chunk}: {said:032b} is {is_so:032b}")
    return sum(bits.bit_count() for bits in expected)


def check(scanner, granules):
    dice = random.Random(arguments.seed)
    given, base = allocate(granules * GRANULE)
    whole = [(base, SLOTS * GRANULE)]
    for place in PLACES:
        for granule in (0, 13, SLOTS - 1):
            scanner.fill(base, 0, SLOTS * GRANULE)
            scanner.fill(base + granule * GRANULE + place, 0x80, 1)
            bits = scanner.scan(whole)[0]
            if bits != [1 << granule]:
                sys.exit(f"byte {place} of granule {granule}: {bits[0]:032b}")
    in_use = 0
    for trial in range(arguments.trials):
        scanner.fill(base, 0, granules * GRANULE)
        for _ in range(dice.choice([0, 1, granules // 8, granules // 2])):
            place = dice.choice([dice.randrange(GRANULE), dice.randrange(GRANULE) | 1, dice.choice(PLACES)])
            address = base + dice.randrange(granules) * GRANULE + place
            scanner.fill(address, dice.randint(1, 255), 1)
        chunks = partition(dice, base, granules)
        in_use += compare(scanner, chunks, dice.choice([None, 1, 7, 132, 4096]), f"trial {trial}")
    call("cuMemFree_v2", given)
    say(check="answers", granules=granules * arguments.trials, in_use=in_use, places=len(PLACES), right=True)


def measure(scanner, chunk_count):
    chunk = SLOTS * GRANULE
    size = chunk_count * chunk
    given, base = allocate(size)
    chunks = [(base + index * chunk, chunk) for index in range(chunk_count)]
    granules = chunk_count * SLOTS
    dice = random.Random(arguments.seed)
    sparse = set(dice.sample(range(granules), max(1, granules // 100)))

    def timed(name, expected):
        runs = []
        for _ in range(10):
            bits, on_gpu, waited, written = scanner.scan(chunks)
            found = {32 * index + i for index, bits in enumerate(bits) for i in range(SLOTS) if bits >> i & 1}
            if found != expected:
                sys.exit(f"{name}: {len(found ^ expected)} granules are wrong")
            runs.append((on_gpu, waited, written))
        on_gpu, waited, written = (statistics.median(run[i] for run in runs[1:]) for i in range(3))
        say(
            measure=name, gib=size / 2**30, in_use=len(expected), gpu_ms=on_gpu * 1e3, wait_ms=waited * 1e3,
            gib_per_s=size / 2**30 / on_gpu, table_ms=written * 1e3,
        )

    scanner.fill(base, 0, size)
    timed("zero", set())
    for granule in sparse:
        scanner.fill(base + granule * GRANULE + dice.randrange(GRANULE), dice.randint(1, 255), 1)
    timed("one byte in each hundredth granule", sparse)
    scanner.fill(base, 1, size)
    timed("dense", set(range(granules)))
    call("cuMemFree_v2", given)


call("cuInit", 0)
context = made("cuDevicePrimaryCtxRetain", pointer, 0)
call("cuCtxSetCurrent", context)
name = ctypes.create_string_buffer(100)
call("cuDeviceGetName", name, 100, 0)
chunk_count = max(1, int(arguments.gib * 2**30) // (SLOTS * GRANULE))
free, began = free_memory(), time.monotonic()
scanner = Scanner(max(chunk_count, 256))
say(
    gpu=name.value.decode(), driver=made("cuDriverGetVersion", ctypes.c_int).value,
    load_ms=(time.monotonic() - began) * 1e3, gpu_bytes_taken=free - free_memory(),
)
check(scanner, 256 if arguments.gib >= 1 else 2 * SLOTS)
measure(scanner, chunk_count)
fingerprinter = Fingerprinter(max(chunk_count, 256))
check_fingerprints(fingerprinter)
measure_fingerprints(fingerprinter, chunk_count)
