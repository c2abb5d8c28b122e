//! The edge to C: return codes, pointers that callers pass, and the structs of `nvml.h`.
//!
//! A pointer argument arrives as an [`Out`] or a [`Text`]. Only a caller across the C ABI makes one, and it promises
//! what `nvml.h` asks for: the pointer is null or valid for its type. The unsafe blocks here lean on that promise.

use std::ffi::{CStr, c_char, c_uint};

/// An `nvmlReturn_t` other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error(pub c_uint);

impl Error {
    pub const UNINITIALIZED: Error = Error(1);
    pub const INVALID_ARGUMENT: Error = Error(2);
    pub const NOT_SUPPORTED: Error = Error(3);
    pub const NOT_FOUND: Error = Error(6);
    pub const INSUFFICIENT_SIZE: Error = Error(7);
    pub const DRIVER_NOT_LOADED: Error = Error(9);
    pub const TIMEOUT: Error = Error(10);
    pub const GPU_IS_LOST: Error = Error(15);
    pub const VERSION_MISMATCH: Error = Error(25);
}

/// What a function comes to.
pub type Result<T = ()> = std::result::Result<T, Error>;

/// A place for an answer.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Out<T> {}

impl<T> Out<T> {
    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    pub fn set(self, value: T) -> Result {
        self.fill([value])
    }

    /// Writes values one after the other; the caller has checked that there is room.
    pub fn fill(self, values: impl IntoIterator<Item = T>) -> Result {
        if self.0.is_null() {
            return Err(Error::INVALID_ARGUMENT);
        }
        for (i, value) in values.into_iter().enumerate() {
            // SAFETY: not null, so the caller of the C function promises as many places as it said.
            unsafe { self.0.add(i).write_unaligned(value) }
        }
        Ok(())
    }
}

impl<T: Copy> Out<T> {
    /// Reads what an in-out argument holds.
    pub fn get(self) -> Result<T> {
        if self.0.is_null() {
            return Err(Error::INVALID_ARGUMENT);
        }
        // SAFETY: not null, so the caller of the C function promises an initialised value.
        Ok(unsafe { self.0.read_unaligned() })
    }
}

/// A C string that the caller passes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Text(*const c_char);

impl Text {
    pub fn get(self) -> Result<String> {
        if self.0.is_null() {
            return Err(Error::INVALID_ARGUMENT);
        }
        // SAFETY: not null, so the caller promises a string that ends in a zero byte.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}

/// Writes a C string into a buffer of `len` bytes, all of it or nothing.
pub fn set_text(buffer: Out<c_char>, len: c_uint, text: &str) -> Result {
    if text.len() >= len as usize {
        return Err(Error::INSUFFICIENT_SIZE);
    }
    buffer.fill(text.bytes().map(|byte| byte as c_char).chain([0]))
}

/// `nvmlMemory_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Memory {
    pub total: u64,
    pub free: u64,
    pub used: u64,
}

/// `nvmlMemory_v2_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemoryV2 {
    pub version: c_uint,
    pub total: u64,
    pub reserved: u64,
    pub free: u64,
    pub used: u64,
}

/// `nvmlUtilization_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Utilization {
    pub gpu: c_uint,
    pub memory: c_uint,
}

/// `nvmlProcessInfo_v1_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ProcessV1 {
    pub pid: c_uint,
    pub used: u64,
}

/// `nvmlProcessInfo_t` of the second and third version.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Process {
    pub pid: c_uint,
    pub used: u64,
    pub gpu_instance: c_uint,
    pub compute_instance: c_uint,
}

/// `nvmlPciInfo_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct PciInfo {
    pub bus_id_legacy: [c_char; 16],
    pub domain: c_uint,
    pub bus: c_uint,
    pub device: c_uint,
    pub pci_device_id: c_uint,
    pub pci_subsystem_id: c_uint,
    pub bus_id: [c_char; 32],
}
