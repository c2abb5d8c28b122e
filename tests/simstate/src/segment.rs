//! The shared segment: layout and attaching.
//!
//! A fresh segment is all zeros, and all zeros is a valid state of everything in it but the geometry word. Whoever
//! comes first sets that word with a compare-and-swap; everybody else must agree with it. So no process initialises
//! anything for others, and one that is killed in the middle of creating the segment leaves nothing half made: a file
//! without its size is given its size by the next one.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use shared_memory::{Shmem, ShmemConf, ShmemError};

use crate::config::{Config, ConfigError};
use crate::counters::Counters;
use crate::ledger::{Row, Slot};
use crate::shared::{MAX_SHARED, SharedSlot};
use crate::time::{Load, Timeline};

/// Most GPUs that a segment holds.
pub const MAX_GPUS: usize = 16;

/// Most processes that use one GPU at a time.
pub const MAX_PROCESSES: usize = 64;

const LAYOUT_VERSION: u64 = 2;

/// Why a process can't join the simulated machine.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A variable makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another machine has the name.
    #[error("{variable}={wanted}, but /dev/shm/{name} was created with {has}")]
    Geometry {
        /// The variable that disagrees.
        variable: &'static str,
        /// What this process asked for.
        wanted: u64,
        /// What the segment has.
        has: u64,
        /// The segment's name.
        name: String,
    },
    /// Another build of the simulated GPU made it.
    #[error("/dev/shm/{name} is of another build of the simulated GPU (layout {has}, not {wanted}); remove it", wanted = LAYOUT_VERSION)]
    Layout {
        /// The segment's layout.
        has: u64,
        /// Its name.
        name: String,
    },
    /// The system refused.
    #[error("cannot open /dev/shm/{name}: {reason}")]
    Open {
        /// The segment's name.
        name: String,
        /// What the system said.
        reason: String,
    },
}

/// One simulated GPU.
#[repr(C, align(64))]
pub struct Gpu {
    /// The compute engine.
    pub compute: Timeline,
    /// The copy engine from the host.
    pub copy_in: Timeline,
    /// The copy engine to the host.
    pub copy_out: Timeline,
    /// How busy the compute engine was.
    pub compute_load: Load,
    /// How busy the copy engines were.
    pub copy_load: Load,
    pub(crate) epoch: Slot,
    /// How many allocations have been shared: the next one's number.
    pub(crate) shares: Slot,
    pub(crate) rows: [Row; MAX_PROCESSES],
    pub(crate) shared: [SharedSlot; MAX_SHARED],
}

impl Gpu {
    /// What happened on this GPU since the segment was made.
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        for row in &self.rows {
            row.counters.add_to(&mut sum);
        }
        sum
    }
}

/// The geometry in a word, set once: layout version, number of GPUs, KiB of memory of each.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Geometry {
    version: u64,
    gpus: u64,
    kib: u64,
}

impl Geometry {
    fn from_bits(bits: u64) -> Geometry {
        Geometry { version: bits >> 56, gpus: bits >> 48 & 0xff, kib: bits & 0xffff_ffff_ffff }
    }

    fn bits(self) -> u64 {
        self.version << 56 | self.gpus << 48 | self.kib & 0xffff_ffff_ffff
    }
}

#[repr(C, align(64))]
struct Layout {
    geometry: AtomicU64,
    gpus: [Gpu; MAX_GPUS],
}

/// A segment that this process has joined.
#[derive(Clone)]
pub struct Segment {
    name: String,
    ascending_uuids: bool,
    layout: &'static Layout,
}

impl Segment {
    /// Joins the machine that `config` names, which is created if there is none.
    pub fn attach(config: &Config) -> Result<Segment, AttachError> {
        let layout = map(&config.name)?;
        let segment = Segment { name: config.name.clone(), ascending_uuids: config.ascending_uuids, layout };
        let mine = Geometry {
            version: LAYOUT_VERSION,
            gpus: u64::from(config.gpus.unwrap_or(1)),
            kib: config.memory.unwrap_or(Config::DEFAULT_MEMORY) >> 10,
        };
        let has = match layout.geometry.compare_exchange(0, mine.bits(), SeqCst, SeqCst) {
            Ok(_) => mine,
            Err(bits) => Geometry::from_bits(bits),
        };
        let name = config.name.clone();
        if has.version != LAYOUT_VERSION {
            return Err(AttachError::Layout { has: has.version, name });
        }
        if config.gpus.is_some() && has.gpus != mine.gpus {
            let variable = "NVSHARE_SIM_GPUS";
            return Err(AttachError::Geometry { variable, wanted: mine.gpus, has: has.gpus, name });
        }
        if config.memory.is_some() && has.kib != mine.kib {
            let (wanted, has) = (mine.kib << 10, has.kib << 10);
            return Err(AttachError::Geometry { variable: "NVSHARE_SIM_MEMORY", wanted, has, name });
        }
        Ok(segment)
    }

    /// Joins the machine that the environment describes.
    pub fn from_env() -> Result<(Config, Segment), AttachError> {
        let config = Config::from_env()?;
        let segment = Segment::attach(&config)?;
        Ok((config, segment))
    }

    fn geometry(&self) -> Geometry {
        Geometry::from_bits(self.layout.geometry.load(SeqCst))
    }

    /// Its name, that of the file in `/dev/shm`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many GPUs it has.
    pub fn gpu_count(&self) -> usize {
        (self.geometry().gpus as usize).clamp(1, MAX_GPUS)
    }

    /// Bytes of memory of each.
    pub fn memory(&self) -> u64 {
        self.geometry().kib << 10
    }

    /// The GPU of that number.
    pub fn gpu(&self, index: usize) -> Option<&'static Gpu> {
        self.layout.gpus[..self.gpu_count()].get(index)
    }

    /// A GPU's UUID: the same for the same name and number (and `NVSHARE_SIM_UUIDS`), so that CUDA and NVML agree.
    pub fn uuid(&self, index: usize) -> [u8; 16] {
        // FNV-1a over name and number, once for each half.
        let hash = |seed: u64| {
            let bytes = self.name.bytes().chain((index as u64).to_le_bytes());
            bytes.fold(0xcbf2_9ce4_8422_2325 ^ seed, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            })
        };
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&hash(0).to_be_bytes());
        uuid[8..].copy_from_slice(&hash(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        if self.ascending_uuids {
            uuid[0] = index as u8;
        }
        uuid
    }

    /// The UUID as NVML writes it: `GPU-` and five groups of hexadecimal digits.
    pub fn uuid_text(&self, index: usize) -> String {
        let hex: String = self.uuid(index).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }

    /// The PCI bus of a GPU; domain and device are always 0.
    pub fn pci_bus(&self, index: usize) -> u32 {
        1 + index as u32
    }
}

/// Removes the segment's file. Processes that have joined keep their mapping; the next ones begin anew.
pub fn unlink(name: &str) -> std::io::Result<()> {
    std::fs::remove_file(format!("/dev/shm/{name}"))
}

fn map(name: &str) -> Result<&'static Layout, AttachError> {
    let size = size_of::<Layout>();
    let open = |reason: String| AttachError::Open { name: name.to_string(), reason };
    let mut last = String::new();
    for _ in 0..100 {
        let attempt = match ShmemConf::new().os_id(name).size(size).create() {
            Err(ShmemError::MappingIdExists | ShmemError::LinkExists) => {
                // Its creator may not have come to size it yet, and may be dead. Sizing it again changes nothing.
                if let Ok(file) = std::fs::File::options().write(true).open(format!("/dev/shm/{name}"))
                    && file.metadata().is_ok_and(|meta| meta.len() == 0)
                {
                    file.set_len(size as u64).map_err(|e| open(e.to_string()))?;
                }
                ShmemConf::new().os_id(name).open()
            }
            other => other,
        };
        match attempt {
            Ok(shmem) if shmem.len() >= size => return Ok(leak(shmem)),
            Ok(shmem) => {
                return Err(open(format!("{} bytes, {size} expected: remove it", shmem.len())));
            }
            // Unlinked or created between the two looks.
            Err(error) => last = error.to_string(),
        }
        std::thread::yield_now();
    }
    Err(open(last))
}

fn leak(mut shmem: Shmem) -> &'static Layout {
    shmem.set_owner(false);
    let layout = shmem.as_ptr().cast::<Layout>();
    std::mem::forget(shmem);
    // SAFETY: the mapping is at least as long as a layout (checked by the caller), page-aligned, and stays for good
    // because its owner was forgotten. A layout is made of atomics only, for which any bytes are valid and which
    // other processes may change at any time.
    unsafe { &*layout }
}
