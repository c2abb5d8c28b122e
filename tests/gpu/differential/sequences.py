"""The sequences of calls. `python3 sequences.py NAME` makes those of one sequence, each told as recorder.py says.

A sequence has no branches: whatever is answered, it makes the same calls, so two runs are compared line by line. What
may crash natively stands in a sequence of its own.
"""

import ctypes
import itertools
import mmap
import sys
import threading
import types

from recorder import GRANULE, MIB, In, Named, Recorder
from structures import (
    DEVICE,
    FILE_DESCRIPTOR,
    HOST,
    HOST_NUMA,
    POINTER_ATTRIBUTES,
    READ,
    READ_WRITE,
    IpcHandle,
    Location,
    access,
    array_of_floats,
    pool_properties,
    properties,
)

SEQUENCES = {}
# What every sequence but the first ones holds beside what it asks about, so that there is something to move.
BALLAST = 160 * MIB
BLOCK = 6 * MIB
FAR = 1 << 60
WRAPS = (1 << 64) - 4096
GARBAGE = Named(0x7F5A_0000_1000, "garbage")
UNALIGNED = Named(0x123, "0x123")
PTX = b""".version 6.0
.target sm_50
.address_size 64
.visible .global .align 4 .b8 word[64];
.visible .entry empty() { ret; }
"""
# A kernel by the name of one that the simulated GPU has built in: it writes a word where it is told.
STRAYS = b""".version 6.0
.target sm_50
.address_size 64
.visible .entry nvshare_fill_u32(.param .u64 to, .param .u64 count, .param .u32 value) {
    .reg .b64 %at;
    .reg .b32 %word;
    ld.param.u64 %at, [to];
    ld.param.u32 %word, [value];
    st.global.u32 [%at], %word;
    ret;
}
"""


def sequence(function=None, *, variants=None, context=True):
    """Makes a function a sequence, or one for each of its variants. With `context` it begins with the primary context
    current and some memory in use."""

    def add(body):
        for variant in variants or [None]:
            name = body.__name__ + (f"[{variant}]" if variant is not None else "")

            def run(s, variant=variant):
                if context:
                    s.context = s.primary()
                    s.ballast = s.allocate("ballast", BALLAST)
                    s.cuMemsetD8_v2(s.ballast, 1, BALLAST)
                body(s, *([variant] if variant is not None else []))

            SEQUENCES[name] = run
        return body

    return add(function) if function else add


# How much memory there is.


@sequence
def memory_info(s):
    s.each_null("cuMemGetInfo_v2", s.out("amount"), s.out("amount"))
    s.each_null("cuMemGetInfo", s.out("amount"), s.out("amount"))
    s.each_null("cuDeviceTotalMem_v2", s.out("amount"), 0)
    s.cuDeviceTotalMem_v2(s.out("amount"), 99)
    s.cuDeviceTotalMem_v2(s.out("amount"), -1)


@sequence(context=False)
def before_init(s):
    everyday(s, Named(0x1000, "0x1000"))
    s.cuInit(1)
    s.cuInit(0)
    s.cuInit(0)


@sequence(context=False)
def without_context(s):
    s.cuInit(0)
    everyday(s, Named(0x1000, "0x1000"))


@sequence
def no_context_current(s):
    a = s.allocate("a", BLOCK)
    s.cuCtxSetCurrent(None)
    everyday(s, a)


@sequence
def another_context_current(s):
    a = s.allocate("a", BLOCK)
    s.cuCtxCreate_v2(s.handle("context", "second"), 0, 0)
    everyday(s, a)


@sequence
def in_a_broken_context(s):
    """A kernel has written where nothing is. What is looked at before the context is, and what is not told at all?"""
    a, pitch, host = s.allocate("a", BLOCK), s.out(), s.out("raw")
    place = s.handle("stream", "stream")
    s.cuStreamCreate(place, 1)
    stream = Named(place.value, "stream")
    place = s.handle("event", "event")
    s.cuEventCreate(place, 0)
    event = Named(place.value, "event")
    place = s.handle("pool", "pool")
    s.cuMemPoolCreate(place, pool_properties(0))
    pool = Named(place.value, "pool")
    ordered, pooled = (s.out("address", name, extent=BLOCK) for name in ("ordered", "pooled"))
    s.cuMemAllocAsync(ordered, BLOCK, stream)
    s.cuMemAllocFromPoolAsync(pooled, BLOCK, pool, stream)
    managed = s.out("address", "managed", extent=BLOCK)
    s.cuMemAllocManaged(managed, BLOCK, 1)
    view, _ = mapped(s, "mapped", BLOCK)
    s.cuStreamSynchronize(stream)
    module, function = s.handle("module", "module"), s.handle("function", "strays")
    s.cuModuleLoadData(module, In(STRAYS + b"\0", "ptx"))
    s.cuModuleGetFunction(function, Named(module.value, "module"), s.text("nvshare_fill_u32"))
    to, count, value = s.words(64), s.words(1), s.words(7, width=4)
    s.cuLaunchKernel(Named(function.value, "strays"), 1, 1, 1, 1, 1, 1, 0, stream, s.words(to, count, value), None)
    s.cuStreamSynchronize(stream)
    known = [a, view, GARBAGE, Named(0, "0")]
    known += [Named(at.value, name) for at, name in ((ordered, "ordered"), (pooled, "pooled"), (managed, "managed"))]
    for pointer in known:
        s.cuMemGetAddressRange_v2(s.out("address"), s.out(), pointer)
        s.cuIpcGetMemHandle(s.out("opaque"), pointer)
        for attribute in (1, 2, 3, 7, 9, 11, 17):
            s.cuPointerGetAttribute(s.out("opaque"), attribute, pointer)
        s.cuPointerSetAttribute(s.words(1, width=4), 6, pointer)
        s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), pointer)
    s.each_null("cuMemGetInfo_v2", s.out("amount"), s.out("amount"))
    for bytes_ in (0, 4096, BLOCK, FAR):
        s.cuMemAlloc_v2(s.out("address"), bytes_)
        s.cuMemAllocPitch_v2(s.out("address"), pitch, bytes_, 1, 4)
        s.cuMemAllocManaged(s.out("address"), bytes_, 1)
        for where in (stream, None):
            s.cuMemAllocAsync(s.out("address"), bytes_, where)
            s.cuMemAllocFromPoolAsync(s.out("address"), bytes_, pool, where)
    s.cuMemAlloc_v2(None, 4096)
    s.cuMemAllocPitch_v2(s.out("address"), pitch, 4096, 1, 3)
    s.cuMemAllocAsync(None, 4096, stream)
    s.cuMemPoolTrimTo(pool, 0)
    s.cuMemPoolGetAttribute(pool, 4, s.out())
    s.cuMemcpyHtoD_v2(a, s.words(1), 8)
    s.cuMemcpyDtoH_v2(host, a + (BLOCK - 8), 16)
    s.cuMemcpyDtoD_v2(a, Named(ordered.value, "ordered"), BLOCK + 1)
    s.cuMemsetD8_v2(a, 1, 8)
    s.cuMemsetD8_v2(a, 1, BLOCK + 1)
    s.cuMemsetD8Async(a, 1, BLOCK + 1, stream)
    s.cuStreamQuery(stream)
    s.cuStreamIsCapturing(stream, s.out())
    s.cuEventQuery(event)
    s.cuEventRecord(event, stream)
    s.cuMemFreeAsync(Named(ordered.value, "ordered"), stream)
    s.cuMemFreeAsync(Named(pooled.value, "pooled"), None)
    s.cuMemFreeAsync(GARBAGE, stream)
    for pointer in (*known, a + 4096):
        s.cuMemFree_v2(pointer)
    s.cuStreamDestroy_v2(stream)
    s.cuCtxSynchronize()


@sequence
def its_context_is_destroyed(s):
    second = s.handle("context", "second")
    s.cuCtxCreate_v2(second, 0, 0)
    a = s.allocate("a", BLOCK)
    s.cuCtxDestroy_v2(Named(second.value, "second"))
    s.forget("a")
    s.cuCtxGetCurrent(s.out("handle:context"))
    s.cuCtxSetCurrent(s.context)
    everyday(s, a)


@sequence(variants=["cuDevicePrimaryCtxReset_v2", "cuDevicePrimaryCtxReset"])
def after_reset(s, function):
    a = s.allocate("a", BLOCK)
    s.call(function, 0)
    s.cuDevicePrimaryCtxGetState(0, s.out(), s.out())
    s.cuCtxGetCurrent(s.out("handle:context"))
    everyday(s, a)


@sequence
def after_reset_and_retain(s):
    a = s.allocate("a", BLOCK)
    s.cuDevicePrimaryCtxReset_v2(0)
    s.cuDevicePrimaryCtxRetain(s.handle("context", "primary"), 0)
    s.cuCtxSetCurrent(s.context)
    everyday(s, a)


@sequence
def after_release(s):
    a = s.allocate("a", BLOCK)
    s.cuDevicePrimaryCtxRelease_v2(0)
    s.cuDevicePrimaryCtxGetState(0, s.out(), s.out())
    everyday(s, a)


def everyday(s, a):
    """What programs call every day, whatever state they are in. Memory `a` was or is an allocation of BLOCK."""
    s.cuMemGetInfo_v2(s.out("amount"), s.out("amount"))
    s.cuDeviceTotalMem_v2(s.out("amount"), 0)
    s.cuDeviceGetCount(s.out())
    s.cuCtxGetCurrent(s.out("handle:context"))
    s.cuCtxGetDevice(s.out())
    s.cuCtxGetFlags(s.out())
    s.cuCtxGetLimit(s.out(), 0)
    s.cuCtxGetCacheConfig(s.out())
    s.cuCtxGetApiVersion(None, s.out("amount"))
    s.cuCtxGetStreamPriorityRange(s.out(), s.out())
    s.cuCtxGetId(None, s.out("handle:id"))
    s.cuCtxSynchronize()
    for attribute in (1, 2, 3, 9, 11, 12, 13):
        name, kind = POINTER_ATTRIBUTES[attribute]
        s.cuPointerGetAttribute(s.out(kind), attribute, a, note=name)
    s.cuMemGetAddressRange_v2(s.out("address"), s.out(), a)
    b = s.allocate("b", BLOCK)
    s.cuMemsetD8_v2(b, 3, BLOCK)
    s.cuMemGetAddressRange_v2(s.out("address"), s.out(), b + 5)
    s.cuPointerGetAttribute(s.out("handle:context"), 1, b, note="CONTEXT")
    pitched = s.out("address", "pitched", extent=512 * 4)
    s.cuMemAllocPitch_v2(pitched, s.out(), 100, 4, 4)
    managed = s.allocate("managed", BLOCK, "cuMemAllocManaged", 1)
    host = s.out("host", "host", extent=4096)
    s.cuMemAllocHost_v2(host, 4096)
    stream, event = s.handle("stream", "stream"), s.handle("event", "event")
    s.cuStreamCreate(stream, 1)
    s.cuEventCreate(event, 0)
    module = s.handle("module", "module")
    s.cuModuleLoadData(module, In(PTX + b"\0", "ptx"))
    ordered = s.allocate("ordered", BLOCK, "cuMemAllocAsync", None)
    handle = s.out("opaque")
    s.cuIpcGetMemHandle(handle, b)
    physical = s.handle("physical", "physical")
    s.cuMemCreate(physical, GRANULE, properties(), 0)
    s.cuMemRelease(Named(physical.value, "physical"))
    s.cuMemFreeAsync(ordered, None)
    s.free(b)
    s.free(b)
    s.free(Named(pitched.value, "pitched"))
    s.free(managed)
    s.cuMemFreeHost(Named(host.value, "host"))
    if stream.width:
        s.cuStreamDestroy_v2(Named(stream.value, "stream"))
    if event.width:
        s.cuEventDestroy_v2(Named(event.value, "event"))
    if module.width:
        s.cuModuleUnload(Named(module.value, "module"))


# Allocations.


@sequence
def allocation_sizes(s):
    for number, bytes_ in enumerate([1, 511, 512, 4096, MIB, GRANULE - 1, GRANULE, GRANULE + 1, 66 * MIB + 5]):
        name = f"n{number}"
        pointer = s.allocate(name, bytes_)
        s.cuMemGetAddressRange_v2(s.out("address"), s.out(), pointer)
        s.cuMemGetAddressRange_v2(s.out("address"), s.out(), pointer + (bytes_ - 1))
        s.cuPointerGetAttribute(s.out("raw"), 12, pointer, note="RANGE_SIZE")
        s.cuMemsetD8_v2(pointer, 1, bytes_)
        s.free(pointer)
    for bytes_ in (0, 1 << 40, 1 << 47, FAR, WRAPS, (1 << 64) - 1):
        s.cuMemAlloc_v2(s.out("address"), bytes_)
    s.cuMemAlloc_v2(None, 4096)
    s.cuMemAlloc_v2(None, 0)
    s.cuMemAlloc(s.out("address"), 4096)


@sequence
def pitched_allocations(s):
    for width, height, element in itertools.product((0, 1, 64, 513, 5000), (0, 1, 33), (0, 1, 3, 4, 8, 16, 32)):
        pointer = s.out("address", "p", extent=max(1, width * height))
        s.cuMemAllocPitch_v2(pointer, s.out(), width, height, element)
        s.free(Named(pointer.value, "p"))
    for width, height in ((1 << 40, 1 << 20), (1 << 62, 8), ((1 << 64) - 1, 1), (64, (1 << 64) - 1)):
        s.cuMemAllocPitch_v2(s.out("address"), s.out(), width, height, 4)
    s.each_null("cuMemAllocPitch_v2", s.out("address"), s.out(), 64, 4, 4)


@sequence
def frees(s):
    a = s.allocate("a", BLOCK)
    for pointer in (Named(0, "0"), a + 1, a + 256, a + GRANULE, a + BLOCK, a - 1, GARBAGE, UNALIGNED):
        s.cuMemFree_v2(pointer)
    s.cuMemsetD8_v2(a, 1, BLOCK)
    s.cuMemFree(a)
    s.free(a)
    s.cuMemFree_v2(a)
    s.cuMemGetAddressRange_v2(s.out("address"), s.out(), a)
    s.cuMemFreeHost(a)
    s.cuIpcCloseMemHandle(a)
    s.cuMemsetD8_v2(a, 1, BLOCK)


@sequence
def frees_by_other_calls(s):
    a = s.allocate("a", BLOCK)
    s.cuMemFreeHost(a)
    s.cuMemFreeAsync(a + 256, None)
    s.cuMemUnmap(a, BLOCK)
    s.cuMemUnmap(a, GRANULE)
    s.cuMemAddressFree(a, BLOCK)
    s.cuMemRelease(a)
    s.cuIpcCloseMemHandle(a)
    s.cuMemHostUnregister(a)
    s.cuArrayDestroy(None)
    s.cuMemsetD8_v2(a, 1, BLOCK)
    s.cuMemFreeAsync(a, None)
    s.forget("a")
    s.cuCtxSynchronize()
    s.cuMemFreeAsync(a, None)
    s.cuMemFree_v2(a)


@sequence
def address_ranges(s):
    a = s.allocate("a", BLOCK)
    for pointer in (a, a + 1, a + 300, a + GRANULE, a + (BLOCK - 1), a + BLOCK, a - 1, GARBAGE, UNALIGNED, Named(0, "0")):
        s.each_null("cuMemGetAddressRange_v2", s.out("address"), s.out(), pointer)
    s.free(a)
    s.each_null("cuMemGetAddressRange_v2", s.out("address"), s.out(), a)


# What is known of a pointer.


def ask_all(s, pointer):
    """All attributes of a pointer, one by one and together."""
    for attribute, (name, kind) in POINTER_ATTRIBUTES.items():
        s.cuPointerGetAttribute(s.out(kind), attribute, pointer, note=name)
    s.cuMemGetAddressRange_v2(s.out("address"), s.out(), pointer)
    together(s, pointer, [number for number in POINTER_ATTRIBUTES if number not in (0, 5, 22, 255)])
    together(s, pointer, [2])
    together(s, pointer, [1, 2, 9, 11, 12])


def together(s, pointer, numbers):
    places = [s.out(POINTER_ATTRIBUTES.get(number, ("", "raw"))[1]) for number in numbers]
    attributes = In(s.words(*numbers, width=4).place.raw, "attributes " + " ".join(map(str, numbers)))
    data = In(s.words(*places).place.raw, "places")
    s.cuPointerGetAttributes(len(numbers), attributes, data, pointer, more=places)


def around(s, pointer, extent):
    for at in (pointer, pointer + 4096, pointer + (extent - 1)):
        ask_all(s, at)
    for attribute in (2, 11, 12):
        name, kind = POINTER_ATTRIBUTES[attribute]
        s.cuPointerGetAttribute(s.out(kind), attribute, pointer + extent, note=name)


def mapped(s, name, extent, handle_types=0, give=True):
    """Memory that the sequence maps itself: its address, and the handle of what is there."""
    place, physical = s.out("address", name, extent=extent), s.handle("physical", f"{name}'s")
    s.cuMemAddressReserve(place, extent, 0, 0, 0)
    address = Named(place.value, name)
    s.cuMemCreate(physical, extent, properties(handle_types), 0)
    s.cuMemMap(address, extent, 0, Named(physical.value, f"{name}'s"), 0)
    if give:
        s.cuMemSetAccess(address, extent, access((DEVICE, 0, READ_WRITE)), 1)
    return address, Named(physical.value, f"{name}'s")


@sequence
def pointer_to_device_memory(s):
    around(s, s.allocate("a", BLOCK), BLOCK)


@sequence
def pointer_to_large_device_memory(s):
    around(s, s.allocate("a", 150 * MIB), 150 * MIB)


@sequence
def pointer_to_small_device_memory(s):
    ask_all(s, s.allocate("a", 512))
    ask_all(s, s.allocate("b", 1000) + 300)


@sequence
def pointer_to_pitched_memory(s):
    place = s.out("address", "a", extent=5120 * 1000)
    s.cuMemAllocPitch_v2(place, s.out(), 5000, 1000, 4)
    ask_all(s, Named(place.value, "a") + 512)


@sequence
def pointer_to_managed_memory(s):
    a = s.allocate("a", BLOCK, "cuMemAllocManaged", 1)
    ask_all(s, a)
    s.cuMemsetD8_v2(a, 1, BLOCK)
    ask_all(s, a + 4096)
    s.cuPointerSetAttribute(s.words(1, width=4), 6, a)


@sequence(variants=[0, 1, 2, 4, 7, 8])
def pointer_to_host_memory(s, flags):
    place = s.out("host", "a", extent=MIB)
    s.cuMemHostAlloc(place, MIB, flags)
    a = Named(place.value, "a")
    ask_all(s, a + 100)
    s.each_null("cuMemHostGetFlags", s.out(), a)
    s.each_null("cuMemHostGetDevicePointer_v2", s.out("address"), a, 0)
    s.cuMemHostGetDevicePointer_v2(s.out("address"), a + 64, 0)
    s.cuMemHostGetDevicePointer_v2(s.out("address"), a + MIB, 0)
    s.cuMemHostGetDevicePointer_v2(s.out("address"), a, 1)
    s.cuMemFree_v2(a)
    s.cuMemHostUnregister(a)
    s.cuMemFreeHost(a + 64)
    s.cuMemFreeHost(a)
    s.cuMemFreeHost(a)


@sequence(variants=[0, 1, 2, 3, 8, 16])
def pointer_to_registered_memory(s, flags):
    s.kept = mmap.mmap(-1, MIB)
    a = Named(ctypes.addressof(ctypes.c_char.from_buffer(s.kept)), "a")
    s.ranges.append(("a", int(a), MIB))
    s.cuMemHostRegister_v2(a, 0, flags)
    s.cuMemHostRegister_v2(None, MIB, flags)
    s.cuMemHostRegister_v2(a, MIB, flags)
    s.cuMemHostRegister_v2(a, MIB, flags)
    s.cuMemHostRegister_v2(a + 4096, 4096, flags)
    ask_all(s, a + 100)
    s.cuMemHostGetFlags(s.out(), a)
    s.cuMemHostGetDevicePointer_v2(s.out("address"), a, 0)
    s.cuMemFreeHost(a)
    s.cuMemHostUnregister(a + 4096)
    s.cuMemHostUnregister(a)
    s.cuMemHostUnregister(a)


@sequence
def pointer_to_stream_ordered_memory(s):
    a = s.allocate("a", BLOCK, "cuMemAllocAsync", None)
    around(s, a, BLOCK)
    s.cuPointerSetAttribute(s.words(1, width=4), 6, a)
    s.cuIpcGetMemHandle(s.out("opaque"), a)
    s.cuMemFreeAsync(a, None)
    s.cuCtxSynchronize()
    s.forget("a")
    for attribute in (1, 2, 3, 11, 12):
        name, kind = POINTER_ATTRIBUTES[attribute]
        s.cuPointerGetAttribute(s.out(kind), attribute, a, note=name)


@sequence(variants=[0, FILE_DESCRIPTOR])
def pointer_to_mapped_memory(s, handle_types):
    a, _ = mapped(s, "a", BLOCK, handle_types)
    around(s, a, BLOCK)
    s.cuPointerSetAttribute(s.words(1, width=4), 6, a)
    s.cuIpcGetMemHandle(s.out("opaque"), a)
    s.cuMemFree_v2(a)
    s.cuMemFreeAsync(a, None)


@sequence
def pointer_to_mapped_memory_without_access(s):
    a, _ = mapped(s, "a", BLOCK, give=False)
    around(s, a, BLOCK)


@sequence
def pointer_to_reserved_addresses(s):
    place = s.out("address", "a", extent=BLOCK)
    s.cuMemAddressReserve(place, BLOCK, 0, 0, 0)
    ask_all(s, Named(place.value, "a"))
    s.cuMemsetD8_v2(Named(place.value, "a"), 1, GRANULE)


@sequence
def pointer_to_two_mappings(s):
    """One reservation, two objects side by side, a hole, and the first again."""
    place = s.out("address", "a", extent=8 * GRANULE)
    s.cuMemAddressReserve(place, 8 * GRANULE, 0, 0, 0)
    a = Named(place.value, "a")
    first, second = s.handle("physical", "first"), s.handle("physical", "second")
    s.cuMemCreate(first, GRANULE, properties(), 0)
    s.cuMemCreate(second, 2 * GRANULE, properties(), 0)
    s.cuMemMap(a, GRANULE, 0, Named(first.value, "first"), 0)
    s.cuMemMap(a + GRANULE, 2 * GRANULE, 0, Named(second.value, "second"), 0)
    s.cuMemMap(a + 4 * GRANULE, GRANULE, 0, Named(first.value, "first"), 0)
    s.cuMemSetAccess(a, 3 * GRANULE, access((DEVICE, 0, READ_WRITE)), 1)
    s.cuMemSetAccess(a + 4 * GRANULE, GRANULE, access((DEVICE, 0, READ)), 1)
    for at in (0, 1, 2, 3, 4, 5):
        ask_all(s, a + at * GRANULE)
    s.cuMemsetD8_v2(a, 1, 3 * GRANULE)
    s.cuMemsetD8_v2(a + 2 * GRANULE, 1, 2 * GRANULE)


@sequence
def pointer_to_a_global(s):
    module = s.handle("module", "module")
    s.cuModuleLoadData(module, In(PTX + b"\0", "ptx"))
    place = s.out("address", "word", extent=64)
    s.cuModuleGetGlobal_v2(place, s.out(), Named(module.value, "module"), s.text("word"))
    ask_all(s, Named(place.value, "word"))
    s.cuMemFree_v2(Named(place.value, "word"))


@sequence
def pointer_to_ordinary_memory(s):
    s.kept = mmap.mmap(-1, MIB)
    a = Named(ctypes.addressof(ctypes.c_char.from_buffer(s.kept)), "a")
    s.ranges.append(("a", int(a), MIB))
    ask_all(s, a)
    s.cuMemHostGetFlags(s.out(), a)
    s.cuMemHostGetDevicePointer_v2(s.out("address"), a, 0)
    s.cuMemFreeHost(a)
    s.cuMemHostUnregister(a)


@sequence
def pointer_to_nothing(s):
    for pointer in (Named(0, "0"), UNALIGNED, GARBAGE):
        ask_all(s, pointer)


@sequence
def pointer_to_freed_memory(s):
    a = s.allocate("a", BLOCK)
    s.free(a)
    ask_all(s, a)
    s.cuPointerSetAttribute(s.words(1, width=4), 6, a)


@sequence
def buffers_are_told_apart(s):
    a, b = s.allocate("a", BLOCK), s.allocate("b", BLOCK)
    for pointer in (a, b, a + GRANULE, b + (BLOCK - 1)):
        s.cuPointerGetAttribute(s.out("handle:buffer"), 7, pointer, note="BUFFER_ID")
        s.cuPointerGetAttribute(s.out("handle:block"), 20, pointer, note="MEMORY_BLOCK_ID")
    s.free(a)
    s.allocate("c", BLOCK)
    s.cuPointerGetAttribute(s.out("handle:buffer"), 7, s.ranges[-1][1], note="BUFFER_ID")


@sequence
def attributes_with_odd_arguments(s):
    a = s.allocate("a", BLOCK)
    for attribute in range(1, 22):
        s.cuPointerGetAttribute(None, attribute, a)
    place = s.out()
    s.cuPointerGetAttributes(0, s.words(2, width=4), s.words(place), a, more=[place])
    s.cuPointerGetAttributes(1, None, s.words(place), a, more=[place])
    s.cuPointerGetAttributes(1, s.words(2, width=4), None, a)
    for numbers in ([0], [99], [2, 99], [4, 2], [5, 2], [2, 4], [17, 2], [10, 8]):
        together(s, a, numbers)


@sequence
def attributes_into_null(s):
    a = s.allocate("a", BLOCK)
    s.cuPointerGetAttributes(1, s.words(2, width=4), s.words(0), a)


@sequence
def synchronous_operations(s):
    a, b = s.allocate("a", BLOCK), s.allocate("b", BLOCK)
    yes, no = s.words(1, width=4), s.words(0, width=4)
    ask = lambda pointer: s.cuPointerGetAttribute(s.out(), 6, pointer, note="SYNC_MEMOPS")
    ask(a)
    s.cuPointerSetAttribute(yes, 6, a)
    ask(a)
    ask(a + 4096)
    ask(b)
    s.cuPointerSetAttribute(no, 6, a + GRANULE)
    ask(a)
    s.cuPointerSetAttribute(yes, 6, a + BLOCK)
    s.cuPointerSetAttribute(yes, 6, GARBAGE)
    s.cuPointerSetAttribute(yes, 6, Named(0, "0"))
    s.cuPointerSetAttribute(None, 6, a)
    for attribute in (0, 1, 2, 8, 9, 16, 99):
        s.cuPointerSetAttribute(yes, attribute, a)
    s.cuMemsetD8_v2(a, 1, BLOCK)


# Memory that the application maps.


@sequence
def mapping(s):
    a, physical = mapped(s, "a", BLOCK)
    s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), a)
    s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), a + (BLOCK - 1))
    s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), a + BLOCK)
    s.cuMemGetAccess(s.out(), s.words(HOST, 0, width=4), a)
    s.cuMemGetAccess(None, s.words(DEVICE, 0, width=4), a)
    s.cuMemGetAccess(s.out(), None, a)
    s.each_null("cuMemGetAllocationPropertiesFromHandle", s.out(), physical)
    again = s.handle("physical", "a's")
    s.cuMemRetainAllocationHandle(again, a)
    s.cuMemRetainAllocationHandle(s.out("handle:physical"), a + GRANULE)
    s.cuMemRetainAllocationHandle(s.out("handle:physical"), a + BLOCK)
    s.cuMemRetainAllocationHandle(None, a)
    s.cuMemMap(a, BLOCK, 0, physical, 0)
    s.cuMemUnmap(a, GRANULE)
    s.cuMemUnmap(a + GRANULE, BLOCK - GRANULE)
    s.cuMemUnmap(a, 0)
    s.cuMemUnmap(a + 4096, GRANULE)
    s.cuMemsetD8_v2(a, 1, BLOCK)
    # Nothing says that cuMemUnmap waits for that.
    s.cuCtxSynchronize()
    s.cuMemAddressFree(a, BLOCK)
    s.cuMemUnmap(a, BLOCK)
    s.cuMemUnmap(a, BLOCK)
    s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), a)
    s.cuMemRetainAllocationHandle(s.out("handle:physical"), a)
    s.cuMemsetD8_v2(a, 1, BLOCK)
    s.cuMemRelease(physical)
    s.cuMemRelease(physical)
    s.cuMemRelease(physical)
    s.cuMemRelease(physical)
    s.cuMemRelease(physical)
    s.cuMemAddressFree(a, GRANULE)
    s.cuMemAddressFree(a + GRANULE, BLOCK - GRANULE)
    s.cuMemAddressFree(a, BLOCK)
    s.cuMemAddressFree(a, BLOCK)


def with_a_hole(s):
    """Eight granules of addresses; the first three are mapped, and the fifth."""
    place = s.out("address", "a", extent=8 * GRANULE)
    s.cuMemAddressReserve(place, 8 * GRANULE, 0, 0, 0)
    a = Named(place.value, "a")
    for name, at, granules in (("first", 0, 3), ("second", 4, 1)):
        physical = s.handle("physical", name)
        s.cuMemCreate(physical, granules * GRANULE, properties(), 0)
        s.cuMemMap(a + at * GRANULE, granules * GRANULE, 0, Named(physical.value, name), 0)
        s.cuMemSetAccess(a + at * GRANULE, granules * GRANULE, access((DEVICE, 0, READ_WRITE)), 1)
    return a


def what_is_mapped(s, a):
    for at in (0, 2, 3, 4, 5):
        s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), a + at * GRANULE)


@sequence(variants=[4, 5, 8])
def unmapping_with_a_hole(s, granules):
    a = with_a_hole(s)
    s.cuMemUnmap(a, granules * GRANULE)
    what_is_mapped(s, a)
    s.cuMemAddressFree(a, 8 * GRANULE)


@sequence(variants=[4, 5, 8])
def access_with_a_hole(s, granules):
    a = with_a_hole(s)
    s.cuMemSetAccess(a, granules * GRANULE, access((DEVICE, 0, READ)), 1)
    what_is_mapped(s, a)


@sequence
def rights_of_other_memory(s):
    a = s.allocate("a", BLOCK)
    managed = s.allocate("managed", BLOCK, "cuMemAllocManaged", 1)
    ordered = s.allocate("ordered", BLOCK, "cuMemAllocAsync", None)
    for pointer in (a, a + GRANULE, managed, ordered, GARBAGE, Named(0, "0")):
        s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), pointer)
        s.cuMemRetainAllocationHandle(s.out("handle:physical"), pointer)
        s.cuMemSetAccess(pointer, GRANULE, access((DEVICE, 0, READ_WRITE)), 1)


@sequence
def beyond_the_end(s):
    """An allocation that is not whole granules: the driver knows its end to the byte, or does not."""
    size = 3 * MIB + 512
    a = s.allocate("a", size)
    for extent in (size, size + 1, size + 511, size + 512, size + 4096, 4 * MIB):
        s.cuMemsetD8_v2(a, 1, extent)
    for offset in (size - 1, size, size + 1, size + 512, 4 * MIB - 1):
        s.cuMemcpyDtoH_v2(s.out(), a + offset, 1)
        s.cuPointerGetAttribute(s.out(), 2, a + offset, note="MEMORY_TYPE")
        s.cuMemGetAddressRange_v2(s.out("address"), s.out(), a + offset)
    small = s.allocate("small", 100)
    for extent in (100, 101, 512, 513):
        s.cuMemsetD8_v2(small, 1, extent)
    s.cuCtxSynchronize()


@sequence
def released_and_mapped(s):
    """The memory stays while it is mapped; its handle is gone."""
    a, physical = mapped(s, "a", BLOCK)
    s.cuMemRelease(physical)
    s.cuMemsetD8_v2(a, 1, BLOCK)
    s.cuMemGetAllocationPropertiesFromHandle(s.out(), physical)
    s.cuMemRetainAllocationHandle(s.handle("physical", "a's"), a)
    s.cuMemUnmap(a, BLOCK)
    s.cuMemRelease(physical)
    s.cuMemRelease(physical)
    s.cuMemMap(a, BLOCK, 0, physical, 0)
    s.cuMemGetAllocationPropertiesFromHandle(s.out(), physical)


@sequence
def creating_memory(s):
    s.each_null("cuMemCreate", s.out("handle:physical"), GRANULE, properties(), 0)
    s.cuMemCreate(s.out("handle:physical"), GRANULE, None, 0)
    for bytes_ in (0, 1, 4096, GRANULE + 1, GRANULE + 65536, 1 << 47, FAR, WRAPS, (1 << 64) - GRANULE):
        s.cuMemCreate(s.out("handle:physical"), bytes_, properties(), 0)
    s.cuMemCreate(s.out("handle:physical"), GRANULE, properties(), 1)
    for prop in (
        properties(kind=0),
        properties(kind=7),
        properties(location=(0, 0)),
        properties(location=(DEVICE, 99)),
        properties(location=(DEVICE, -1)),
        properties(location=(HOST_NUMA, 0)),
        properties(location=(HOST, 0)),
        properties(handle_types=8),
        properties(handle_types=1 << 20),
        properties(handle_types=FILE_DESCRIPTOR),
    ):
        s.cuMemCreate(s.out("handle:physical"), GRANULE, prop, 0)
    for option in (0, 1, 2):
        s.cuMemGetAllocationGranularity(s.out(), properties(), option)
    s.cuMemGetAllocationGranularity(None, properties(), 0)
    s.cuMemGetAllocationGranularity(s.out(), None, 0)


@sequence
def reserving_addresses(s):
    s.cuMemAddressReserve(None, BLOCK, 0, 0, 0)
    for bytes_ in (0, 1, 4096, GRANULE, GRANULE + 1, 1 << 62, WRAPS):
        s.cuMemAddressReserve(s.out("amount"), bytes_, 0, 0, 0)
    for alignment in (1, 3, 4096, GRANULE, 1 << 30, (1 << 21) + 1):
        s.cuMemAddressReserve(s.out("amount"), GRANULE, alignment, 0, 0)
    s.cuMemAddressReserve(s.out("amount"), GRANULE, 0, 0, 1)
    s.cuMemAddressFree(GARBAGE, GRANULE)
    s.cuMemAddressFree(Named(0, "0"), 0)
    a = s.allocate("a", BLOCK)
    s.cuMemAddressFree(a, BLOCK)
    s.cuMemsetD8_v2(a, 1, BLOCK)


@sequence
def mapping_with_odd_arguments(s):
    place, physical = s.out("address", "a", extent=4 * GRANULE), s.handle("physical", "p")
    s.cuMemAddressReserve(place, 4 * GRANULE, 0, 0, 0)
    a = Named(place.value, "a")
    s.cuMemCreate(physical, 2 * GRANULE, properties(), 0)
    p = Named(physical.value, "p")
    s.cuMemMap(a, 0, 0, p, 0)
    s.cuMemMap(a, 4096, 0, p, 0)
    s.cuMemMap(a + 4096, GRANULE, 0, p, 0)
    s.cuMemMap(a, 2 * GRANULE, 0, p, 1)
    s.cuMemMap(a, 4 * GRANULE, 0, p, 0)
    s.cuMemMap(a, GRANULE, GRANULE, p, 0)
    s.cuMemMap(a, GRANULE, 4096, p, 0)
    s.cuMemMap(a, 2 * GRANULE, GRANULE, p, 0)
    s.cuMemMap(Named(0, "0"), 2 * GRANULE, 0, p, 0)
    s.cuMemMap(a - 2 * GRANULE, 2 * GRANULE, 0, p, 0)
    s.cuMemSetAccess(a, 2 * GRANULE, access((DEVICE, 0, READ_WRITE)), 1)
    s.cuMemMap(a, 2 * GRANULE, 0, p, 0)
    s.cuMemSetAccess(a, 2 * GRANULE, None, 1)
    s.cuMemSetAccess(a, 2 * GRANULE, access((DEVICE, 0, READ_WRITE)), 0)
    s.cuMemSetAccess(a, 0, access((DEVICE, 0, READ_WRITE)), 1)
    s.cuMemSetAccess(a, GRANULE, access((DEVICE, 0, READ_WRITE)), 1)
    s.cuMemSetAccess(a, 3 * GRANULE, access((DEVICE, 0, READ_WRITE)), 1)
    s.cuMemSetAccess(a + 4096, GRANULE, access((DEVICE, 0, READ_WRITE)), 1)
    s.cuMemSetAccess(a, 2 * GRANULE, access((DEVICE, 99, READ_WRITE)), 1)
    s.cuMemSetAccess(a, 2 * GRANULE, access((DEVICE, 0, 2)), 1)
    s.cuMemSetAccess(a, 2 * GRANULE, access((DEVICE, 0, 9)), 1)
    s.cuMemSetAccess(a, 2 * GRANULE, access((9, 0, READ_WRITE)), 1)
    s.cuMemSetAccess(a, 2 * GRANULE, access((DEVICE, 0, READ_WRITE)), 1)
    s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), a)
    s.cuMemSetAccess(a, 2 * GRANULE, access((DEVICE, 0, 0)), 1)
    s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), a)
    s.cuMemSetAccess(a, 2 * GRANULE, access((DEVICE, 0, READ)), 1)
    s.cuMemGetAccess(s.out(), s.words(DEVICE, 0, width=4), a)


@sequence(variants=["cuMemRelease", "cuMemGetAllocationPropertiesFromHandle", "cuMemMap", "cuMemExportToShareableHandle"])
def rubbish_as_a_physical_handle(s, function):
    place = s.out("address", "a", extent=GRANULE)
    s.cuMemAddressReserve(place, GRANULE, 0, 0, 0)
    a = Named(place.value, "a")
    for handle in (Named(0, "0"), UNALIGNED, s.ballast):
        arguments = {
            "cuMemRelease": (handle,),
            "cuMemGetAllocationPropertiesFromHandle": (s.out(), handle),
            "cuMemMap": (a, GRANULE, 0, handle, 0),
            "cuMemExportToShareableHandle": (s.out("opaque"), handle, FILE_DESCRIPTOR, 0),
        }
        s.call(function, *arguments[function])


@sequence
def handing_memory_on(s):
    plain, shared = s.handle("physical", "plain"), s.handle("physical", "shared")
    s.cuMemCreate(plain, GRANULE, properties(), 0)
    s.cuMemCreate(shared, GRANULE, properties(FILE_DESCRIPTOR), 0)
    for handle in (Named(plain.value, "plain"), Named(shared.value, "shared")):
        for kind in (FILE_DESCRIPTOR, 0, 8, 3):
            s.cuMemExportToShareableHandle(s.out("opaque"), handle, kind, 0)
        s.cuMemExportToShareableHandle(None, handle, FILE_DESCRIPTOR, 0)
        s.cuMemExportToShareableHandle(s.out("opaque"), handle, FILE_DESCRIPTOR, 1)
    s.cuMemImportFromShareableHandle(s.out("handle:physical"), -1, FILE_DESCRIPTOR)
    s.cuMemImportFromShareableHandle(s.out("handle:physical"), 0, FILE_DESCRIPTOR)
    s.cuMemGetHandleForAddressRange(s.out("opaque"), s.ballast, GRANULE, 1, 0)
    s.cuMemGetHandleForAddressRange(s.out("opaque"), s.ballast, 4096, 1, 0)
    s.cuMemGetHandleForAddressRange(s.out("opaque"), s.ballast + BALLAST, GRANULE, 1, 0)
    s.cuMemGetHandleForAddressRange(s.out("opaque"), s.ballast, GRANULE, 9, 0)
    s.cuMemGetHandleForAddressRange(None, s.ballast, GRANULE, 1, 0)


@sequence
def ipc_handles(s):
    a = s.allocate("a", BLOCK)
    handle = IpcHandle()
    s.each_null("cuIpcGetMemHandle", s.out("opaque"), a)
    s.cuIpcGetMemHandle(s.out("opaque"), a + 4096)
    s.cuIpcGetMemHandle(s.out("opaque"), a + BLOCK)
    s.cuIpcGetMemHandle(s.out("opaque"), GARBAGE)
    s.cuIpcGetMemHandle(s.out("opaque"), Named(0, "0"))
    own = s.out("opaque")
    s.cuIpcGetMemHandle(own, a)
    ctypes.memmove(ctypes.byref(handle), own.data[:64], 64)
    s.cuIpcOpenMemHandle_v2(s.out("address"), handle, 1, note="of its own")
    s.cuIpcOpenMemHandle_v2(s.out("address"), handle, 0, note="of its own")
    s.cuIpcOpenMemHandle_v2(None, handle, 1, note="of its own")
    s.cuIpcOpenMemHandle_v2(s.out("address"), IpcHandle(), 1, note="of zeros")
    for pointer in (a, a + 1, GARBAGE, Named(0, "0")):
        s.cuIpcCloseMemHandle(pointer)
    event, plain = s.handle("event", "shared"), s.handle("event", "plain")
    s.cuEventCreate(event, 6)
    s.cuEventCreate(plain, 2)
    s.cuIpcGetEventHandle(s.out("opaque"), Named(event.value, "shared"))
    s.cuIpcGetEventHandle(s.out("opaque"), Named(plain.value, "plain"))
    s.cuIpcGetEventHandle(None, Named(event.value, "shared"))
    s.cuIpcOpenEventHandle(s.out("handle:event"), IpcHandle(), note="of zeros")
    s.free(a)
    s.cuIpcGetMemHandle(s.out("opaque"), a)


# Stream-ordered memory.


@sequence
def stream_ordered_memory(s):
    a = s.allocate("a", BLOCK, "cuMemAllocAsync", None)
    s.cuMemsetD8_v2(a, 1, BLOCK)
    for pointer in (a + 256, a + BLOCK, GARBAGE, Named(0, "0")):
        s.cuMemFreeAsync(pointer, None)
    s.cuMemAllocAsync(None, BLOCK, None)
    for bytes_ in (0, 1 << 47, FAR, WRAPS):
        s.cuMemAllocAsync(s.out("address"), bytes_, None)
    s.cuMemFreeAsync(a, None)
    s.cuMemFreeAsync(a, None)
    s.cuMemFree_v2(a)
    s.forget("a")
    b = s.allocate("b", 100, "cuMemAllocAsync", None)
    s.cuMemGetAddressRange_v2(s.out("address"), s.out(), b)
    s.free(b)
    s.cuMemFreeAsync(b, None)
    s.cuMemAllocFromPoolAsync(s.out("address"), BLOCK, None, None)


POOL_ATTRIBUTES = {1: 4, 2: 4, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8, 8: 8}


@sequence(variants=["default", "own", "shared"])
def pools(s, which):
    place = s.handle("pool", which)
    if which == "default":
        s.each_null("cuDeviceGetDefaultMemPool", s.out("handle:pool"), 0)
        s.cuDeviceGetDefaultMemPool(place, 0)
    else:
        s.cuMemPoolCreate(place, pool_properties(FILE_DESCRIPTOR if which == "shared" else 0))
    pool = Named(place.value, which)
    for attribute in range(0, 14):
        s.cuMemPoolGetAttribute(pool, attribute, s.out())
    s.cuMemPoolGetAttribute(pool, 1, None)
    s.cuMemPoolGetAttribute(pool, 4, None)
    a = s.allocate("a", BLOCK, "cuMemAllocFromPoolAsync", pool, None)
    s.cuCtxSynchronize()
    for attribute in (6, 8):
        s.cuMemPoolGetAttribute(pool, attribute, s.out("amount"))
    s.cuPointerGetAttribute(s.out("handle:pool"), 17, a, note="MEMPOOL_HANDLE")
    for attribute, width in POOL_ATTRIBUTES.items():
        for value in (0, 1, 1 << 24):
            s.cuMemPoolSetAttribute(pool, attribute, s.words(value, width=width))
            s.cuMemPoolGetAttribute(pool, attribute, s.out("amount" if attribute > 4 else "raw"))
    s.cuMemPoolSetAttribute(pool, 4, None)
    s.cuMemPoolSetAttribute(pool, 99, s.words(0))
    s.cuMemPoolTrimTo(pool, 0)
    s.cuMemPoolTrimTo(pool, FAR)
    s.cuMemPoolGetAccess(s.out(), pool, s.words(DEVICE, 0, width=4))
    s.cuMemPoolGetAccess(None, pool, s.words(DEVICE, 0, width=4))
    s.cuMemPoolSetAccess(pool, access((DEVICE, 0, READ_WRITE)), 1)
    s.cuMemPoolSetAccess(pool, access((DEVICE, 0, 0)), 1)
    s.cuMemPoolSetAccess(pool, access((DEVICE, 99, READ_WRITE)), 1)
    s.cuMemPoolSetAccess(pool, access((HOST, 0, READ_WRITE)), 1)
    s.cuMemPoolSetAccess(pool, None, 0)
    s.cuMemPoolSetAccess(pool, None, 1)
    s.cuMemPoolExportToShareableHandle(s.out("opaque"), pool, FILE_DESCRIPTOR, 0)
    s.cuMemPoolExportToShareableHandle(None, pool, FILE_DESCRIPTOR, 0)
    s.cuMemPoolExportPointer(s.out("opaque"), a)
    s.cuMemPoolExportPointer(s.out("opaque"), GARBAGE)
    s.cuDeviceGetMemPool(s.out("handle:pool"), 0)
    s.cuDeviceSetMemPool(0, pool)
    s.cuDeviceGetMemPool(s.out("handle:pool"), 0)
    s.cuMemFreeAsync(a, None)
    s.cuCtxSynchronize()
    s.cuMemPoolGetAttribute(pool, 7, s.out("amount"))
    s.cuMemPoolDestroy(pool)
    s.cuDeviceGetMemPool(s.out("handle:pool"), 0)


@sequence
def making_pools(s):
    s.each_null("cuMemPoolCreate", s.out("handle:pool"), pool_properties())
    s.cuMemPoolCreate(s.out("handle:pool"), None)
    for props in (
        pool_properties(kind=0),
        pool_properties(location=(0, 0)),
        pool_properties(location=(DEVICE, 99)),
        pool_properties(location=(HOST, 0)),
        pool_properties(location=(HOST_NUMA, 0)),
        pool_properties(handle_types=8),
        pool_properties(handle_types=1 << 20),
        pool_properties(max_size=GRANULE),
    ):
        s.cuMemPoolCreate(s.out("handle:pool"), props)
    s.cuDeviceGetDefaultMemPool(s.out("handle:pool"), 99)
    s.cuDeviceGetMemPool(s.out("handle:pool"), 99)
    s.cuDeviceGetMemPool(None, 0)
    s.cuDeviceSetMemPool(0, None)
    s.cuDeviceSetMemPool(99, None)
    s.cuMemPoolImportFromShareableHandle(s.out("handle:pool"), -1, FILE_DESCRIPTOR, 0)


@sequence(variants=["cuMemPoolDestroy", "cuMemPoolTrimTo", "cuMemPoolGetAttribute", "cuMemPoolSetAttribute", "cuMemAllocFromPoolAsync"])
def rubbish_as_a_pool(s, function):
    for pool in (Named(0, "0"), UNALIGNED):
        arguments = {
            "cuMemPoolDestroy": (pool,),
            "cuMemPoolTrimTo": (pool, 0),
            "cuMemPoolGetAttribute": (pool, 1, s.out()),
            "cuMemPoolSetAttribute": (pool, 1, s.words(0, width=4)),
            "cuMemAllocFromPoolAsync": (s.out("address"), BLOCK, pool, None),
        }
        s.call(function, *arguments[function])


# Contexts.


@sequence(context=False)
def primary_context(s):
    s.cuInit(0)
    state = lambda: s.each_null("cuDevicePrimaryCtxGetState", 0, s.out(), s.out())
    state()
    s.cuDevicePrimaryCtxSetFlags_v2(0, 4)
    state()
    s.cuDevicePrimaryCtxSetFlags_v2(0, 0x4000)
    s.cuDevicePrimaryCtxRelease_v2(0)
    s.each_null("cuDevicePrimaryCtxRetain", s.handle("context", "primary"), 0)
    s.cuDevicePrimaryCtxRetain(s.out("handle:context"), 99)
    s.cuDevicePrimaryCtxRetain(s.out("handle:context"), -1)
    state()
    s.cuCtxGetCurrent(s.out("handle:context"))
    s.cuDevicePrimaryCtxRetain(s.out("handle:context"), 0)
    s.cuDevicePrimaryCtxSetFlags_v2(0, 0)
    s.cuDevicePrimaryCtxRelease_v2(0)
    state()
    s.cuDevicePrimaryCtxRelease_v2(0)
    state()
    s.cuDevicePrimaryCtxRelease_v2(0)
    s.cuDevicePrimaryCtxRelease_v2(99)
    s.cuDevicePrimaryCtxReset_v2(0)
    s.cuDevicePrimaryCtxReset_v2(99)
    s.cuDevicePrimaryCtxGetState(99, s.out(), s.out())


@sequence
def queries_of_a_context(s):
    s.each_null("cuCtxGetCurrent", s.out("handle:context"))
    s.each_null("cuCtxGetDevice", s.out())
    s.each_null("cuCtxGetFlags", s.out())
    for limit in range(0, 12):
        s.each_null("cuCtxGetLimit", s.out(), limit)
        s.cuCtxSetLimit(limit, 0)
        s.cuCtxSetLimit(limit, 4096)
        s.cuCtxSetLimit(limit, (1 << 64) - 1)
        s.cuCtxGetLimit(s.out(), limit)
    s.each_null("cuCtxGetCacheConfig", s.out())
    s.cuCtxSetCacheConfig(1)
    s.cuCtxSetCacheConfig(99)
    s.cuCtxGetSharedMemConfig(s.out())
    for context in (s.context, None):
        s.each_null("cuCtxGetApiVersion", context, s.out("raw"))
        s.each_null("cuCtxGetId", context, s.out("handle:id"))
    s.each_null("cuCtxGetStreamPriorityRange", s.out("int"), s.out("int"))
    s.cuCtxSetFlags(4)
    s.cuCtxSetFlags(0xFFFF)
    s.cuCtxGetExecAffinity(s.out(), 0)
    s.cuCtxGetDevice_v2(s.out(), s.context)
    s.cuCtxSynchronize_v2(s.context)
    s.cuCtxResetPersistingL2Cache()
    s.each_null("cuCtxGetDevResource", s.context, s.out("opaque"), 1)
    s.cuCtxGetDevResource(s.context, s.out("opaque"), 99)
    s.cuDeviceGetDevResource(0, s.out("opaque"), 1)


@sequence
def life_of_a_context(s):
    for function in ("cuCtxCreate", "cuCtxCreate_v2"):
        s.call(function, None, 0, 0)
        s.call(function, s.out("handle:context"), 0, 99)
        s.call(function, s.out("handle:context"), 0x80000000, 0)
    s.cuCtxCreate_v4(None, None, 0, 0)
    place = s.handle("context", "second")
    s.cuCtxCreate_v2(place, 0, 0)
    second = Named(place.value, "second")
    s.cuCtxGetCurrent(s.out("handle:context"))
    s.cuCtxPushCurrent_v2(s.context)
    s.cuCtxGetCurrent(s.out("handle:context"))
    s.cuCtxPopCurrent_v2(s.out("handle:context"))
    s.cuCtxPopCurrent_v2(None)
    s.cuCtxGetCurrent(s.out("handle:context"))
    s.cuCtxPopCurrent_v2(s.out("handle:context"))
    s.cuCtxPopCurrent_v2(s.out("handle:context"))
    s.cuCtxPopCurrent_v2(s.out("handle:context"))
    s.cuCtxPushCurrent_v2(None)
    s.cuCtxSetCurrent(second)
    b = s.allocate("b", BLOCK)
    s.cuPointerGetAttribute(s.out("handle:context"), 1, b, note="CONTEXT")
    s.cuPointerGetAttribute(s.out("handle:context"), 1, s.ballast, note="CONTEXT")
    s.cuMemsetD8_v2(s.ballast, 2, BALLAST)
    s.cuCtxDestroy_v2(second)
    s.cuCtxGetCurrent(s.out("handle:context"))
    s.cuMemFree_v2(b)
    s.cuCtxSetCurrent(s.context)
    s.cuMemGetAddressRange_v2(s.out("address"), s.out(), b)
    s.cuMemsetD8_v2(b, 1, BLOCK)
    s.cuCtxAttach(s.out("handle:context"), 0)
    s.cuCtxDetach(s.context)
    s.cuMemsetD8_v2(s.ballast, 2, BALLAST)


@sequence(variants=["cuCtxDestroy_v2", "cuCtxDetach", "cuCtxDestroy"])
def primary_contexts_are_not_destroyed(s, function):
    s.call(function, s.context)
    s.cuDevicePrimaryCtxGetState(0, s.out(), s.out())
    s.cuCtxGetCurrent(s.out("handle:context"))
    s.cuMemsetD8_v2(s.ballast, 2, BALLAST)
    s.cuMemGetAddressRange_v2(s.out("address"), s.out(), s.ballast)


@sequence(variants=["cuCtxDestroy_v2", "cuCtxPushCurrent_v2", "cuCtxSetCurrent", "cuCtxGetApiVersion", "cuCtxGetId", "cuCtxDetach"])
def destroyed_contexts(s, function):
    place = s.handle("context", "second")
    s.cuCtxCreate_v2(place, 0, 0)
    second = Named(place.value, "second")
    s.cuCtxDestroy_v2(second)
    more = {"cuCtxGetApiVersion": [s.out("amount")], "cuCtxGetId": [s.out("handle:id")]}
    s.call(function, second, *more.get(function, []))


@sequence(variants=["cuCtxDestroy_v2", "cuCtxPushCurrent_v2", "cuCtxSetCurrent", "cuCtxGetApiVersion", "cuCtxDetach"])
def null_as_a_context(s, function):
    more = {"cuCtxGetApiVersion": [s.out("amount")]}
    s.call(function, None, *more.get(function, []))
    s.cuCtxGetCurrent(s.out("handle:context"))


# Streams and events.


@sequence
def streams(s):
    s.cuStreamCreate(None, 0)
    s.cuStreamCreateWithPriority(None, 0, 0)
    for flags in (2, 3, 0xFF):
        s.cuStreamCreate(s.out("handle:stream"), flags)
    for flags, priority in ((0, 0), (1, -1), (1, -100), (0, 100)):
        name = f"stream {flags} {priority}"
        place = s.handle("stream", name)
        s.cuStreamCreateWithPriority(place, flags, priority)
        ask_stream(s, Named(place.value, name))
        s.cuStreamDestroy_v2(Named(place.value, name))
    for stream in (Named(0, "0"), Named(1, "legacy"), Named(2, "per thread")):
        ask_stream(s, stream)
        s.cuStreamDestroy_v2(stream)
    s.cuStreamQuery(None)


def ask_stream(s, stream):
    s.each_null("cuStreamGetFlags", stream, s.out())
    s.each_null("cuStreamGetPriority", stream, s.out("int"))
    s.each_null("cuStreamGetCtx", stream, s.out("handle:context"))
    s.each_null("cuStreamGetCtx_v2", stream, s.out("handle:context"), s.out("handle:green"))
    s.each_null("cuStreamGetId", stream, s.out("handle:stream id"))
    s.each_null("cuStreamGetDevice", stream, s.out())
    s.each_null("cuStreamIsCapturing", stream, s.out())
    s.cuStreamGetCaptureInfo_v2(stream, s.out(), s.out("opaque"), None, None, None)
    s.cuStreamSynchronize(stream)
    s.cuStreamQuery(stream)


@sequence(variants=["cuStreamQuery", "cuStreamSynchronize", "cuStreamDestroy_v2", "cuStreamGetFlags", "cuStreamGetCtx", "cuMemAllocAsync", "cuMemFreeAsync", "cuMemsetD8Async"])
def destroyed_streams(s, function):
    place = s.handle("stream", "stream")
    s.cuStreamCreate(place, 1)
    stream = Named(place.value, "stream")
    s.cuStreamDestroy_v2(stream)
    arguments = {
        "cuStreamGetFlags": (stream, s.out()),
        "cuStreamGetCtx": (stream, s.out("handle:context")),
        "cuMemAllocAsync": (s.out("address"), BLOCK, stream),
        "cuMemFreeAsync": (s.ballast, stream),
        "cuMemsetD8Async": (s.ballast, 1, 4096, stream),
    }
    s.call(function, *arguments.get(function, (stream,)))


@sequence(variants=["cuStreamQuery", "cuStreamDestroy_v2", "cuMemAllocAsync", "cuMemFreeAsync", "cuMemsetD8Async"])
def rubbish_as_a_stream(s, function):
    arguments = {
        "cuMemAllocAsync": (s.out("address"), BLOCK, UNALIGNED),
        "cuMemFreeAsync": (s.ballast, UNALIGNED),
        "cuMemsetD8Async": (s.ballast, 1, 4096, UNALIGNED),
    }
    s.call(function, *arguments.get(function, (UNALIGNED,)))


@sequence
def events(s):
    s.cuEventCreate(None, 0)
    for flags in (0, 1, 2, 4, 5, 6, 8, 0xFF):
        place = s.handle("event", f"event {flags}")
        s.cuEventCreate(place, flags)
    first, second = s.handle("event", "first"), s.handle("event", "second")
    s.cuEventCreate(first, 0)
    s.cuEventCreate(second, 0)
    a, b = Named(first.value, "first"), Named(second.value, "second")
    s.cuEventQuery(a)
    s.cuEventSynchronize(a)
    s.cuEventElapsedTime(s.out("opaque"), a, b)
    s.cuEventRecord(a, None)
    s.cuEventRecord(b, None)
    s.cuEventSynchronize(b)
    s.cuEventQuery(a)
    s.cuEventElapsedTime(s.out("opaque"), a, b)
    s.cuEventElapsedTime(None, a, b)
    s.cuStreamWaitEvent(None, a, 0)
    s.cuStreamWaitEvent(None, a, 9)
    s.cuStreamWaitEvent(None, None, 0)
    s.cuEventQuery(None)
    s.cuEventDestroy_v2(None)
    s.cuEventDestroy_v2(a)


# Copies and settings.


@sequence
def setting_memory(s):
    a = s.allocate("a", BLOCK)
    for bytes_ in (0, 1, BLOCK, BLOCK + 1, BLOCK + GRANULE, FAR, (1 << 64) - 1):
        s.cuMemsetD8_v2(a, 1, bytes_)
    s.cuMemsetD8_v2(a + (BLOCK - 1), 1, 2)
    s.cuMemsetD8_v2(a + BLOCK, 1, 0)
    s.cuMemsetD8_v2(a + BLOCK, 1, 1)
    s.cuMemsetD16_v2(a + 1, 1, 2)
    s.cuMemsetD32_v2(a + 2, 1, 2)
    s.cuMemsetD32_v2(a, 1, BLOCK // 4)
    s.cuMemsetD32_v2(a, 1, BLOCK // 4 + 1)
    s.cuMemsetD32_v2(a, 1, (1 << 62) + 1)
    s.cuMemsetD2D8_v2(a, 512, 1, 512, BLOCK // 512)
    s.cuMemsetD2D8_v2(a, 512, 1, 513, 2)
    s.cuMemsetD2D8_v2(a, 512, 1, 512, BLOCK // 512 + 1)
    s.cuMemsetD2D8_v2(a, 0, 1, 16, 1)
    for pointer in (Named(0, "0"), GARBAGE):
        s.cuMemsetD8_v2(pointer, 1, 0)
        s.cuMemsetD8_v2(pointer, 1, 16)
        s.cuMemsetD8Async(pointer, 1, 16, None)
    s.cuMemsetD8Async(a, 1, BLOCK + 1, None)
    s.cuMemsetD8Async(a, 1, 0, None)
    s.cuCtxSynchronize()


@sequence
def copying_memory(s):
    a, b = s.allocate("a", BLOCK), s.allocate("b", BLOCK)
    s.cuMemsetD8_v2(a, 7, BLOCK)
    host = s.out("raw")
    s.cuMemcpyDtoH_v2(host, a, 8)
    s.cuMemcpyDtoH_v2(host, a, 0)
    s.cuMemcpyDtoH_v2(None, a, 0)
    s.cuMemcpyDtoH_v2(host, a + (BLOCK - 8), 8)
    s.cuMemcpyDtoH_v2(s.out(), a + (BLOCK - 4), 8)
    s.cuMemcpyDtoH_v2(s.out(), a + BLOCK, 8)
    s.cuMemcpyDtoH_v2(s.out(), a + BLOCK, 0)
    s.cuMemcpyDtoH_v2(s.out(), GARBAGE, 8)
    s.cuMemcpyDtoH_v2(s.out(), Named(0, "0"), 8)
    s.cuMemcpyHtoD_v2(a, s.words(1), 8)
    s.cuMemcpyHtoD_v2(a, None, 0)
    s.cuMemcpyHtoD_v2(a + BLOCK, s.words(1), 8)
    s.cuMemcpyHtoD_v2(Named(0, "0"), s.words(1), 8)
    s.cuMemcpyDtoD_v2(a, b, BLOCK)
    s.cuMemcpyDtoD_v2(a, b, 0)
    s.cuMemcpyDtoD_v2(a, b, BLOCK + 1)
    s.cuMemcpyDtoD_v2(a, GARBAGE, 8)
    s.cuMemcpyDtoD_v2(a, a + 4, 64)
    s.cuMemcpy(a, b, 64)
    s.cuMemcpy(a, GARBAGE, 0)
    s.cuMemcpyDtoHAsync_v2(s.out(), a, 8, None)
    s.cuMemcpyDtoHAsync_v2(s.out(), a + BLOCK, 8, None)
    s.cuMemcpyDtoDAsync_v2(a, b, BLOCK + 1, None)
    s.cuCtxSynchronize()


@sequence
def advice_for_memory_that_is_not_managed(s):
    a = s.allocate("a", BLOCK)
    managed = s.allocate("managed", BLOCK, "cuMemAllocManaged", 1)
    own, _ = mapped(s, "own", BLOCK)
    for pointer in (a, managed, own, GARBAGE, Named(0, "0")):
        for advice in (0, 1, 3, 5, 9):
            s.cuMemAdvise(pointer, GRANULE, advice, 0)
            s.cuMemAdvise_v2(pointer, GRANULE, advice, Location(DEVICE, 0))
        s.cuMemPrefetchAsync(pointer, GRANULE, 0, None)
        s.cuMemPrefetchAsync(pointer, GRANULE, -1, None)
        s.cuMemPrefetchAsync(pointer, 0, 0, None)
        s.cuMemPrefetchAsync_v2(pointer, GRANULE, Location(DEVICE, 0), 0, None)
        s.cuStreamAttachMemAsync(None, pointer, 0, 1)
        for attribute in (0, 1, 2, 3, 4, 5, 99):
            s.cuMemRangeGetAttribute(s.out(), 4, attribute, pointer, GRANULE)
        s.cuMemRangeGetAttribute(s.out(), 4, 1, pointer, 0)
        s.cuMemRangeGetAttribute(None, 4, 1, pointer, GRANULE)
        place = s.out()
        sizes, attributes = s.words(4), s.words(1, width=4)
        s.cuMemRangeGetAttributes(s.words(place), sizes, attributes, 1, pointer, GRANULE, more=[place])
    s.cuCtxSynchronize()


@sequence
def managed_memory(s):
    s.cuMemAllocManaged(None, BLOCK, 1)
    for bytes_, flags in ((0, 1), (BLOCK, 0), (BLOCK, 2), (BLOCK, 3), (BLOCK, 4), (FAR, 1), (WRAPS, 1)):
        s.cuMemAllocManaged(s.out("amount"), bytes_, flags)


@sequence
def host_memory(s):
    s.cuMemAllocHost_v2(None, 4096)
    for bytes_ in (0, 1, 1 << 50, FAR, WRAPS):
        s.cuMemAllocHost_v2(s.out("amount"), bytes_)
        s.cuMemHostAlloc(s.out("amount"), bytes_, 0)
    s.cuMemHostAlloc(None, 4096, 0)
    s.cuMemHostAlloc(s.out("amount"), 4096, 0x80)
    s.cuMemFreeHost(None)
    s.cuMemFreeHost(GARBAGE)
    s.cuMemHostUnregister(None)
    s.cuMemHostUnregister(GARBAGE)
    s.cuMemHostRegister_v2(GARBAGE, 4096, 0)
    s.cuMemHostGetFlags(s.out(), None)
    s.cuMemHostGetDevicePointer_v2(s.out("address"), None, 0)


# Modules, devices, lookups.


@sequence
def modules(s):
    s.cuModuleLoadData(None, In(PTX + b"\0", "ptx"))
    s.cuModuleLoadData(s.out("handle:module"), None)
    s.cuModuleLoadData(s.out("handle:module"), In(b"rubbish\0" + bytes(256), "rubbish"))
    s.cuModuleLoad(s.out("handle:module"), s.text("/nowhere/at/all.cubin"))
    s.cuModuleLoad(s.out("handle:module"), None)
    s.cuModuleLoadFatBinary(s.out("handle:module"), None)
    s.cuLibraryLoadData(s.out("handle:library"), In(b"rubbish\0" + bytes(256), "rubbish"), None, None, 0, None, None, 0)
    place = s.handle("module", "module")
    s.cuModuleLoadData(place, In(PTX + b"\0", "ptx"))
    module = Named(place.value, "module")
    s.cuModuleGetFunction(s.out("handle:function"), module, s.text("missing"))
    s.cuModuleGetFunction(s.out("handle:function"), module, None)
    s.cuModuleGetFunction(None, module, s.text("empty"))
    function = s.handle("function", "empty")
    s.cuModuleGetFunction(function, module, s.text("empty"))
    s.each_null("cuModuleGetGlobal_v2", s.out("amount"), s.out(), module, s.text("word"))
    s.cuModuleGetGlobal_v2(s.out("amount"), s.out(), module, s.text("missing"))
    s.each_null("cuModuleGetLoadingMode", s.out())
    empty = Named(function.value, "empty")
    s.cuFuncGetAttribute(s.out(), 99, empty)
    s.cuFuncGetAttribute(None, 0, empty)
    s.cuFuncGetAttribute(s.out(), 0, empty)
    s.cuFuncGetModule(s.out("handle:module"), empty)
    s.cuFuncSetAttribute(empty, 8, 1 << 30)
    s.each_null("cuOccupancyMaxActiveBlocksPerMultiprocessor", s.out(), empty, 128, 0)
    s.cuOccupancyMaxActiveBlocksPerMultiprocessor(s.out(), empty, 0, 0)
    s.cuOccupancyMaxActiveBlocksPerMultiprocessor(s.out(), empty, 1 << 20, 0)
    s.each_null("cuOccupancyMaxPotentialBlockSize", s.out(), s.out(), empty, None, 0, 0)
    s.each_null("cuOccupancyAvailableDynamicSMemPerBlock", s.out(), empty, 1, 128)
    s.cuModuleUnload(None)
    s.cuModuleUnload(module)


@sequence(variants=["cuModuleUnload", "cuModuleGetFunction", "cuLaunchKernel"])
def unloaded_modules(s, function):
    place = s.handle("module", "module")
    s.cuModuleLoadData(place, In(PTX + b"\0", "ptx"))
    module, empty = Named(place.value, "module"), s.handle("function", "empty")
    s.cuModuleGetFunction(empty, module, s.text("empty"))
    s.cuModuleUnload(module)
    arguments = {
        "cuModuleUnload": (module,),
        "cuModuleGetFunction": (s.out("handle:function"), module, s.text("empty")),
        "cuLaunchKernel": (Named(empty.value, "empty"), 1, 1, 1, 1, 1, 1, 0, None, None, None),
    }
    s.call(function, *arguments[function])


@sequence
def devices(s):
    s.each_null("cuDriverGetVersion", s.out())
    s.each_null("cuDeviceGetCount", s.out())
    for ordinal in (0, 99, -1):
        s.each_null("cuDeviceGet", s.out(), ordinal)
        s.cuDeviceGetName(s.out("text"), 100, ordinal)
        s.cuDeviceGetUuid_v2(s.out("opaque"), ordinal)
        s.cuDeviceComputeCapability(s.out(), s.out(), ordinal)
        s.cuDeviceGetAttribute(s.out(), 1, ordinal)
        s.cuDeviceGetPCIBusId(s.out("opaque"), 20, ordinal)
    s.cuDeviceGetName(None, 100, 0)
    s.cuDeviceGetName(s.out("text"), 0, 0)
    s.cuDeviceGetName(s.out("text"), 3, 0)
    for attribute in range(0, 160):
        s.cuDeviceGetAttribute(s.out("int"), attribute, 0)
    s.cuDeviceGetAttribute(None, 1, 0)
    for attribute in (0, 1, 2, 3, 4, 9):
        s.cuDeviceGetP2PAttribute(s.out("int"), attribute, 0, 0)
    s.cuDeviceGetP2PAttribute(s.out("int"), 1, 0, 99)
    s.cuDeviceGetP2PAttribute(None, 1, 0, 0)
    s.cuDeviceCanAccessPeer(s.out(), 0, 0)
    s.cuDeviceCanAccessPeer(s.out(), 0, 99)
    s.cuDeviceCanAccessPeer(None, 0, 0)
    s.cuCtxEnablePeerAccess(s.context, 0)
    s.cuCtxEnablePeerAccess(None, 0)
    s.cuCtxDisablePeerAccess(s.context)


@sequence
def memory_of_graphs(s):
    for attribute in (0, 1, 2, 3, 9):
        s.cuDeviceGetGraphMemAttribute(0, attribute, s.out())
        s.cuDeviceSetGraphMemAttribute(0, attribute, s.words(0))
        s.cuDeviceSetGraphMemAttribute(0, attribute, s.words(1))
    s.cuDeviceGetGraphMemAttribute(0, 0, None)
    s.cuDeviceGetGraphMemAttribute(99, 0, s.out())
    s.cuDeviceGraphMemTrim(0)
    s.cuDeviceGraphMemTrim(99)
    s.cuGraphCreate(None, 0)
    s.cuGraphCreate(s.out("handle:graph"), 9)
    graph = s.handle("graph", "graph")
    s.cuGraphCreate(graph, 0)
    made = Named(graph.value, "graph")
    s.cuGraphGetNodes(made, None, s.out())
    s.cuGraphGetNodes(made, None, None)
    s.cuGraphAddEmptyNode(s.out("handle:node"), made, None, 0)
    s.cuGraphAddEmptyNode(None, made, None, 0)
    executable = s.handle("exec", "executable")
    s.cuGraphInstantiateWithFlags(executable, made, 0)
    s.cuGraphInstantiateWithFlags(None, made, 0)
    s.cuGraphInstantiateWithFlags(s.out("handle:exec"), None, 0)
    s.cuGraphLaunch(Named(executable.value, "executable"), None)
    s.cuCtxSynchronize()
    s.cuGraphExecDestroy(Named(executable.value, "executable"))
    s.cuGraphDestroy(made)
    s.cuGraphDestroy(None)
    s.cuGraphLaunch(None, None)


@sequence
def captures(s):
    stream = s.handle("stream", "stream")
    s.cuStreamCreate(stream, 1)
    made = Named(stream.value, "stream")
    s.cuStreamEndCapture(made, s.out("handle:graph"))
    s.cuStreamBeginCapture_v2(None, 0)
    s.cuStreamBeginCapture_v2(made, 9)
    s.cuStreamBeginCapture_v2(made, 2)
    s.cuStreamBeginCapture_v2(made, 2)
    s.cuStreamIsCapturing(made, s.out())
    s.cuMemsetD8Async(s.ballast, 1, 4096, made)
    a = s.allocate("a", BLOCK)
    s.cuMemGetAddressRange_v2(s.out("address"), s.out(), a)
    s.cuPointerGetAttribute(s.out(), 2, a, note="MEMORY_TYPE")
    ordered = s.allocate("ordered", BLOCK, "cuMemAllocAsync", made)
    s.cuMemFreeAsync(ordered, made)
    s.cuStreamEndCapture(made, None)
    s.cuStreamEndCapture(made, s.out("handle:graph"))
    s.cuStreamQuery(made)
    s.cuStreamDestroy_v2(made)


# Calls that may be unsafe while a stream captures, each with what it is given: memory that is there, a mapping, a stream of
# its own, host memory. What is made has a name: by when it was first seen, a handle would be told by which calls before it
# were refused, and by which handles the driver takes again.
def made_and_destroyed(s):
    """An array of 4 MiB."""
    place = s.handle("array", "array")
    s.cuArrayCreate_v2(place, array_of_floats(1024, 1024))
    s.cuArrayDestroy(Named(place.value, "array"))


MADE_MEANWHILE = {
    "cuMemAlloc_v2": lambda s, of: of.make("cuMemAlloc_v2", BLOCK),
    "cuMemAllocPitch_v2": lambda s, of: of.make("cuMemAllocPitch_v2", s.out(), 100, 10, 4),
    "cuMemAllocManaged": lambda s, of: of.make("cuMemAllocManaged", BLOCK, 1),
    "cuArrayCreate_v2": lambda s, of: made_and_destroyed(s),
    "cuMemFree_v2": lambda s, of: s.cuMemFree_v2(of.memory),
    "cuMemFree_v2 of nothing": lambda s, of: s.cuMemFree_v2(None),
    "cuMemFree_v2 of ordered memory": lambda s, of: s.cuMemFree_v2(of.ordered),
    "cuMemAllocAsync": lambda s, of: of.make("cuMemAllocAsync", BLOCK, of.other),
    "cuMemFreeAsync": lambda s, of: s.cuMemFreeAsync(of.ordered, of.other),
    "cuMemPoolTrimTo": lambda s, of: s.cuMemPoolTrimTo(of.pool, 0),
    "cuMemGetInfo_v2": lambda s, of: s.cuMemGetInfo_v2(s.out("amount"), s.out("amount")),
    "cuPointerGetAttribute": lambda s, of: s.cuPointerGetAttribute(s.out(), 2, of.memory, note="MEMORY_TYPE"),
    "cuMemGetAddressRange_v2": lambda s, of: s.cuMemGetAddressRange_v2(s.out("address"), s.out(), of.memory),
    "cuMemCreate": lambda s, of: s.cuMemCreate(s.handle("physical", "made"), GRANULE, properties(), 0),
    "cuMemAddressReserve": lambda s, of: s.cuMemAddressReserve(s.out("address", "reserved"), GRANULE, 0, 0, 0),
    "cuMemSetAccess": lambda s, of: s.cuMemSetAccess(of.mapped, BLOCK, access((DEVICE, 0, READ)), 1),
    "cuMemUnmap": lambda s, of: s.cuMemUnmap(of.mapped, BLOCK),
    "cuMemRelease": lambda s, of: s.cuMemRelease(of.physical),
    "cuIpcGetMemHandle": lambda s, of: s.cuIpcGetMemHandle(s.out("opaque"), of.memory),
    "cuMemsetD8_v2": lambda s, of: s.cuMemsetD8_v2(of.memory, 1, BLOCK),
    "cuMemcpyDtoH_v2": lambda s, of: s.cuMemcpyDtoH_v2(s.out(), of.memory, 1),
    "cuMemcpyDtoD_v2": lambda s, of: s.cuMemcpyDtoD_v2(of.memory, of.memory + MIB, MIB),
    "cuStreamCreate": lambda s, of: s.cuStreamCreate(s.handle("stream", "made"), 1),
    "cuStreamQuery": lambda s, of: s.cuStreamQuery(of.other),
    "cuStreamSynchronize": lambda s, of: s.cuStreamSynchronize(of.other),
    "cuEventQuery": lambda s, of: s.cuEventQuery(of.event),
    "cuEventSynchronize": lambda s, of: s.cuEventSynchronize(of.event),
    "cuCtxSynchronize": lambda s, of: s.cuCtxSynchronize(),
}


def objects(s):
    """What the calls are made of, anew: some of them end it."""
    of = types.SimpleNamespace(new=Named(0, "new"))

    def make(function, *arguments):
        place = s.out("address", "new", extent=BLOCK)
        s.call(function, place, *arguments)
        of.new = Named(place.value, "new")

    of.make = make
    of.memory = s.allocate("memory", BLOCK)
    of.ordered = s.allocate("ordered", BLOCK, "cuMemAllocAsync", None)
    of.mapped, of.physical = mapped(s, "mapped", BLOCK)
    pool, other, event = s.handle("pool", "pool"), s.handle("stream", "other"), s.handle("event", "event")
    s.cuDeviceGetDefaultMemPool(pool, 0)
    s.cuStreamCreate(other, 1)
    s.cuEventCreate(event, 2)
    of.pool, of.other, of.event = Named(pool.value, "pool"), Named(other.value, "other"), Named(event.value, "event")
    s.cuCtxSynchronize()
    return of


@sequence(variants=[f"{call},{mode}" for call in MADE_MEANWHILE for mode in range(3)])
def during_a_capture(s, variant):
    """By the capture's mode, the calling thread's own, and whether the calling thread is the one that captures."""
    made, mode = variant.split(",")
    for own, here in itertools.product((0, 1, 2), (True, False)):
        of = objects(s)
        place = s.handle("stream", "stream")
        s.cuStreamCreate(place, 1)
        stream = Named(place.value, "stream")
        s.cuStreamBeginCapture_v2(stream, int(mode))

        def call(of=of, own=own, here=here):
            if not here:
                s.cuCtxSetCurrent(s.context)
            s.cuThreadExchangeStreamCaptureMode(s.words(own, width=4))
            MADE_MEANWHILE[made](s, of)
            s.cuThreadExchangeStreamCaptureMode(s.words(0, width=4))

        if here:
            call()
        else:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        s.cuStreamIsCapturing(stream, s.out())
        s.cuStreamEndCapture(stream, s.handle("graph", "graph"))
        s.cuStreamDestroy_v2(stream)
        for pointer in (of.new, of.memory, of.ordered):
            s.free(pointer)
        s.cuMemUnmap(of.mapped, BLOCK)
        s.cuMemRelease(of.physical)
        s.cuMemAddressFree(of.mapped, BLOCK)
        s.forget("mapped")


@sequence
def names_of_errors(s):
    for code in (0, 1, 2, 201, 700, 802, 999, 12345, -1):
        s.each_null("cuGetErrorName", code, s.out("chars"))
        s.each_null("cuGetErrorString", code, s.out("chars"))


@sequence
def lookups(s):
    for symbol in ("cuMemAlloc", "cuMemGetInfo", "cuMemAllocAsync", "cuLaunchKernel", "cuGetProcAddress", "cuNoSuchThing", ""):
        for version in (13000, 12000, 11030, 2000, 0, -1, 99999):
            for flags in (0, 1, 2, 3, 9):
                s.cuGetProcAddress_v2(s.text(symbol), s.out("amount"), version, flags, s.out())
    s.cuGetProcAddress_v2(s.text("cuMemAlloc"), s.out("amount"), 12000, 0, None)
    s.cuGetProcAddress_v2(s.text("cuMemAlloc"), None, 12000, 0, s.out())
    s.cuGetProcAddress_v2(None, s.out("amount"), 12000, 0, s.out())
    s.cuGetProcAddress(s.text("cuMemAlloc"), s.out("amount"), 12000, 0)
    s.cuGetProcAddress(s.text("cuMemAlloc"), None, 12000, 0)
    s.cuGetProcAddress(None, s.out("amount"), 12000, 0)
    s.cuGetProcAddress(s.text("cuNoSuchThing"), s.out("amount"), 12000, 0)


@sequence
def out_of_memory(s):
    """Refused, and then as before."""
    for bytes_ in (1 << 42, 1 << 45):
        s.cuMemAlloc_v2(s.out("address"), bytes_)
        s.cuMemAllocAsync(s.out("address"), bytes_, None)
        s.cuMemAllocPitch_v2(s.out("address"), s.out(), bytes_, 2, 4)
        s.cuMemCreate(s.out("handle:physical"), bytes_, properties(), 0)
    a = s.allocate("a", BLOCK)
    s.cuMemsetD8_v2(a, 1, BLOCK)
    s.cuCtxSynchronize()


# The runtime.


def runtime():
    """The CUDA runtime, wherever this Python has one."""
    import glob
    import os

    places = [path for path in sys.path if path] + [os.environ.get("CUDA_HOME", "/usr/local/cuda")]
    patterns = ("nvidia/cu*/lib/libcudart.so.*", "nvidia/cuda_runtime/lib/libcudart.so.*", "lib64/libcudart.so*")
    found = [path for place in places for pattern in patterns for path in sorted(glob.glob(f"{place}/{pattern}"))]
    for name in [*found, "libcudart.so.13", "libcudart.so.12", "libcudart.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return ctypes.CDLL(None)


@sequence(context=False)
def runtime_calls(s):
    library = runtime()
    call = lambda function, *arguments: s.call(function, *arguments, library=library)
    call("cudaGetDeviceCount", s.out())
    call("cudaMemGetInfo", None, s.out("amount"))
    call("cudaMemGetInfo", s.out("amount"), None)
    call("cudaMemGetInfo", None, None)
    call("cudaMemGetInfo", s.out("amount"), s.out("amount"))
    call("cudaMalloc", None, 4096)
    for bytes_ in (0, FAR, WRAPS):
        call("cudaMalloc", s.out("amount"), bytes_)
    a = s.out("address", "a", extent=BLOCK)
    call("cudaMalloc", a, BLOCK)
    pointer = Named(a.value, "a")
    for at in (pointer, pointer + 100, pointer + BLOCK, GARBAGE, Named(0, "0")):
        place = s.out("runtime attributes")
        call("cudaPointerGetAttributes", place, at)
    call("cudaPointerGetAttributes", None, pointer)
    call("cudaFree", pointer + 100)
    call("cudaFree", None)
    call("cudaMemset", pointer, 1, BLOCK + 1)
    call("cudaMemset", pointer, 1, 0)
    call("cudaFree", pointer)
    call("cudaFree", pointer)
    call("cudaMallocManaged", s.out("amount"), BLOCK, 1)
    call("cudaMallocAsync", s.out("amount"), BLOCK, None)
    call("cudaGetLastError")
    call("cudaPeekAtLastError")
    call("cudaDeviceSynchronize")
    call("cudaDeviceReset")
    call("cudaMemGetInfo", s.out("amount"), s.out("amount"))
    call("cudaPointerGetAttributes", s.out("runtime attributes"), pointer)
    call("cudaFree", pointer)
    call("cudaDeviceReset")


def main():
    name, pause = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    recorder = Recorder(pause)
    SEQUENCES[name](recorder)
    recorder.say(ended=True)


if __name__ == "__main__":
    main()
