"""The differences from the driver's own answers that are meant to be, each with its reason: that reason goes to
docs/compatibility.md. Whatever is not listed here is a fault.

`call`, `native` and `shared` are regular expressions for the call as it is told, the driver's own answer, and that under
nvshare; each has to match the whole text. `sequence` says where, if it matters.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Explained:
    why: str
    call: str
    native: str = ".*"
    shared: str = ".*"
    sequence: str = ".*"

    def fits(self, sequence, call, native, shared):
        pairs = ((self.sequence, sequence), (self.call, call), (self.native, native), (self.shared, shared))
        return all(re.fullmatch(pattern, text, re.DOTALL) for pattern, text in pairs)


# Attributes 15 and 21 in a list of all.
RDMA = r"cuPointerGetAttribute\(out, 15, .*"
DECOMPRESS = r"cuPointerGetAttribute\(out, 21, .*"
ALL = r"cuPointerGetAttributes\(20, .*"

EXPLAINED = [
    Explained(
        "Memory moves, and a network card cannot be told. cuMemGetHandleForAddressRange makes an allocation stay, and gives "
        "the card a dma-buf of it",
        RDMA,
        r"SUCCESS \(1 in 4 bytes\)",
        r"SUCCESS \(0 in 4 bytes\)",
    ),
    Explained(
        "The GPU's decompression engine needs memory that was made for it, which what nvshare maps is not",
        DECOMPRESS,
        r"SUCCESS \(1 in 4 bytes\)",
        r"SUCCESS \(0 in 4 bytes\)",
    ),
    Explained(
        "As for the two attributes by themselves: IS_GPU_DIRECT_RDMA_CAPABLE and IS_HW_DECOMPRESS_CAPABLE are 0",
        ALL,
        r"SUCCESS \(([^,]*, ){13}1 in 4 bytes, ([^,]*, ){5}1 in 4 bytes\)",
        r"SUCCESS \(([^,]*, ){13}0 in 4 bytes, ([^,]*, ){5}0 in 4 bytes\)",
    ),
    Explained(
        "Where an allocation lies is nobody's to rely on: another one, or memory that nvshare needs for itself, may begin where "
        "it ends",
        r"(cuPointerGetAttribute|cuMemHostGetDevicePointer_v2|cuMemcpyDtoH_v2)\(.*a\+(6MiB|150MiB|1MiB|6291452).*",
        r"INVALID_VALUE.*",
        r"SUCCESS.*",
    ),
    Explained(
        "What is freed is kept for up to a second for the next allocation of its size, and until then a use of it is not refused",
        r"cuMem(set|cpy).*",
        r"(INVALID_VALUE|ILLEGAL_ADDRESS).*",
        r"SUCCESS.*",
        r"frees",
    ),
    Explained(
        "Small host allocations share a block of the driver's, nvshare's own among them",
        r"cuPointerGetAttributes?\(.*a\+100\).*",
        r"SUCCESS.*",
        r"SUCCESS.*",
        r"pointer_to_host_memory.*",
    ),
    Explained(
        "A stream that was destroyed: the driver looks into memory that it has freed, and what it finds there is chance",
        r".*\bstream\b.*",
        sequence=r"destroyed_streams.*",
    ),
    Explained(
        "A context that was destroyed: natively the call ends the process too, at once or when the process ends",
        r".*\bsecond\b.*|the end of the process",
        r"SUCCESS.*|signal \d+",
        r"signal \d+|not reached",
        r"destroyed_contexts.*",
    ),
    Explained(
        "The driver does not see that the number of bytes overflows: it takes the memset, which then breaks the context. Under "
        "nvshare it is refused",
        r"cuMemsetD(8|32)_v2\(a, 1, (18446744073709551615|4611686018427387905)\)",
        r"SUCCESS",
        r"INVALID_VALUE",
        r"setting_memory",
    ),
    Explained(
        "After the memset that natively breaks the context",
        r"cuCtxSynchronize\(\)",
        r"ILLEGAL_ADDRESS",
        r"SUCCESS",
        r"setting_memory",
    ),
    Explained(
        "In a process that is broken no memory can be moved any more. Once others want the GPU it gives its memory up, and then "
        "even questions fail with the error that broke it",
        r"(cuPointer|cuMemGetAccess|cuMemAllocManaged\(out, 0|cuMemPool|cuIpcGetMemHandle).*",
        shared=r"ILLEGAL_ADDRESS.*",
        sequence=r"in_a_broken_context",
    ),
    Explained(
        "What only the driver can place needs room on the GPU that stays. While a capture is open nobody can be made to give "
        "room up in a turn of the GPU, and room in host memory is of no use",
        r"(cuMemAllocManaged|cuArrayCreate_v2)\(.*",
        r"SUCCESS.*",
        r"OUT_OF_MEMORY.*",
        r"during_a_capture.*",
    ),
    Explained(
        "The array that was not made",
        r"cuArrayDestroy\(array\)",
        r"SUCCESS",
        r"INVALID_HANDLE",
        r"during_a_capture.*",
    ),
    Explained(
        "Natively the call crashes the process; under nvshare it is refused",
        r".*",
        r"signal 11",
        r"INVALID_VALUE.*",
    ),
    Explained(
        "After a call that crashes the process natively",
        r".*",
        r"",
        r".*",
        r"(rubbish_as|released_and_mapped|destroyed).*",
    ),
]


def why(sequence, call, native, shared):
    """The reason of a difference, or None."""
    return next((known.why for known in EXPLAINED if known.fits(sequence, call, native, shared)), None)
