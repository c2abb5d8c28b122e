"""cuda-bindings: the driver's API by hand. One piece of physical memory mapped at two addresses in turn and at once,
a pool of stream-ordered memory, host memory that is registered and that is mapped, an array, and an event that another
process waits for. Integers, so every result is known; the digest is that of all results and of what this version has
not got.
"""

import ctypes
import mmap
import subprocess
import sys

import common

SIZE = 64 << 20
WORDS = SIZE // 8
BALLAST = 24


def call(outcome):
    """What a function returned, without the status; an error is raised."""
    status, *values = outcome
    common.check(int(status) == 0, f"said {status!r}")
    return values[0] if len(values) == 1 else values


class Gpu:
    """A context, our kernels, and a stream."""

    def __init__(self, driver):
        self.driver = driver
        call(driver.cuInit(0))
        self.device = call(driver.cuDeviceGet(0))
        self.context = call(driver.cuDevicePrimaryCtxRetain(self.device))
        call(driver.cuCtxSetCurrent(self.context))
        self.module = call(driver.cuModuleLoadData(common.KERNELS.read_bytes() + b"\0"))
        self.stream = call(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.out = call(driver.cuMemAlloc(8))

    def launch(self, name, *values):
        function = call(self.driver.cuModuleGetFunction(self.module, name.encode()))
        arguments = (tuple(value & common.WORD for value in values), (ctypes.c_uint64,) * len(values))
        call(self.driver.cuLaunchKernel(function, 512, 1, 1, 256, 1, 1, 0, self.stream, arguments, 0))

    def fill(self, pointer, seed, words=WORDS):
        self.launch("nvshare_iota_u64", int(pointer), words, seed)

    def is_filled(self, pointer, seed, words=WORDS):
        """Whether the words are those that `fill` wrote."""
        call(self.driver.cuMemsetD32Async(self.out, 0, 2, self.stream))
        self.launch("nvshare_checksum_u64", int(self.out), int(pointer), words)
        found = ctypes.c_uint64()
        call(self.driver.cuMemcpyDtoHAsync(ctypes.addressof(found), self.out, 8, self.stream))
        call(self.driver.cuStreamSynchronize(self.stream))
        return found.value == common.iota_checksum(words, seed)


def mapped_by_hand(gpu, seed):
    """Reserve, create, map, access, unmap, and the same memory elsewhere; its bytes stay."""
    driver = gpu.driver
    where = driver.CUmemAllocationProp()
    where.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    where.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    where.location.id = 0
    least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    granularity = call(driver.cuMemGetAllocationGranularity(where, least))
    common.check(SIZE % granularity == 0, f"granularity {granularity}")
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = 0
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    addresses = [call(driver.cuMemAddressReserve(2 * SIZE, 0, 0, 0)) for _ in range(2)]
    handles = [call(driver.cuMemCreate(SIZE, where, 0)) for _ in range(2)]
    first, second = (int(address) for address in addresses)

    def map_at(address, handle):
        call(driver.cuMemMap(address, SIZE, 0, handle, 0))
        call(driver.cuMemSetAccess(address, SIZE, [access], 1))

    def unmap(address):
        call(driver.cuStreamSynchronize(gpu.stream))
        call(driver.cuMemUnmap(address, SIZE))

    map_at(first, handles[0])
    map_at(first + SIZE, handles[1])
    gpu.fill(first, seed)
    gpu.fill(first + SIZE, seed + 1)
    common.check(gpu.is_filled(first, seed), "what is mapped first is wrong")
    # The first memory at another address, and then at both.
    unmap(first)
    map_at(second, handles[0])
    common.check(gpu.is_filled(second, seed), "memory lost its bytes on its way to another address")
    map_at(first, handles[0])
    gpu.fill(second, seed + 2)
    common.check(gpu.is_filled(first, seed + 2), "two addresses of one memory differ")
    common.check(gpu.is_filled(first + SIZE, seed + 1), "the neighbour has changed")
    # A handle may go before its mapping; the memory lives on.
    for handle in handles:
        call(driver.cuMemRelease(handle))
    common.check(gpu.is_filled(first, seed + 2), "a released handle took the memory along")
    for address in (first, second, first + SIZE):
        unmap(address)
    for address in addresses:
        call(driver.cuMemAddressFree(address, 2 * SIZE))
    return "mapped"


def own_pool(gpu, seed):
    """Stream-ordered memory from a pool of the program's own, which gives some back and goes at the end."""
    driver = gpu.driver
    how = driver.CUmemPoolProps()
    how.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    how.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    how.location.id = 0
    pool = call(driver.cuMemPoolCreate(how))
    threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    call(driver.cuMemPoolSetAttribute(pool, threshold, driver.cuuint64_t(2 * SIZE)))
    kept = call(driver.cuMemAllocFromPoolAsync(SIZE, pool, gpu.stream))
    gpu.fill(kept, seed)
    for turn in range(4):
        held = call(driver.cuMemAllocFromPoolAsync(SIZE, pool, gpu.stream))
        gpu.fill(held, seed + turn)
        common.check(gpu.is_filled(held, seed + turn), f"stream-ordered memory is wrong in turn {turn}")
        call(driver.cuMemFreeAsync(held, gpu.stream))
    call(driver.cuStreamSynchronize(gpu.stream))
    call(driver.cuMemPoolTrimTo(pool, 0))
    common.check(gpu.is_filled(kept, seed), "trimming took memory that is in use")
    call(driver.cuMemFreeAsync(kept, gpu.stream))
    # And from the device's own pool.
    held = call(driver.cuMemAllocAsync(SIZE, gpu.stream))
    gpu.fill(held, seed)
    common.check(gpu.is_filled(held, seed), "memory of the default pool is wrong")
    call(driver.cuMemFreeAsync(held, gpu.stream))
    call(driver.cuStreamSynchronize(gpu.stream))
    call(driver.cuMemPoolDestroy(pool))
    return "pool"


def host_memory(gpu, seed):
    """A kernel writes into registered memory and into mapped memory; copies go through the first."""
    driver = gpu.driver
    size = 4 << 20
    registered = mmap.mmap(-1, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(registered))
    call(driver.cuMemHostRegister(address, size, 2))  # CU_MEMHOSTREGISTER_DEVICEMAP
    seen = call(driver.cuMemHostGetDevicePointer(address, 0))
    gpu.fill(seen, seed, size // 8)
    common.check(gpu.is_filled(seen, seed, size // 8), "registered memory is wrong")
    held = call(driver.cuMemAlloc(size))
    call(driver.cuMemcpyHtoDAsync(held, address, size, gpu.stream))
    common.check(gpu.is_filled(held, seed, size // 8), "a copy from registered memory is wrong")
    gpu.fill(held, seed + 1, size // 8)
    call(driver.cuMemcpyDtoHAsync(address, held, size, gpu.stream))
    call(driver.cuStreamSynchronize(gpu.stream))
    first = ctypes.c_uint64.from_address(address).value
    common.check(first == (seed + 1) * common.GOLDEN & common.WORD, f"the first word on the host is {first:x}")
    call(driver.cuMemFree(held))
    call(driver.cuMemHostUnregister(address))
    # The mapping itself goes with the object: an address that was taken of it keeps it from being closed.

    mapped = call(driver.cuMemHostAlloc(size, 2))  # CU_MEMHOSTALLOC_DEVICEMAP
    seen = call(driver.cuMemHostGetDevicePointer(mapped, 0))
    gpu.fill(seen, seed, size // 8)
    call(driver.cuStreamSynchronize(gpu.stream))
    last = ctypes.c_uint64.from_address(int(mapped) + size - 8).value
    common.check(last == (seed + size // 8 - 1) * common.GOLDEN & common.WORD, f"the last mapped word is {last:x}")
    call(driver.cuMemFreeHost(mapped))
    return last


def array(gpu, seed):
    """Into an array and back out of it."""
    driver = gpu.driver
    width, height = 1024, 1024  # of 32-bit words
    how = driver.CUDA_ARRAY_DESCRIPTOR()
    how.Width, how.Height, how.NumChannels = width, height, 1
    how.Format = driver.CUarray_format.CU_AD_FORMAT_UNSIGNED_INT32
    made = call(driver.cuArrayCreate(how))
    words = width * height // 2
    source, target = (call(driver.cuMemAlloc(8 * words)) for _ in range(2))
    gpu.fill(source, seed, words)
    device, kind = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE, driver.CUmemorytype.CU_MEMORYTYPE_ARRAY
    into, out = driver.CUDA_MEMCPY2D(), driver.CUDA_MEMCPY2D()
    for copy in (into, out):
        copy.WidthInBytes, copy.Height = 4 * width, height
    into.srcMemoryType, into.srcDevice, into.srcPitch = device, source, 4 * width
    into.dstMemoryType, into.dstArray = kind, made
    out.srcMemoryType, out.srcArray = kind, made
    out.dstMemoryType, out.dstDevice, out.dstPitch = device, target, 4 * width
    call(driver.cuMemcpy2DAsync(into, gpu.stream))
    call(driver.cuMemcpy2DAsync(out, gpu.stream))
    common.check(gpu.is_filled(target, seed, words), "what came out of an array is wrong")
    call(driver.cuArrayDestroy(made))
    for pointer in (source, target):
        call(driver.cuMemFree(pointer))
    return "array"


def shared_event(gpu, seed):
    """An event that another process waits for, by its handle."""
    driver = gpu.driver
    flags = driver.CUevent_flags.CU_EVENT_INTERPROCESS | driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
    event = call(driver.cuEventCreate(int(flags)))
    held = call(driver.cuMemAlloc(SIZE))
    for turn in range(20):
        gpu.fill(held, seed + turn)
    call(driver.cuEventRecord(event, gpu.stream))
    given = call(driver.cuIpcGetEventHandle(event))
    # Newer versions have no attribute for the bytes.
    handle = ctypes.string_at(given.getPtr(), 64)
    other = subprocess.run([sys.executable, __file__, "--event", handle.hex()], stdout=subprocess.PIPE, text=True, timeout=90)
    common.check(other.returncode == 0 and "waited" in other.stdout, f"the other process said {other.stdout!r}")
    common.check(gpu.is_filled(held, seed + 19), "the memory behind the event is wrong")
    call(driver.cuMemFree(held))
    call(driver.cuEventDestroy(event))
    return "event"


def wait_for_event(driver, handle):
    """The other process."""
    gpu = Gpu(driver)
    given = driver.CUipcEventHandle()
    ctypes.memmove(given.getPtr(), bytes.fromhex(handle), 64)
    event = call(driver.cuIpcOpenEventHandle(given))
    call(driver.cuStreamWaitEvent(gpu.stream, event, 0))
    call(driver.cuStreamSynchronize(gpu.stream))
    call(driver.cuEventSynchronize(event))
    call(driver.cuEventDestroy(event))
    print("waited", flush=True)


def main():
    options = common.parse(__doc__, lambda parser: parser.add_argument("--event", help="the second process"))
    try:
        from cuda.bindings import driver
        import cuda.bindings
    except ImportError as error:
        common.skip(f"no cuda-bindings: {error}")
    if options.event:
        return wait_for_event(driver, options.event)
    gpu = Gpu(driver)
    # Most of what the program ever has, so that it and a competitor never fit.
    ballast = call(driver.cuMemAlloc(BALLAST * SIZE))
    gpu.fill(ballast, 77, BALLAST * WORDS)
    parts = [mapped_by_hand, own_pool, host_memory, array]
    lacking = [] if hasattr(driver, "cuMemPoolCreate") else ["own_pool"]
    parts = [part for part in parts if part.__name__ not in lacking]
    shared_event(gpu, 5)

    def work():
        found = [part(gpu, 1 + 100 * index) for index, part in enumerate(parts)]
        common.check(gpu.is_filled(ballast, 77, BALLAST * WORDS), "memory that nobody touched has changed")
        return common.digest(found, lacking)

    digest, rounds = common.same_each_time(options.seconds, work)
    common.report(f"cuda-bindings {cuda.bindings.__version__}", digest, rounds, lacking=lacking)


main()
