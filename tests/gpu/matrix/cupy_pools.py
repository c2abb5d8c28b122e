"""CuPy: its default pool, the pool on cudaMallocAsync, a pool of managed memory, pinned memory, and an array that a
kernel reads as a texture. Integers and exact floats, so every result is known; the digest is that of all results and
of what this version of CuPy has not got.
"""

import common

COUNT = 4 << 20

TEXTURE_KERNEL = r"""
extern "C" __global__ void read_texture(float* out, cudaTextureObject_t texture, int width, int height) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x < width && y < height) out[y * width + x] = 2.0f * tex2D<float>(texture, x + 0.5f, y + 0.5f);
}
"""


def pool_work(cupy, turns=12):
    """Arrays of many sizes that come and go; their sums, each checked."""
    kept, sums = [], []
    for turn in range(turns):
        count = COUNT // (1 + turn % 4)
        held = cupy.arange(count, dtype=cupy.int64) * (turn + 1)
        if turn % 2:
            kept.append((turn, held))
        common.check(int(held.sum()) == (turn + 1) * count * (count - 1) // 2, f"array {turn} has a wrong sum")
    for turn, held in kept:
        held += 1
        count = held.size
        sums.append(int(held.sum()))
        common.check(sums[-1] == (turn + 1) * count * (count - 1) // 2 + count, f"kept array {turn} has changed")
    return sums


def in_pool(cupy, pool, turns=12):
    """The same in another pool, which is given back at the end."""
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(pool.malloc)
    try:
        return pool_work(cupy, turns)
    finally:
        cupy.cuda.set_allocator(before)
        if hasattr(pool, "free_all_blocks"):
            pool.free_all_blocks()


def pinned(cupy, numpy):
    """Copies both ways, from and to pinned memory, on a stream."""
    host = [cupy.cuda.alloc_pinned_memory(8 * COUNT) for _ in range(2)]
    source, target = (numpy.frombuffer(memory, numpy.int64, COUNT) for memory in host)
    source[:] = numpy.arange(COUNT)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        held = cupy.empty(COUNT, cupy.int64)
        held.set(source, stream=stream)
        held *= 5
        held.get(stream=stream, out=target)
    stream.synchronize()
    common.check(bool((target == source * 5).all()), "what went through pinned memory is wrong")
    return int(target.sum())


def texture(cupy, numpy):
    """An array on the GPU, written by a copy and read by a kernel through a texture."""
    from cupy.cuda import runtime
    from cupy.cuda.texture import ChannelFormatDescriptor, CUDAarray, ResourceDescriptor, TextureDescriptor, TextureObject

    width, height = 1024, 512
    source = numpy.arange(width * height, dtype=numpy.float32).reshape(height, width)
    channel = ChannelFormatDescriptor(32, 0, 0, 0, runtime.cudaChannelFormatKindFloat)
    array = CUDAarray(channel, width, height)
    array.copy_from(source)
    resource = ResourceDescriptor(runtime.cudaResourceTypeArray, cuArr=array)
    how = TextureDescriptor(
        (runtime.cudaAddressModeClamp, runtime.cudaAddressModeClamp),
        runtime.cudaFilterModePoint,
        runtime.cudaReadModeElementType,
    )
    seen = cupy.zeros((height, width), dtype=cupy.float32)
    kernel = cupy.RawKernel(TEXTURE_KERNEL, "read_texture")
    kernel((width // 16, height // 16), (16, 16), (seen, TextureObject(resource, how), numpy.int32(width), numpy.int32(height)))
    common.check(bool((cupy.asnumpy(seen) == 2 * source).all()), "what a kernel read through a texture is wrong")
    return float(seen.sum(dtype=cupy.float64))


def main():
    options = common.parse(__doc__)
    try:
        import cupy
        import numpy
    except ImportError as error:
        common.skip(f"no CuPy: {error}")
    ballast = common.Ballast()
    lacking = []
    if not hasattr(cupy.cuda, "MemoryAsyncPool"):
        lacking.append("MemoryAsyncPool")
    try:
        import cupy.cuda.texture
    except ImportError:
        lacking.append("textures")
    asynchronous = None if "MemoryAsyncPool" in lacking else cupy.cuda.MemoryAsyncPool()

    def work():
        found = [pool_work(cupy), in_pool(cupy, cupy.cuda.MemoryPool())]
        if asynchronous:
            found.append(in_pool(cupy, asynchronous))
        found.append(in_pool(cupy, cupy.cuda.MemoryPool(cupy.cuda.malloc_managed), turns=6))
        found.append(pinned(cupy, numpy))
        if "textures" not in lacking:
            found.append(texture(cupy, numpy))
        cupy.cuda.Device().synchronize()
        ballast.turn()
        return common.digest(found, lacking)

    digest, rounds = common.same_each_time(options.seconds, work)
    common.report(f"CuPy {cupy.__version__}", digest, rounds, lacking=lacking)


main()
