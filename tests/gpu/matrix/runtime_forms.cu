// The runtime API in its many forms: pitched, three-dimensional and managed memory, arrays and textures, registered
// host memory read by a kernel, stream-ordered memory, copies in all directions, graphs made by hand with memory
// nodes, child graphs and updates, and a cooperative launch. Integers, so every result is known.

#include "common.cuh"

#include <cooperative_groups.h>

static cudaStream_t stream;

// Words on the GPU are those that `write_words` made. Their sum goes into the digest.
static void expect_written(Digest &digest, const Word *words, Word count, Word seed, Word mixes, const char *what) {
    Word *wrong = nullptr, found = 1;
    CALL(cudaMalloc(&wrong, 8));
    CALL(cudaMemsetAsync(wrong, 0, 8, stream));
    compare<<<256, 256, 0, stream>>>(words, count, seed, 0, mixes, wrong);
    CALL(cudaGetLastError());
    CALL(cudaMemcpyAsync(&found, wrong, 8, cudaMemcpyDeviceToHost, stream));
    CALL(cudaStreamSynchronize(stream));
    CALL(cudaFree(wrong));
    CHECK(found == 0, std::string(what) + ": " + std::to_string(found) + " words are wrong");
    digest.add(seed);
}

// Rows with gaps between them, copied in and out by rows.
static void pitched(Digest &digest) {
    constexpr size_t WIDTH = 1000, HEIGHT = 600;
    std::vector<uint32_t> source(WIDTH * HEIGHT), target(WIDTH * HEIGHT);
    for (size_t i = 0; i < source.size(); i++) source[i] = uint32_t(mixed(i, 1));
    void *rows = nullptr;
    size_t pitch = 0;
    CALL(cudaMallocPitch(&rows, &pitch, WIDTH * 4, HEIGHT));
    CHECK(pitch >= WIDTH * 4, "pitch " + std::to_string(pitch));
    CALL(cudaMemset2D(rows, pitch, 0xFF, WIDTH * 4, HEIGHT));
    CALL(cudaMemcpy2D(rows, pitch, source.data(), WIDTH * 4, WIDTH * 4, HEIGHT, cudaMemcpyHostToDevice));
    // Such a copy may return before it has arrived, and our stream waits for no other.
    CALL(cudaStreamSynchronize(nullptr));
    CALL(cudaMemcpy2DAsync(target.data(), WIDTH * 4, rows, pitch, WIDTH * 4, HEIGHT, cudaMemcpyDeviceToHost, stream));
    CALL(cudaStreamSynchronize(stream));
    CHECK(source == target, "pitched memory is wrong");
    CALL(cudaFree(rows));
    for (size_t i = 0; i < target.size(); i += 1009) digest.add(target[i]);
}

// A box of memory, copied in, to another one on the GPU, and out.
static void boxes(Digest &digest) {
    constexpr size_t WIDTH = 300, HEIGHT = 40, DEPTH = 30;
    std::vector<uint32_t> source(WIDTH * HEIGHT * DEPTH), target(source.size());
    for (size_t i = 0; i < source.size(); i++) source[i] = uint32_t(mixed(i, 2));
    cudaExtent extent = make_cudaExtent(WIDTH * 4, HEIGHT, DEPTH);
    cudaPitchedPtr box[2];
    for (cudaPitchedPtr &each : box) CALL(cudaMalloc3D(&each, extent));
    CALL(cudaMemset3D(box[1], 0, extent));
    cudaPitchedPtr ends[4] = {make_cudaPitchedPtr(source.data(), WIDTH * 4, WIDTH, HEIGHT), box[0], box[1],
                              make_cudaPitchedPtr(target.data(), WIDTH * 4, WIDTH, HEIGHT)};
    cudaMemcpyKind kinds[3] = {cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice, cudaMemcpyDeviceToHost};
    for (int step = 0; step < 3; step++) {
        cudaMemcpy3DParms copy = {};
        copy.srcPtr = ends[step];
        copy.dstPtr = ends[step + 1];
        copy.extent = extent;
        copy.kind = kinds[step];
        CALL(cudaMemcpy3D(&copy));
    }
    CALL(cudaDeviceSynchronize());
    CHECK(source == target, "a box of memory is wrong");
    for (cudaPitchedPtr &each : box) CALL(cudaFree(each.ptr));
    for (size_t i = 0; i < target.size(); i += 1009) digest.add(target[i]);
}

__global__ void read_texture(cudaTextureObject_t texture, uint32_t *out, int width, int height) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x < width && y < height) out[y * width + x] = tex2D<uint32_t>(texture, x + 0.5f, y + 0.5f) * 3;
}

__global__ void write_surface(cudaSurfaceObject_t surface, int width, int height) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x < width && y < height) surf2Dwrite(uint32_t(y * width + x) * 5u, surface, x * 4, y);
}

// An array, written by a copy and by a kernel through a surface, and read by a kernel through a texture.
static void arrays(Digest &digest) {
    constexpr int WIDTH = 512, HEIGHT = 256;
    std::vector<uint32_t> source(WIDTH * HEIGHT), target(source.size());
    for (size_t i = 0; i < source.size(); i++) source[i] = uint32_t(mixed(i, 3));
    cudaChannelFormatDesc format = cudaCreateChannelDesc<uint32_t>();
    cudaArray_t array;
    CALL(cudaMallocArray(&array, &format, WIDTH, HEIGHT, cudaArraySurfaceLoadStore));
    CALL(cudaMemcpy2DToArray(array, 0, 0, source.data(), WIDTH * 4, WIDTH * 4, HEIGHT, cudaMemcpyHostToDevice));
    CALL(cudaStreamSynchronize(nullptr));
    cudaResourceDesc resource = {};
    resource.resType = cudaResourceTypeArray;
    resource.res.array.array = array;
    cudaTextureDesc how = {};
    how.readMode = cudaReadModeElementType;
    cudaTextureObject_t texture;
    CALL(cudaCreateTextureObject(&texture, &resource, &how, nullptr));
    cudaSurfaceObject_t surface;
    CALL(cudaCreateSurfaceObject(&surface, &resource));
    uint32_t *out = nullptr;
    CALL(cudaMalloc(&out, source.size() * 4));
    dim3 grid(WIDTH / 16, HEIGHT / 16), block(16, 16);
    for (int turn = 0; turn < 2; turn++) {
        if (turn == 1) write_surface<<<grid, block, 0, stream>>>(surface, WIDTH, HEIGHT);
        read_texture<<<grid, block, 0, stream>>>(texture, out, WIDTH, HEIGHT);
        CALL(cudaGetLastError());
        CALL(cudaMemcpyAsync(target.data(), out, target.size() * 4, cudaMemcpyDeviceToHost, stream));
        CALL(cudaStreamSynchronize(stream));
        for (size_t i = 0; i < target.size(); i++)
            CHECK(target[i] == (turn == 1 ? uint32_t(i) * 5u : source[i]) * 3u, "texel " + std::to_string(i));
        digest.add(target[12345]);
    }
    CALL(cudaMemcpy2DFromArray(target.data(), WIDTH * 4, array, 0, 0, WIDTH * 4, HEIGHT, cudaMemcpyDeviceToHost));
    CHECK(target[777] == 777u * 5u, "what was copied out of the array is wrong");
    CALL(cudaDestroySurfaceObject(surface));
    CALL(cudaDestroyTextureObject(texture));
    CALL(cudaFreeArray(array));
    CALL(cudaFree(out));
}

// Written by the CPU, mixed by the GPU, read by the CPU.
static void managed(Digest &digest) {
    constexpr Word COUNT = 1 << 18;
    Word *words = nullptr, sum = 0;
    CALL(cudaMallocManaged(&words, COUNT * 8));
    for (Word i = 0; i < COUNT; i++) words[i] = mixed(i, 4);
    mix<<<256, 256, 0, stream>>>(words, COUNT, 0);
    CALL(cudaGetLastError());
    CALL(cudaStreamSynchronize(stream));
    for (Word i = 0; i < COUNT; i++) sum += words[i];
    CHECK(sum == expected_sum(COUNT, 4, 0, 1), "managed memory is wrong");
    CALL(cudaFree(words));
    digest.add(sum);
}

// A kernel writes into host memory that was registered, and into mapped host memory.
static void host_memory(Digest &digest) {
    constexpr Word COUNT = 1 << 18;
    std::vector<Word> plain(COUNT);
    Word *seen = nullptr, *mapped = nullptr, sum = 0;
    CALL(cudaHostRegister(plain.data(), COUNT * 8, cudaHostRegisterMapped));
    CALL(cudaHostGetDevicePointer(&seen, plain.data(), 0));
    write_words<<<256, 256, 0, stream>>>(seen, COUNT, 5);
    CALL(cudaGetLastError());
    CALL(cudaHostAlloc(&mapped, COUNT * 8, cudaHostAllocMapped));
    CALL(cudaHostGetDevicePointer(&seen, mapped, 0));
    write_words<<<256, 256, 0, stream>>>(seen, COUNT, 6);
    CALL(cudaGetLastError());
    CALL(cudaStreamSynchronize(stream));
    for (Word i = 0; i < COUNT; i++) sum += plain[i] + 3 * mapped[i];
    CHECK(sum == expected_sum(COUNT, 5, 0, 0) + 3 * expected_sum(COUNT, 6, 0, 0), "host memory is wrong");
    CALL(cudaHostUnregister(plain.data()));
    CALL(cudaFreeHost(mapped));
    digest.add(sum);
}

// Memory that streams allocate and free, of the default pool and of a pool of the program's own.
static void stream_ordered(Digest &digest) {
    constexpr Word COUNT = 4 << 20;
    cudaMemPoolProps how = {};
    how.allocType = cudaMemAllocationTypePinned;
    how.location.type = cudaMemLocationTypeDevice;
    how.location.id = 0;
    cudaMemPool_t pool;
    CALL(cudaMemPoolCreate(&pool, &how));
    cudaStream_t other;
    cudaEvent_t written;
    CALL(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    CALL(cudaEventCreateWithFlags(&written, cudaEventDisableTiming));
    for (int turn = 0; turn < 6; turn++) {
        Word *words = nullptr;
        if (turn % 2) CALL(cudaMallocFromPoolAsync((void **)&words, COUNT * 8, pool, other));
        else CALL(cudaMallocAsync((void **)&words, COUNT * 8, other));
        write_words<<<256, 256, 0, other>>>(words, COUNT, 60 + turn);
        CALL(cudaGetLastError());
        CALL(cudaEventRecord(written, other));
        CALL(cudaStreamWaitEvent(stream, written, 0));
        expect_written(digest, words, COUNT, 60 + turn, 0, "stream-ordered memory");
        CALL(cudaFreeAsync(words, stream));
    }
    CALL(cudaStreamSynchronize(stream));
    CALL(cudaMemPoolTrimTo(pool, 0));
    CALL(cudaMemPoolDestroy(pool));
    CALL(cudaEventDestroy(written));
    CALL(cudaStreamDestroy(other));
}

// In, across, out; with pageable and pinned memory; waiting and not; symbols too.
__device__ Word symbol[1024];

static void copies(Digest &digest) {
    constexpr Word COUNT = 1 << 20;
    std::vector<Word> pageable(COUNT), back(COUNT);
    for (Word i = 0; i < COUNT; i++) pageable[i] = mixed(i, 7);
    Word *pinned = nullptr, *first = nullptr, *second = nullptr;
    CALL(cudaMallocHost(&pinned, COUNT * 8));
    CALL(cudaMalloc(&first, COUNT * 8));
    CALL(cudaMalloc(&second, COUNT * 8));
    CALL(cudaMemcpy(first, pageable.data(), COUNT * 8, cudaMemcpyHostToDevice));
    CALL(cudaStreamSynchronize(nullptr));
    expect_written(digest, first, COUNT, 7, 0, "a pageable copy");
    CALL(cudaMemcpyAsync(second, first, COUNT * 8, cudaMemcpyDeviceToDevice, stream));
    CALL(cudaMemcpyAsync(pinned, second, COUNT * 8, cudaMemcpyDeviceToHost, stream));
    CALL(cudaStreamSynchronize(stream));
    CHECK(!std::memcmp(pinned, pageable.data(), COUNT * 8), "what came back by pinned memory is wrong");
    CALL(cudaMemsetAsync(first, 0, COUNT * 8, stream));
    CALL(cudaMemcpyAsync(first, pinned, COUNT * 8, cudaMemcpyDefault, stream));
    expect_written(digest, first, COUNT, 7, 0, "a copy whose kind the driver finds out");
    CALL(cudaMemcpy(back.data(), first, COUNT * 8, cudaMemcpyDefault));
    CHECK(back == pageable, "what came back by pageable memory is wrong");
    CALL(cudaMemcpyToSymbol(symbol, pageable.data(), sizeof symbol));
    std::memset(back.data(), 0, sizeof symbol);
    CALL(cudaMemcpyFromSymbol(back.data(), symbol, sizeof symbol));
    CHECK(back == pageable, "a symbol's words are wrong");
    CALL(cudaFree(first));
    CALL(cudaFree(second));
    CALL(cudaFreeHost(pinned));
}

// A graph by hand: memory that it allocates and frees itself, a kernel, a copy, a child graph; then new arguments
// for the instance, by node and by another graph.
static void graphs(Digest &digest) {
    constexpr Word COUNT = 1 << 20;
    Word *kept = nullptr, count = COUNT, seed = 8, zero = 0;
    CALL(cudaMalloc(&kept, COUNT * 8));

    cudaGraph_t graph, child;
    CALL(cudaGraphCreate(&graph, 0));
    CALL(cudaGraphCreate(&child, 0));
    cudaMemAllocNodeParams memory = {};
    memory.poolProps.allocType = cudaMemAllocationTypePinned;
    memory.poolProps.location.type = cudaMemLocationTypeDevice;
    memory.poolProps.location.id = 0;
    memory.bytesize = COUNT * 8;
    cudaGraphNode_t allocate, writes, copy, release, mixes, inside;
    CALL(cudaGraphAddMemAllocNode(&allocate, graph, nullptr, 0, &memory));
    Word *passing = static_cast<Word *>(memory.dptr);
    void *to_passing[] = {&passing, &count, &seed}, *to_kept[] = {&kept, &count, &zero};
    cudaKernelNodeParams kernel = {};
    kernel.func = (void *)write_words;
    kernel.gridDim = dim3(256);
    kernel.blockDim = dim3(256);
    kernel.kernelParams = to_passing;
    CALL(cudaGraphAddKernelNode(&writes, graph, &allocate, 1, &kernel));
    CALL(cudaGraphAddMemcpyNode1D(&copy, graph, &writes, 1, kept, passing, COUNT * 8, cudaMemcpyDeviceToDevice));
    CALL(cudaGraphAddMemFreeNode(&release, graph, &copy, 1, passing));
    cudaKernelNodeParams mixing = kernel;
    mixing.func = (void *)mix;
    mixing.kernelParams = to_kept;
    CALL(cudaGraphAddKernelNode(&inside, child, nullptr, 0, &mixing));
    CALL(cudaGraphAddChildGraphNode(&mixes, graph, &copy, 1, child));
    cudaGraphExec_t instance;
    CALL(cudaGraphInstantiate(&instance, graph, 0));
    for (int turn = 0; turn < 3; turn++) {
        CALL(cudaGraphLaunch(instance, stream));
        expect_written(digest, kept, COUNT, 8, 1, "what a graph made");
    }
    seed = 9;
    CALL(cudaGraphExecKernelNodeSetParams(instance, writes, &kernel));
    CALL(cudaGraphLaunch(instance, stream));
    expect_written(digest, kept, COUNT, 9, 1, "what a graph with another argument made");
    CALL(cudaStreamSynchronize(stream));
    CALL(cudaGraphExecDestroy(instance));
    CALL(cudaGraphDestroy(child));
    CALL(cudaGraphDestroy(graph));

    // The same by capture, and an update of the instance from a second capture.
    cudaGraph_t captured[2];
    for (int which = 0; which < 2; which++) {
        CALL(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
        write_words<<<256, 256, 0, stream>>>(kept, COUNT, 10 + which);
        mix<<<256, 256, 0, stream>>>(kept, COUNT, 0);
        CALL(cudaStreamEndCapture(stream, &captured[which]));
    }
    CALL(cudaGraphInstantiate(&instance, captured[0], 0));
    CALL(cudaGraphLaunch(instance, stream));
    expect_written(digest, kept, COUNT, 10, 1, "what a captured graph made");
    cudaGraphExecUpdateResultInfo updated = {};
    CALL(cudaGraphExecUpdate(instance, captured[1], &updated));
    CALL(cudaGraphUpload(instance, stream));
    CALL(cudaGraphLaunch(instance, stream));
    expect_written(digest, kept, COUNT, 11, 1, "what an updated graph made");
    CALL(cudaGraphExecDestroy(instance));
    for (cudaGraph_t each : captured) CALL(cudaGraphDestroy(each));
    CALL(cudaDeviceGraphMemTrim(0));
    CALL(cudaFree(kept));
}

// Every block sees what all others wrote before the barrier: words[i] becomes the sum of itself and its mirror.
__global__ void mirrored(Word *words, Word *out, Word count) {
    Word first = blockIdx.x * Word(blockDim.x) + threadIdx.x, stride = Word(gridDim.x) * blockDim.x;
    for (Word i = first; i < count; i += stride) words[i] = mixed(i, 12);
    cooperative_groups::this_grid().sync();
    for (Word i = first; i < count; i += stride) out[i] = words[i] + words[count - 1 - i];
}

static void cooperative(Digest &digest) {
    constexpr Word COUNT = 1 << 20;
    int blocks = 0, processors = 0;
    CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, mirrored, 256, 0));
    CALL(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    Word *words = nullptr, *out = nullptr, count = COUNT, sum = 0;
    CALL(cudaMalloc(&words, COUNT * 8));
    CALL(cudaMalloc(&out, COUNT * 8));
    void *arguments[] = {&words, &out, &count};
    CALL(cudaLaunchCooperativeKernel((void *)mirrored, dim3(blocks * processors), dim3(256), arguments, 0, stream));
    std::vector<Word> host(COUNT);
    CALL(cudaMemcpyAsync(host.data(), out, COUNT * 8, cudaMemcpyDeviceToHost, stream));
    CALL(cudaStreamSynchronize(stream));
    for (Word word : host) sum += word;
    CHECK(sum == 2 * expected_sum(COUNT, 12, 0, 0), "a cooperative launch is wrong");
    CALL(cudaFree(words));
    CALL(cudaFree(out));
    digest.add(sum);
}

int main(int count, char **arguments) {
    CALL(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return same_each_time(count, arguments, "runtime API", [](Digest &digest) {
        pitched(digest);
        boxes(digest);
        arrays(digest);
        managed(digest);
        host_memory(digest);
        stream_ordered(digest);
        copies(digest);
        graphs(digest);
        cooperative(digest);
        CALL(cudaDeviceSynchronize());
    });
}
