//! Modules, libraries, functions and launches.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use simstate::counters::Count;

use super::driver_api;
use crate::abi::{Error, Handle, In, KernelNodeParams, LaunchConfig, Out, Result, Text};
use crate::context::{self, Null};
use crate::driver::driver;
use crate::handles::Cache;
use crate::kernels::Launch;
use crate::module::{self, Function};
use crate::op::Op;

thread_local! {
    static LAST_FUNCTION: Cache<Function> = const { Cache::new() };
}

driver_api! {
    fn cuModuleLoad(module: Out<Handle>, file: Text) {
        let context = context::healthy()?;
        module.required()?;
        let image = std::fs::read(file.get()?).map_err(|_| Error::FILE_NOT_FOUND)?;
        let text = image.split(|&byte| byte == 0).next().unwrap_or_default();
        module.set(module::load(text, context.owner())?.handle)
    }

    fn cuModuleLoadData(module: Out<Handle>, image: In<c_void>) {
        self::load(module, image)
    }

    /// Options are for a compiler, and there is none.
    fn cuModuleLoadDataEx(
        module: Out<Handle>, image: In<c_void>, count: c_uint, options: In<c_uint>, values: In<usize>,
    ) {
        let _ = (count, options, values);
        self::load(module, image)
    }

    fn cuModuleLoadFatBinary(module: Out<Handle>, image: In<c_void>) {
        self::load(module, image)
    }

    /// Options are for a compiler, and there is none.
    fn cuLinkCreate_v2(count: c_uint, options: In<c_uint>, values: In<usize>, linker: Out<Handle>) {
        let _ = (count, options, values);
        context::healthy()?;
        linker.required()?;
        linker.set(module::begin_link())
    }

    fn cuLinkAddData_v2(
        linker: Handle, kind: c_uint, data: In<c_void>, bytes: usize, name: In<c_char>,
        count: c_uint, options: In<c_uint>, values: In<usize>,
    ) {
        let _ = (name, count, options, values);
        const PTX: c_uint = 1;
        if kind != PTX {
            return Err(Error::INVALID_VALUE);
        }
        let data = data.bytes(bytes)?;
        module::add_to_link(linker, data.split(|&byte| byte == 0).next().unwrap_or_default())
    }

    fn cuLinkComplete(linker: Handle, code: Out<usize>, bytes: Out<usize>) {
        let (address, length) = module::linked(linker)?;
        code.set(address)?;
        bytes.set(length)
    }

    fn cuLinkDestroy(linker: Handle) {
        module::end_link(linker)
    }

    fn cuModuleUnload(module: Handle) {
        context::healthy()?;
        module::unload(module, false)
    }

    fn cuModuleGetLoadingMode(mode: Out<c_uint>) {
        const LAZY: c_uint = 2;
        driver()?;
        mode.set(LAZY)
    }

    fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: Text) {
        let found = driver()?.modules.get(module)?;
        function.set(found.function(&name.get()?)?.handle)
    }

    fn cuModuleGetFunctionCount(count: Out<c_uint>, module: Handle) {
        count.set(driver()?.modules.get(module)?.functions.len() as c_uint)
    }

    fn cuModuleEnumerateFunctions(functions: Out<Handle>, count: c_uint, module: Handle) {
        let found = driver()?.modules.get(module)?;
        functions.fill(found.functions.iter().map(|function| function.handle), count as usize);
        Ok(())
    }

    /// No kernel has globals.
    fn cuModuleGetGlobal_v2(pointer: Out<u64>, bytes: Out<usize>, module: Handle, name: Text) {
        let _ = (pointer, bytes);
        driver()?.modules.get(module)?;
        name.get()?;
        Err(Error::NOT_FOUND)
    }

    fn cuLibraryLoadData(
        library: Out<Handle>, code: In<c_void>, jit: In<c_uint>, jit_values: In<usize>, jit_count: c_uint,
        options: In<c_uint>, values: In<usize>, count: c_uint,
    ) {
        let _ = (jit, jit_values, jit_count, options, values, count);
        library.required()?;
        library.set(module::load(&code.image()?, 0)?.handle)
    }

    fn cuLibraryLoadFromFile(
        library: Out<Handle>, file: Text, jit: In<c_uint>, jit_values: In<usize>, jit_count: c_uint,
        options: In<c_uint>, values: In<usize>, count: c_uint,
    ) {
        let _ = (jit, jit_values, jit_count, options, values, count);
        library.required()?;
        let image = std::fs::read(file.get()?).map_err(|_| Error::FILE_NOT_FOUND)?;
        let text = image.split(|&byte| byte == 0).next().unwrap_or_default();
        library.set(module::load(text, 0)?.handle)
    }

    fn cuLibraryUnload(library: Handle) {
        module::unload(library, true)
    }

    fn cuLibraryGetKernel(kernel: Out<Handle>, library: Handle, name: Text) {
        let found = driver()?.modules.get(library)?;
        kernel.set(found.function(&name.get()?)?.handle)
    }

    fn cuLibraryGetKernelCount(count: Out<c_uint>, library: Handle) {
        count.set(driver()?.modules.get(library)?.functions.len() as c_uint)
    }

    fn cuLibraryEnumerateKernels(kernels: Out<Handle>, count: c_uint, library: Handle) {
        let found = driver()?.modules.get(library)?;
        kernels.fill(found.functions.iter().map(|function| function.handle), count as usize);
        Ok(())
    }

    fn cuLibraryGetModule(module: Out<Handle>, library: Handle) {
        context::healthy()?;
        module.set(driver()?.modules.get(library)?.handle)
    }

    fn cuLibraryGetGlobal(pointer: Out<u64>, bytes: Out<usize>, library: Handle, name: Text) {
        let _ = (pointer, bytes);
        driver()?.modules.get(library)?;
        name.get()?;
        Err(Error::NOT_FOUND)
    }

    fn cuKernelGetFunction(function: Out<Handle>, kernel: Handle) {
        context::healthy()?;
        function.set(driver()?.functions.get(kernel)?.handle)
    }

    fn cuKernelGetLibrary(library: Out<Handle>, kernel: Handle) {
        library.set(driver()?.functions.get(kernel)?.module)
    }

    fn cuKernelGetName(name: Out<*const c_char>, kernel: Handle) {
        name.set(driver()?.functions.get(kernel)?.c_name.as_ptr())
    }

    fn cuKernelGetAttribute(value: Out<c_int>, attribute: c_uint, kernel: Handle, device: c_int) {
        let driver = driver()?;
        driver.device(device)?;
        value.set(driver.functions.get(kernel)?.attribute(attribute)?)
    }

    fn cuKernelSetAttribute(attribute: c_uint, value: c_int, kernel: Handle, device: c_int) {
        let driver = driver()?;
        driver.device(device)?;
        driver.functions.get(kernel)?.set_attribute(attribute, value)
    }

    fn cuKernelGetParamInfo(kernel: Handle, index: usize, offset: Out<usize>, size: Out<usize>) {
        self::parameter(kernel, index, offset, size)
    }

    fn cuFuncGetParamInfo(function: Handle, index: usize, offset: Out<usize>, size: Out<usize>) {
        self::parameter(function, index, offset, size)
    }

    fn cuFuncGetParamCount(function: Handle, count: Out<usize>) {
        count.set(driver()?.functions.get(function)?.kernel.parameters.len())
    }

    fn cuKernelGetParamCount(kernel: Handle, count: Out<usize>) {
        count.set(driver()?.functions.get(kernel)?.kernel.parameters.len())
    }

    fn cuFuncGetAttribute(value: Out<c_int>, attribute: c_uint, function: Handle) {
        value.set(driver()?.functions.get(function)?.attribute(attribute)?)
    }

    fn cuFuncSetAttribute(function: Handle, attribute: c_uint, value: c_int) {
        driver()?.functions.get(function)?.set_attribute(attribute, value)
    }

    fn cuFuncSetCacheConfig(function: Handle, config: c_uint) {
        driver()?.functions.get(function)?;
        if config > 3 { Err(Error::INVALID_VALUE) } else { Ok(()) }
    }

    fn cuFuncGetModule(module: Out<Handle>, function: Handle) {
        module.set(driver()?.functions.get(function)?.module)
    }

    fn cuFuncGetName(name: Out<*const c_char>, function: Handle) {
        name.set(driver()?.functions.get(function)?.c_name.as_ptr())
    }

    fn cuFuncIsLoaded(state: Out<c_uint>, function: Handle) {
        driver()?.functions.get(function)?;
        state.set(1)
    }

    fn cuFuncLoad(function: Handle) {
        driver()?.functions.get(function).map(|_| ())
    }

    fn cuLaunchKernel / cuLaunchKernel_ptsz |null| (
        function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, shared: c_uint, stream: Handle, parameters: In<In<u64>>, extra: In<usize>,
    ) {
        let _ = shared;
        launch(null, function, [grid_x, grid_y, grid_z], [block_x, block_y, block_z], stream, parameters, extra)
    }

    /// Attributes are hints, and not looked at.
    fn cuLaunchKernelEx / cuLaunchKernelEx_ptsz |null| (
        config: In<LaunchConfig>, function: Handle, parameters: In<In<u64>>, extra: In<usize>,
    ) {
        let config = config.get()?;
        launch(null, function, config.grid, config.block, config.stream, parameters, extra)
    }

    fn cuLaunchCooperativeKernel / cuLaunchCooperativeKernel_ptsz |null| (
        function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, shared: c_uint, stream: Handle, parameters: In<In<u64>>,
    ) {
        let _ = shared;
        let extra = In::from_address(0);
        launch(null, function, [grid_x, grid_y, grid_z], [block_x, block_y, block_z], stream, parameters, extra)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: Out<c_int>, function: Handle, block_size: c_int, shared: usize,
    ) {
        self::occupancy(blocks, function, block_size, shared)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: Out<c_int>, function: Handle, block_size: c_int, shared: usize, flags: c_uint,
    ) {
        let _ = flags;
        self::occupancy(blocks, function, block_size, shared)
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: Out<c_int>, block: Out<c_int>, function: Handle, shared_of: In<c_void>, shared: usize, limit: c_int,
    ) {
        let _ = (shared_of, shared);
        self::best_block(grid, block, function, limit)
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: Out<c_int>, block: Out<c_int>, function: Handle, shared_of: In<c_void>, shared: usize, limit: c_int,
        flags: c_uint,
    ) {
        let _ = (shared_of, shared, flags);
        self::best_block(grid, block, function, limit)
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(bytes: Out<usize>, function: Handle, blocks: c_int, block_size: c_int) {
        driver()?.functions.get(function)?;
        if blocks <= 0 || block_size <= 0 {
            return Err(Error::INVALID_VALUE);
        }
        bytes.set((64 << 10) / blocks as usize)
    }
}

fn load(module: Out<Handle>, image: In<c_void>) -> Result {
    let context = context::healthy()?;
    module.required()?;
    module.set(module::load(&image.image()?, context.owner())?.handle)
}

fn parameter(function: Handle, index: usize, offset: Out<usize>, size: Out<usize>) -> Result {
    let function = driver()?.functions.get(function)?;
    let (at, len) = function.kernel.parameter(index).ok_or(Error::INVALID_VALUE)?;
    offset.set(at)?;
    size.set_if_wanted(len);
    Ok(())
}

fn occupancy(blocks: Out<c_int>, function: Handle, block_size: c_int, shared: usize) -> Result {
    driver()?.functions.get(function)?;
    if !(1..=1024).contains(&block_size) {
        return Err(Error::INVALID_VALUE);
    }
    let by_shared = (64usize << 10).checked_div(shared).unwrap_or(16) as c_int;
    blocks.set((1024 / block_size).min(16).min(by_shared))
}

fn best_block(grid: Out<c_int>, block: Out<c_int>, function: Handle, limit: c_int) -> Result {
    driver()?.functions.get(function)?;
    let best = if limit > 0 { limit.min(1024) } else { 1024 };
    grid.set(40 * (1024 / best))?;
    block.set(best)
}

/// The operation of a kernel node.
pub(super) fn kernel_node(params: &KernelNodeParams) -> Result<Op> {
    self::check_shape(params.grid, params.block)?;
    let kernel = driver()?.functions.get(params.function)?.kernel;
    Ok(Op::Kernel(Launch { kernel, arguments: kernel.arguments(params.parameters, params.extra)? }))
}

#[inline]
fn check_shape(grid: [c_uint; 3], block: [c_uint; 3]) -> Result {
    let threads = block.iter().map(|&n| u64::from(n)).product::<u64>();
    let empty = grid.contains(&0) || block.contains(&0);
    if empty || threads > 1024 { Err(Error::INVALID_VALUE) } else { Ok(()) }
}

#[inline]
fn launch(
    null: Null,
    function: Handle,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    stream: Handle,
    parameters: In<In<u64>>,
    extra: In<usize>,
) -> Result {
    self::check_shape(grid, block)?;
    let driver = driver()?;
    let known = |function: &Arc<Function>| (function.kernel, function.context);
    let (kernel, owner) = driver.functions.with(&LAST_FUNCTION, function, known)?;
    context::with_stream(null, stream, |stream| {
        stream.usable()?;
        if owner != 0 && owner != stream.core.owner {
            return Err(Error::INVALID_HANDLE);
        }
        if kernel.is_null() && !stream.capturing.load(SeqCst) && stream.idle() {
            stream.core.device.ledger()?.count(Count::Launches, 1);
            return Ok(());
        }
        let arguments = kernel.arguments(parameters, extra)?;
        stream.enqueue(Op::Kernel(Launch { kernel, arguments })).map(|_| ())
    })
}
