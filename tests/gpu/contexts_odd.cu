// Odd lives of contexts on a real GPU: resets with several holders, contexts that the driver does not end, green contexts,
// captures that are over without an end.
//
//   nvcc -O2 -cudart static -o contexts_odd tests/gpu/contexts_odd.cu -lcuda
//   ./contexts_odd                                          natively
//   nvshare run -- ./contexts_odd                           under nvshare alone
//   nvshare run --capacity 10GiB -- ./contexts_odd 4        beside tests/gpu/add.py with 6 GiB in the same pool
//
// The argument is GiB (default 1), of which it holds twice as many at a time. Lines that begin with "fact" say what the driver does; they must be the same in all three.
// The last line is OK, FAIL and why, or SKIP and why.
#include "said.cuh"

#include <cstdarg>
#include <thread>
#include <vector>

static size_t bytes = size_t(1) << 30;

static void facts(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("fact: ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
}

__global__ void add(unsigned *words, size_t count) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        words[i] += 1;
}

// Memory that is filled and looked at by the driver alone: no module of any context is needed.
struct Words {
    CUdeviceptr at = 0;
    unsigned value = 1;
    Words() {
        DRIVER(cuMemAlloc(&at, bytes));
        write();
    }
    void write() {
        DRIVER(cuMemsetD32(at, ++value, bytes / 4));
        DRIVER(cuCtxSynchronize());
    }
    // Several in flight, none waited for.
    void write_in(CUstream stream) {
        for (int i = 0; i < 20; i++) DRIVER(cuMemsetD32Async(at, ++value, bytes / 4, stream));
    }
    // One, if the driver takes the stream.
    CUresult try_in(CUstream stream) {
        CUresult said = cuMemsetD32Async(at, value + 1, bytes / 4, stream);
        if (said == CUDA_SUCCESS) ++value;
        return said;
    }
    void look(int line) const {
        std::vector<unsigned> some(1024);
        for (size_t offset = 0; offset < bytes; offset += bytes / 16) {
            DRIVER(cuMemcpyDtoH(some.data(), at + offset, some.size() * 4));
            for (unsigned word : some) MUST(word == value, "line " + std::to_string(line) + " finds wrong data");
        }
    }
    void free() { DRIVER(cuMemFree(at)); }
};

static int active() {
    unsigned flags;
    int active;
    DRIVER(cuDevicePrimaryCtxGetState(0, &flags, &active));
    return active;
}

static CUcontext retain() {
    CUcontext context;
    DRIVER(cuDevicePrimaryCtxRetain(&context, 0));
    DRIVER(cuCtxSetCurrent(context));
    return context;
}

// --- What the driver refuses ---------------------------------------------------------------------

static void refused() {
    CUcontext context = retain();
    Words words;
    FACT(cuCtxDestroy(context));
    words.look(__LINE__);
    FACT(cuCtxDetach(context));
    words.look(__LINE__);
    words.free();
    DRIVER(cuDevicePrimaryCtxRelease(0));
    facts("the primary context is %d after its last release", active());
    FACT(cuDevicePrimaryCtxRelease(0));
}

// --- What remains of mapped memory when the last context goes ---------------------------------------

static void mapped_memory() {
    CUcontext context;
#if CUDA_VERSION >= 13000
    DRIVER(cuCtxCreate(&context, nullptr, 0, 0));
#else
    DRIVER(cuCtxCreate(&context, 0, 0));
#endif
    CUmemAllocationProp prop = {};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    prop.location.id = 0;
    CUmemAccessDesc access = {};
    access.location = prop.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    CUmemGenericAllocationHandle handle;
    CUdeviceptr address;
    const size_t size = 64 << 20;
    DRIVER(cuMemAddressReserve(&address, size, 0, 0, 0));
    DRIVER(cuMemCreate(&handle, size, &prop, 0));
    DRIVER(cuMemMap(address, size, 0, handle, 0));
    DRIVER(cuMemSetAccess(address, size, &access, 1));
    DRIVER(cuMemsetD32(address, 7, size / 4));
    DRIVER(cuCtxSynchronize());
    DRIVER(cuCtxDestroy(context));
    // nvshare unmaps what it has mapped after the last context is gone.
    FACT(cuMemUnmap(address, size));
    FACT(cuMemRelease(handle));
    FACT(cuMemAddressFree(address, size));
}

// --- Resets ----------------------------------------------------------------------------------------

static void resets() {
    CUcontext first = retain();
    retain();
    Words gone;
    gone.write_in(0);
    DRIVER(cuDevicePrimaryCtxReset(0));
    facts("the primary context is %d after a reset with two holders", active());
    FACT(cuCtxSetCurrent(first));
    CUdeviceptr nothing;
    FACT(cuMemAlloc(&nothing, 1 << 20));
    CUcontext again = retain();
    facts("its handle is %s", again == first ? "the same" : "another");
    Words words;
    DRIVER(cuDevicePrimaryCtxRelease(0));
    DRIVER(cuDevicePrimaryCtxRelease(0));
    MUST(active(), "the primary context has ended although it is held");
    words.look(__LINE__);
    words.write_in(0);
    DRIVER(cuCtxSynchronize());
    words.look(__LINE__);
    DRIVER(cuDevicePrimaryCtxRelease(0));
    MUST(!active(), "the primary context is there although nobody holds it");
    // The runtime's own use of it, beside a library's.
    for (int round = 0; round < 3; round++) {
        unsigned *memory;
        RUNTIME(cudaMalloc(&memory, bytes));
        RUNTIME(cudaMemset(memory, 0, bytes));
        for (int i = 0; i < 20; i++) add<<<1024, 256>>>(memory, bytes / 4);
        RUNTIME(cudaGetLastError());
        if (round == 1) retain();
        RUNTIME(cudaDeviceReset());
    }
    unsigned *memory, found;
    RUNTIME(cudaMalloc(&memory, bytes));
    RUNTIME(cudaMemset(memory, 0, bytes));
    for (int i = 0; i < 20; i++) add<<<1024, 256>>>(memory, bytes / 4);
    DRIVER(cuDevicePrimaryCtxRelease(0));
    RUNTIME(cudaMemcpy(&found, memory + bytes / 4 - 1, 4, cudaMemcpyDeviceToHost));
    MUST(found == 20, "wrong data after a reset and a holder's release");
    RUNTIME(cudaDeviceReset());
    // The runtime's reset gives up the runtime's own hold: whoever holds the context afterwards is the only one.
    for (int round = 0; round < 2; round++) {
        retain();
        DRIVER(cuDevicePrimaryCtxRelease(0));
        MUST(!active(), "the primary context is there although the runtime has reset it and nobody else holds it");
        RUNTIME(cudaMalloc(&memory, bytes));
        RUNTIME(cudaMemset(memory, 0, bytes));
        RUNTIME(cudaDeviceReset());
    }
}

static void at_once() {
    auto comes_and_goes = [] {
        for (int round = 0; round < 20; round++) {
            retain();
            CUdeviceptr own;
            unsigned found;
            DRIVER(cuMemAlloc(&own, 4 << 20));
            DRIVER(cuMemsetD32(own, round, 1 << 20));
            DRIVER(cuMemcpyDtoH(&found, own, 4));
            MUST(found == unsigned(round), "wrong data");
            DRIVER(cuMemFree(own));
            DRIVER(cuCtxSetCurrent(nullptr));
            DRIVER(cuDevicePrimaryCtxRelease(0));
        }
    };
    std::thread one(comes_and_goes), other(comes_and_goes);
    one.join();
    other.join();
}

// --- Captures --------------------------------------------------------------------------------------

static void captures() {
    CUcontext context = retain();
    std::thread([&] {
        DRIVER(cuCtxSetCurrent(context));
        DRIVER(cuStreamBeginCapture(CU_STREAM_PER_THREAD, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    }).join();
    CUresult said;
    FACT(said = cuStreamQuery(CU_STREAM_LEGACY)); // 906 would mean that the capture outlives its thread.
    if (said != CUDA_SUCCESS) {
        DRIVER(cuDevicePrimaryCtxRelease(0));
        retain();
    }
    Words words;
    CUstream stream;
    CUgraph graph;
    DRIVER(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    DRIVER(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_RELAXED));
    FACT(said = cuStreamDestroy(stream));
    if (said != CUDA_SUCCESS) FACT(cuStreamEndCapture(stream, &graph));
    words.write();
    words.look(__LINE__);
    words.free();
    DRIVER(cuDevicePrimaryCtxRelease(0));
}

// --- Green contexts --------------------------------------------------------------------------------

#if CUDA_VERSION >= 12050
static CUgreenCtx green() {
    CUdevResource whole, group;
    CUdevResourceDesc description;
    CUgreenCtx made;
    unsigned count = 1;
    DRIVER(cuDeviceGetDevResource(0, &whole, CU_DEV_RESOURCE_TYPE_SM));
    DRIVER(cuDevSmResourceSplitByCount(&group, &count, &whole, nullptr, 0, 16));
    DRIVER(cuDevResourceGenerateDesc(&description, &group, 1));
    DRIVER(cuGreenCtxCreate(&made, description, 0, CU_GREEN_CTX_DEFAULT_STREAM));
    return made;
}

static bool usable(Words &words, CUstream stream, const char *what) {
    CUresult said = words.try_in(stream);
    facts("a memset in %s: %s", what, name(said).c_str());
    return said == CUDA_SUCCESS;
}

static void greens(double seconds) {
    CUcontext primary = retain(), context, same;
    CUgreenCtx made = green(), other;
    CUstream stream, blocking = nullptr;
    Words words;
    DRIVER(cuCtxFromGreenCtx(&context, made));
    DRIVER(cuCtxFromGreenCtx(&same, made));
    facts("a green context's context is %s each time", context == same ? "the same" : "another");
    DRIVER(cuGreenCtxStreamCreate(&stream, made, CU_STREAM_NON_BLOCKING, 0));
    DRIVER(cuStreamGetCtx_v2(stream, &same, &other));
    facts("its stream tells %s context and %s green one", same == primary ? "the primary" : "another",
          other == made ? "this" : "another");
    // What may be submitted to a green context from outside is not said anywhere, so these are facts. What follows relies on
    // a stream only where its own context is current (cuCtxFromGreenCtx).
    CUevent event;
    DRIVER(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    usable(words, stream, "its stream, with the primary context current");
    CUresult recorded = cuEventRecord(event, stream);
    facts("an event of the primary context is recorded in its stream: %s", name(recorded).c_str());
    FACT(cuGreenCtxRecordEvent(made, event));
    FACT(cuCtxDestroy(context));
    size_t before, after, total;
    DRIVER(cuMemGetInfo(&before, &total));
    DRIVER(cuCtxSetCurrent(context));
    DRIVER(cuStreamSynchronize(stream));
    Words inside;
    DRIVER(cuMemGetInfo(&after, &total));
    MUST(before >= after + bytes - (bytes >> 4), "memory that was allocated in a green context is not counted");
    FACT(cuStreamCreate(&blocking, CU_STREAM_DEFAULT));
    std::vector<CUstream> streams;
    if (usable(inside, 0, "its default stream")) streams.push_back(0);
    if (usable(inside, CU_STREAM_PER_THREAD, "the thread's own stream")) streams.push_back(CU_STREAM_PER_THREAD);
    if (blocking && usable(inside, blocking, "a stream that waits for the default stream")) streams.push_back(blocking);
    MUST(usable(words, stream, "its stream"), "a green context's own stream is refused");
    DRIVER(cuCtxSynchronize());
    for (double spent = 0; spent < seconds; spent += 0.1) {
        words.write_in(stream); // Beside all that follows.
        for (CUstream each : streams) {
            inside.write_in(each);
            DRIVER(cuStreamSynchronize(each));
        }
        DRIVER(cuStreamSynchronize(stream));
        inside.look(__LINE__);
        words.look(__LINE__);
    }
    // The green context goes while its stream works, if the end of that can be seen from outside.
    CUevent done;
    DRIVER(cuEventCreate(&done, CU_EVENT_DISABLE_TIMING));
    words.write_in(stream);
    if (cuEventRecord(done, stream) != CUDA_SUCCESS) DRIVER(cuStreamSynchronize(stream));
    if (blocking) DRIVER(cuStreamDestroy(blocking));
    DRIVER(cuCtxSetCurrent(primary));
    FACT(cuEventSynchronize(done));
    DRIVER(cuGreenCtxDestroy(made));
    FACT(cuStreamQuery(stream));
    FACT(cuStreamDestroy(stream));
    DRIVER(cuCtxSynchronize());
    inside.look(__LINE__);
    words.look(__LINE__);
    inside.free();
    words.free();
    DRIVER(cuDevicePrimaryCtxRelease(0));
}
#endif

int main(int argc, char **argv) {
    if (argc > 1) bytes = size_t(atof(argv[1]) * (1 << 30)) / 4096 * 4096;
    if (CUresult said = cuInit(0)) {
        printf("SKIP cuInit said %s\n", name(said).c_str());
        return 77;
    }
    refused();
    mapped_memory();
    resets();
    at_once();
    captures();
#if CUDA_VERSION >= 12050
    int version;
    DRIVER(cuDriverGetVersion(&version));
    if (version >= 12050) greens(3);
#endif
    printf("OK\n");
    return 0;
}
