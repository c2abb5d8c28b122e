"""The structures of cuda.h that the sequences pass, and numbers that it names."""

import ctypes
import struct

from recorder import In

DEVICE, HOST, HOST_NUMA, HOST_NUMA_CURRENT = 1, 2, 3, 4
PINNED = 1
FILE_DESCRIPTOR = 1
READ, READ_WRITE = 1, 3
FLOAT = 0x20

# CUpointer_attribute, by number, and how its answer is told.
POINTER_ATTRIBUTES = {
    0: ("(none)", "raw"),
    1: ("CONTEXT", "handle:context"),
    2: ("MEMORY_TYPE", "raw"),
    3: ("DEVICE_POINTER", "address"),
    4: ("HOST_POINTER", "host"),
    5: ("P2P_TOKENS", "opaque"),
    6: ("SYNC_MEMOPS", "raw"),
    7: ("BUFFER_ID", "handle:buffer"),
    8: ("IS_MANAGED", "raw"),
    9: ("DEVICE_ORDINAL", "int"),
    10: ("IS_LEGACY_CUDA_IPC_CAPABLE", "raw"),
    11: ("RANGE_START_ADDR", "address"),
    12: ("RANGE_SIZE", "raw"),
    13: ("MAPPED", "raw"),
    14: ("ALLOWED_HANDLE_TYPES", "raw"),
    15: ("IS_GPU_DIRECT_RDMA_CAPABLE", "raw"),
    16: ("ACCESS_FLAGS", "raw"),
    17: ("MEMPOOL_HANDLE", "handle:pool"),
    18: ("MAPPING_SIZE", "raw"),
    19: ("MAPPING_BASE_ADDR", "address"),
    20: ("MEMORY_BLOCK_ID", "handle:block"),
    21: ("IS_HW_DECOMPRESS_CAPABLE", "raw"),
    22: ("(unknown)", "raw"),
    255: ("(unknown)", "raw"),
}


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("kind", ctypes.c_int), ("id", ctypes.c_int)]

    @property
    def label(self):
        return f"location {self.kind} {self.id}"


class AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


class PoolProps(ctypes.Structure):
    """CUmemPoolProps."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32", ctypes.c_void_p),
        ("max_size", ctypes.c_size_t),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 54),
    ]


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle and CUipcEventHandle."""

    _fields_ = [("reserved", ctypes.c_ubyte * 64)]
    label = "handle"


def properties(handle_types=0, location=(DEVICE, 0), kind=PINNED):
    made = AllocationProp(kind=kind, handle_types=handle_types, location=Location(*location))
    told = f"kind {kind} for {handle_types} on {location[0]} {location[1]}"
    return In(made, "{" + told + "}")


def array_of_floats(width, height):
    """A description of an array of two dimensions, whose elements are one float each."""
    return In(struct.pack("QQII", width, height, FLOAT, 1), f"{{{width} x {height} floats}}")


def access(*wanted):
    """Access descriptors: (location kind, location id, flags) each."""
    data = b"".join(bytes(AccessDesc(Location(kind, id_), flags)) for kind, id_, flags in wanted)
    return In(data, "[" + ", ".join(f"{kind} {id_}: {flags}" for kind, id_, flags in wanted) + "]")


def pool_properties(handle_types=0, location=(DEVICE, 0), kind=PINNED, max_size=0):
    made = PoolProps(kind=kind, handle_types=handle_types, location=Location(*location), max_size=max_size)
    told = f"kind {kind} for {handle_types} on {location[0]} {location[1]}, at most {max_size}"
    return In(made, "{" + told + "}")
