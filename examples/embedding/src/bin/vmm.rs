//! A CUDA program that moves its memory itself, by the driver's virtual memory management through `cudarc`.
//!
//! Its addresses stay the same for as long as it runs; what is behind them comes and goes. A chunk is a piece of a reserved range of
//! addresses, and has physical memory (cuMemCreate) only while the client has granules for it. Kernels use the addresses and know
//! nothing of this.
//!
//! Not to be run with the preloaded library: that would make the same process a client twice. Under `nvshare run`, set NVSHARE_DISABLE=1.

use clap::Parser;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, DriverError, LaunchConfig, PushKernelArg, result, sys,
};
use cudarc::nvrtc::Ptx;
use nvshare::client::Runtime;
use nvshare::map::MappedPage;
use nvshare::page::Direction;
use nvshare::{Books, Fill, GRANULE, GpuUuid, Granules, Session};
use nvshare_embedding_examples::data::{self, Steps};
use nvshare_embedding_examples::{Common, ended, input_has_ended};
use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// Takes turns with other clients on a GPU, moving its memory itself, until its standard input ends
#[derive(Parser)]
#[command(max_term_width = 80)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// The GPU's number, as CUDA counts
    #[arg(long, default_value_t = 0)]
    ordinal: usize,
}

fn main() -> ExitCode {
    ended("embed-vmm", run(&Options::parse()))
}

/// A granule of memory.
enum Chunk {
    OnGpu(sys::CUmemGenericAllocationHandle),
    Evicted(Vec<u64>),
}

/// The program's memory: a range of addresses, and what is behind each granule of it.
struct Memory {
    context: Arc<CudaContext>,
    books: Books<MappedPage>,
    base: sys::CUdeviceptr,
    chunks: Mutex<Vec<Chunk>>,
}

impl Memory {
    /// Reserves addresses for `chunks` granules, which hold their first data in the host's memory.
    fn new(
        context: &Arc<CudaContext>,
        books: &Books<MappedPage>,
        chunks: Granules,
        seed: u64,
    ) -> Result<Self, DriverError> {
        let mut base = 0;
        let bytes = chunks as usize * GRANULE as usize;
        // SAFETY: `base` is there for the answer; addresses alone are no memory.
        unsafe { sys::cuMemAddressReserve(&mut base, bytes, 0, 0, 0) }.result()?;
        let chunks =
            (0..chunks as usize).map(|chunk| Chunk::Evicted(data::first(seed, chunk).collect())).collect();
        Ok(Self { context: context.clone(), books: books.clone(), base, chunks: Mutex::new(chunks) })
    }

    fn address(&self, chunk: usize) -> sys::CUdeviceptr {
        self.base + chunk as u64 * GRANULE
    }

    fn device(&self) -> sys::CUmemLocation {
        let mut location: sys::CUmemLocation = zeroed();
        location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        location.id = self.context.ordinal() as i32;
        location
    }

    /// Puts physical memory behind a chunk's addresses, and its data into it.
    fn map(&self, chunk: usize, words: &[u64]) -> Result<sys::CUmemGenericAllocationHandle, DriverError> {
        let mut properties: sys::CUmemAllocationProp = zeroed();
        properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location = self.device();
        let mut access: sys::CUmemAccessDesc = zeroed();
        access.location = self.device();
        access.flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let (address, bytes, mut handle) = (self.address(chunk), GRANULE as usize, 0);
        // SAFETY: all that is pointed to is there; the addresses are reserved and nothing is mapped there.
        unsafe {
            sys::cuMemCreate(&mut handle, bytes, &properties, 0).result()?;
            sys::cuMemMap(address, bytes, 0, handle, 0).result()?;
            sys::cuMemSetAccess(address, bytes, &access, 1).result()?;
            result::memcpy_htod_sync(address, words)?;
        }
        Ok(handle)
    }

    /// Takes a chunk's data to the host, and its physical memory away. Nothing on the GPU uses it.
    fn unmap(
        &self,
        chunk: usize,
        handle: sys::CUmemGenericAllocationHandle,
    ) -> Result<Vec<u64>, DriverError> {
        let (address, mut words) = (self.address(chunk), vec![0; data::WORDS]);
        // SAFETY: the chunk is mapped there, and no work is in flight: the client has drained.
        unsafe {
            result::memcpy_dtoh_sync(&mut words, address)?;
            sys::cuMemUnmap(address, GRANULE as usize).result()?;
            sys::cuMemRelease(handle).result()?;
        }
        Ok(words)
    }

    /// Brings chunks in for as long as `take` has a granule for the next one.
    fn bring_in(&self, take: impl Fn() -> Fill) -> Result<Fill, DriverError> {
        self.context.bind_to_thread()?;
        for (index, chunk) in self.lock().iter_mut().enumerate() {
            if let Chunk::Evicted(words) = chunk {
                if take() == Fill::Recalled {
                    return Ok(Fill::Recalled);
                }
                *chunk = Chunk::OnGpu(self.map(index, words)?);
                self.books.moved(Direction::In, GRANULE);
            }
        }
        Ok(Fill::Complete)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Chunk>> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Plain data of the driver's, of which zero is a value.
fn zeroed<T: Copy>() -> T {
    // SAFETY: used for the driver's structs alone, which are integers, enums with a zero, and null pointers.
    unsafe { std::mem::zeroed() }
}

impl Drop for Memory {
    /// In the session's thread, before the client leaves.
    fn drop(&mut self) {
        let chunks = std::mem::take(&mut *self.lock());
        if self.context.bind_to_thread().is_err() {
            return;
        }
        for (index, chunk) in chunks.iter().enumerate() {
            if let Chunk::OnGpu(handle) = chunk {
                let _ = self.unmap(index, *handle);
            }
        }
        // SAFETY: nothing is mapped there any more, and nobody has the addresses.
        let _ = unsafe { sys::cuMemAddressFree(self.base, chunks.len() * GRANULE as usize) }.result();
    }
}

/// The runtime: the same memory, in the session's thread.
struct Moves(Arc<Memory>);

impl Runtime for Moves {
    type Error = DriverError;

    fn fill(&mut self) -> Result<Fill, DriverError> {
        self.0.bring_in(|| self.0.books.take(1))
    }

    fn prefetch(&mut self) -> Result<(), DriverError> {
        let take = || if self.0.books.take_ahead(1) { Fill::Complete } else { Fill::Recalled };
        self.0.bring_in(take).map(drop)
    }

    fn evict(&mut self, granules: Granules) -> Result<(), DriverError> {
        let memory = &self.0;
        memory.context.bind_to_thread()?;
        let mut left = granules;
        for (index, chunk) in memory.lock().iter_mut().enumerate() {
            if let Chunk::OnGpu(handle) = chunk
                && left > 0
            {
                *chunk = Chunk::Evicted(memory.unmap(index, *handle)?);
                memory.books.moved(Direction::Out, GRANULE);
                memory.books.give(1);
                left -= 1;
            }
        }
        Ok(())
    }
}

/// The kernel and its stream.
struct Work {
    affine: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Work {
    /// One step over all memory. Waits for its end: the pass is dropped only after that.
    fn step(&self, memory: &Memory, chunks: usize, step: u64) -> Result<(), DriverError> {
        let (words, grid) = (data::WORDS as u64, LaunchConfig::for_num_elems(data::WORDS as u32));
        for chunk in 0..chunks {
            let address = memory.address(chunk);
            // SAFETY: the kernel takes an address, a number of words that are there, and a number.
            unsafe {
                self.stream.launch_builder(&self.affine).arg(&address).arg(&words).arg(&step).launch(grid)?
            };
        }
        self.stream.synchronize()
    }
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    // The context first: what the process has on the GPU when it registers is its context.
    let context = CudaContext::new(options.ordinal)?;
    let module = context.load_module(Ptx::from_src(include_str!("../../../../tests/simcuda/kernels.ptx")))?;
    let work = Work { affine: module.load_function("nvshare_affine_u64")?, stream: context.new_stream()? };
    let uuid = result::device::get_uuid(context.cu_device())?;
    let client = options.common.register("vmm", Some(GpuUuid(uuid.bytes.map(|byte| byte as u8))))?;

    let chunks = options.common.granules();
    let memory = Arc::new(Memory::new(&context, client.books(), chunks, options.common.seed)?);
    let session = Session::start(client, Moves(memory.clone()))?;
    session.grow(chunks, || ())?;
    println!("client in slot {} of {}", session.books().slot().get(), session.books().page().gpu());

    let (stop, mut steps) = (input_has_ended(), Steps::default());
    while !stop.load(Ordering::Relaxed) {
        let pass = session.enter()?;
        while !pass.should_yield() && !stop.load(Ordering::Relaxed) {
            work.step(&memory, chunks as usize, steps.count)?;
            steps.step();
        }
    }

    let pass = session.enter()?;
    for chunk in 0..chunks as usize {
        let mut found = vec![0; data::WORDS];
        // SAFETY: the chunk is mapped, because there is a pass, and nothing else is in flight.
        unsafe { result::memcpy_dtoh_sync(&mut found, memory.address(chunk))? };
        steps.check(options.common.seed, chunk, &found)?;
    }
    println!("right after {} steps", steps.count);
    drop((pass, memory));
    session.close()?;
    Ok(())
}
