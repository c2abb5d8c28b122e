// What another thread may do on a real GPU while a capture is open, and that a client gives way beside one
// (docs/decisions/0025-beside-an-open-capture.md).
//
//   nvcc -O2 -cudart static -o capture_open tests/gpu/capture_open.cu -lcuda
//   ./capture_open                                            natively
//   nvshare run -- ./capture_open                             under nvshare alone
//   nvshare run --capacity 10GiB -- ./capture_open 6 30       beside tests/gpu/add.py with 6 GiB in the same pool
//
// The arguments are GiB (default 1) and for how many seconds the last capture stays open (default 1). In the third run the other
// client must get its turns in these seconds, and `nvshare status` must show no stall. Lines that begin with "fact" say what the
// driver does; they must be the same in all three. The last line is OK, or FAIL and why.
#include "said.cuh"

#include <chrono>
#include <thread>

__global__ void add(unsigned *words, size_t count, unsigned value) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        words[i] += value;
}

__global__ void spin(long long cycles) {
    for (long long begin = clock64(); clock64() - begin < cycles;) {
    }
}

static CUcontext context;
static CUdevice device;

// Memory that can be taken away and given back at its address.
struct Memory {
    CUdeviceptr address = 0;
    size_t bytes = 0;
    CUmemGenericAllocationHandle handle = 0;

    void map() {
        CUmemAllocationProp prop = {};
        prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
        prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
        CUmemAccessDesc access = {};
        access.location = prop.location;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        DRIVER(cuMemCreate(&handle, bytes, &prop, 0));
        DRIVER(cuMemMap(address, bytes, 0, handle, 0));
        DRIVER(cuMemSetAccess(address, bytes, &access, 1));
    }

    void unmap() {
        DRIVER(cuMemUnmap(address, bytes));
        DRIVER(cuMemRelease(handle));
    }
};

static CUstreamCaptureStatus status(CUstream stream) {
    CUstreamCaptureStatus now;
    DRIVER(cuStreamIsCapturing(stream, &now));
    return now;
}

// In a thread of its own, whose capture mode is this one.
template <class Action> static void aside(CUstreamCaptureMode mode, Action action) {
    std::thread([&] {
        DRIVER(cuCtxSetCurrent(context));
        DRIVER(cuThreadExchangeStreamCaptureMode(&mode));
        action();
    }).join();
}

// The memory goes out and comes back, while a capture is open whose graph uses it.
static void out_and_back(Memory &memory) {
    CUstream own;
    void *host;
    DRIVER(cuStreamCreate(&own, CU_STREAM_NON_BLOCKING));
    DRIVER(cuMemHostAlloc(&host, memory.bytes, CU_MEMHOSTALLOC_DEVICEMAP));
    DRIVER(cuMemcpyDtoHAsync(host, memory.address, memory.bytes, own));
    DRIVER(cuStreamSynchronize(own));
    memory.unmap();
    memory.map();
    DRIVER(cuMemcpyHtoDAsync(memory.address, host, memory.bytes, own));
    DRIVER(cuStreamSynchronize(own));
    DRIVER(cuMemFreeHost(host));
    void *registered = aligned_alloc(2 << 20, 2 << 20);
    DRIVER(cuMemHostRegister(registered, 2 << 20, CU_MEMHOSTREGISTER_DEVICEMAP));
    DRIVER(cuMemHostUnregister(registered));
    free(registered);
    DRIVER(cuStreamDestroy(own));
}

static void check(CUdeviceptr address, size_t count, unsigned value) {
    unsigned *words = static_cast<unsigned *>(malloc(count * 4));
    DRIVER(cuMemcpyDtoH(words, address, count * 4));
    for (size_t i = 0; i < count; i++)
        if (words[i] != value) fail(__LINE__, "word " + std::to_string(i) + " is " + std::to_string(words[i]));
    free(words);
}

static void replay(CUgraph graph, CUstream stream) {
    CUgraphExec executable;
    DRIVER(cuGraphInstantiateWithFlags(&executable, graph, 0));
    DRIVER(cuGraphLaunch(executable, stream));
    DRIVER(cuStreamSynchronize(stream));
    DRIVER(cuGraphExecDestroy(executable));
    DRIVER(cuGraphDestroy(graph));
}

int main(int argc, char **argv) {
    size_t bytes = size_t(argc > 1 ? atoi(argv[1]) : 1) << 30;
    int seconds = argc > 2 ? atoi(argv[2]) : 1;
    CUstream captures, joins, blocking;
    CUevent before, before_join, fork, join, legacy;
    CUgraph graph;
    Memory memory;
    MUST(cudaSetDevice(0) == cudaSuccess && cudaFree(nullptr) == cudaSuccess, "no GPU");
    DRIVER(cuCtxGetCurrent(&context));
    DRIVER(cuCtxGetDevice(&device));
    DRIVER(cuStreamCreate(&captures, CU_STREAM_NON_BLOCKING));
    DRIVER(cuStreamCreate(&joins, CU_STREAM_NON_BLOCKING));
    DRIVER(cuStreamCreate(&blocking, CU_STREAM_DEFAULT));
    for (CUevent *event : {&before, &before_join, &fork, &join, &legacy})
        DRIVER(cuEventCreate(event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC));
    memory.bytes = 64 << 20;
    DRIVER(cuMemAddressReserve(&memory.address, memory.bytes, 0, 0, 0));
    memory.map();
    size_t count = memory.bytes / 4;
    unsigned *words = reinterpret_cast<unsigned *>(memory.address);
    DRIVER(cuMemsetD32(memory.address, 1, count));

    // Both streams have work of their own; its end is marked, and they capture.
    spin<<<1, 1, 0, captures>>>(400000000LL);
    spin<<<1, 1, 0, joins>>>(600000000LL);
    DRIVER(cuEventRecord(before, captures));
    DRIVER(cuEventRecord(before_join, joins));
    DRIVER(cuStreamBeginCapture(captures, CU_STREAM_CAPTURE_MODE_GLOBAL));
    add<<<256, 256, 0, captures>>>(words, count, 2);
    DRIVER(cuEventRecord(fork, captures));
    DRIVER(cuStreamWaitEvent(joins, fork, 0));
    add<<<256, 256, 0, joins>>>(words, count, 3);
    DRIVER(cuEventRecord(join, joins));
    DRIVER(cuStreamWaitEvent(captures, join, 0));
    aside(CU_STREAM_CAPTURE_MODE_RELAXED, [&] {
        CUstreamCaptureStatus now;
        while (cuEventQuery(before) == CUDA_ERROR_NOT_READY || cuEventQuery(before_join) == CUDA_ERROR_NOT_READY) {
        }
        FACT(cuEventQuery(before));
        FACT(cuEventQuery(before_join));
        FACT(cuStreamIsCapturing(CU_STREAM_LEGACY, &now));
        FACT(cuEventRecord(legacy, CU_STREAM_LEGACY));
        FACT(cuEventSynchronize(legacy));
        FACT(cuStreamQuery(blocking));
        out_and_back(memory);
    });
    printf("fact: the capture is %d\n", int(status(captures)));
    DRIVER(cuStreamEndCapture(captures, &graph));
    replay(graph, captures);
    check(memory.address, count, 6);

    // A stream captures that the legacy stream would wait for: to ask for that ruins nothing.
    DRIVER(cuStreamBeginCapture(blocking, CU_STREAM_CAPTURE_MODE_GLOBAL));
    aside(CU_STREAM_CAPTURE_MODE_RELAXED, [&] {
        CUstreamCaptureStatus now;
        FACT(cuStreamIsCapturing(CU_STREAM_LEGACY, &now));
    });
    printf("fact: the capture of a blocking stream is %d\n", int(status(blocking)));
    DRIVER(cuStreamEndCapture(blocking, &graph));
    DRIVER(cuGraphDestroy(graph));

    // And what a thread in the ordinary mode is told.
    DRIVER(cuStreamBeginCapture(captures, CU_STREAM_CAPTURE_MODE_GLOBAL));
    aside(CU_STREAM_CAPTURE_MODE_GLOBAL, [&] { FACT(cuEventQuery(before)); });
    printf("fact: the capture is %d\n", int(status(captures)));
    FACT(cuStreamEndCapture(captures, &graph));

    // Open for long, with memory that does not fit beside another client's, and work that is under way when it begins.
    CUdeviceptr large;
    DRIVER(cuMemAlloc(&large, bytes));
    DRIVER(cuMemsetD32(large, 1, bytes / 4));
    spin<<<1, 1, 0, captures>>>(2000000000LL);
    add<<<256, 256, 0, captures>>>(reinterpret_cast<unsigned *>(large), bytes / 4, 4);
    DRIVER(cuStreamBeginCapture(captures, CU_STREAM_CAPTURE_MODE_GLOBAL));
    add<<<256, 256, 0, captures>>>(reinterpret_cast<unsigned *>(large), bytes / 8, 7);
    printf("a capture is open for %d s\n", seconds);
    fflush(stdout);
    std::this_thread::sleep_for(std::chrono::seconds(seconds));
    add<<<256, 256, 0, captures>>>(reinterpret_cast<unsigned *>(large) + bytes / 8, bytes / 8, 7);
    DRIVER(cuStreamEndCapture(captures, &graph));
    DRIVER(cuStreamSynchronize(captures));
    check(large, bytes / 4, 5);
    replay(graph, captures);
    check(large, bytes / 4, 12);
    printf("OK\n");
    return 0;
}
