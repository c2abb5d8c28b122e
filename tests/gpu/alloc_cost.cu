// What an allocation costs: cuMemAlloc and cuMemFree of several sizes, and the driver calls that nvshare makes of them.
//
//   nvcc -O2 -o alloc_cost tests/gpu/alloc_cost.cu -lcuda
//   ./alloc_cost                                  natively: allocations, then the parts of a mapping
//   LD_PRELOAD=.../libnvshare.so ./alloc_cost     under nvshare: allocations
//
// Each line is a median in microseconds, with the least and the most. The context is quiet: nothing waits for the GPU.
#include <cuda.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

static void check(CUresult result, const char *call) {
    if (result != CUDA_SUCCESS) {
        std::fprintf(stderr, "%s: CUDA error %d\n", call, result);
        std::exit(1);
    }
}
#define CHECK(call) check(call, #call)

static double microseconds() {
    auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::micro>(time).count();
}

static void report(const char *what, size_t bytes, std::vector<double> times) {
    std::sort(times.begin(), times.end());
    std::printf("%-34s %8zu MiB: %9.1f us (%.1f to %.1f, %zu times)\n", what, bytes >> 20, times[times.size() / 2],
                times.front(), times.back(), times.size());
}

// cuMemAlloc and cuMemFree at once, and each by itself.
static void allocations(size_t bytes, int times) {
    std::vector<double> both, alloc, free;
    for (int i = -3; i < times; i++) {
        CUdeviceptr memory;
        double begun = microseconds();
        CHECK(cuMemAlloc(&memory, bytes));
        double made = microseconds();
        CHECK(cuMemFree(memory));
        double freed = microseconds();
        if (i < 0) continue;
        both.push_back(freed - begun);
        alloc.push_back(made - begun);
        free.push_back(freed - made);
    }
    report("cuMemAlloc + cuMemFree", bytes, both);
    report("  cuMemAlloc", bytes, alloc);
    report("  cuMemFree", bytes, free);
}

// The parts of an allocation through virtual memory management, in chunks.
static void mappings(size_t bytes, size_t chunk, bool access_at_once, int times) {
    CUmemAllocationProp prop = {};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    CUmemAccessDesc access = {};
    access.location = prop.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    const char *names[] = {"  reserve", "  create", "  map", "  access", "  unmap", "  release", "  free addresses"};
    std::vector<std::vector<double>> parts(7);
    std::vector<double> whole;
    size_t count = bytes / chunk;
    std::vector<CUmemGenericAllocationHandle> handles(count);
    for (int i = -1; i < times; i++) {
        CUdeviceptr base;
        double at[8];
        at[0] = microseconds();
        CHECK(cuMemAddressReserve(&base, bytes, 2 << 20, 0, 0));
        at[1] = microseconds();
        for (size_t c = 0; c < count; c++) CHECK(cuMemCreate(&handles[c], chunk, &prop, 0));
        at[2] = microseconds();
        for (size_t c = 0; c < count; c++) CHECK(cuMemMap(base + c * chunk, chunk, 0, handles[c], 0));
        at[3] = microseconds();
        if (access_at_once) {
            CHECK(cuMemSetAccess(base, bytes, &access, 1));
        } else {
            for (size_t c = 0; c < count; c++) CHECK(cuMemSetAccess(base + c * chunk, chunk, &access, 1));
        }
        at[4] = microseconds();
        if (access_at_once) {
            CHECK(cuMemUnmap(base, bytes));
        } else {
            for (size_t c = 0; c < count; c++) CHECK(cuMemUnmap(base + c * chunk, chunk));
        }
        at[5] = microseconds();
        for (size_t c = 0; c < count; c++) CHECK(cuMemRelease(handles[c]));
        at[6] = microseconds();
        CHECK(cuMemAddressFree(base, bytes));
        at[7] = microseconds();
        if (i < 0) continue;
        for (int part = 0; part < 7; part++) parts[part].push_back(at[part + 1] - at[part]);
        whole.push_back(at[7] - at[0]);
    }
    char title[64];
    std::snprintf(title, sizeof title, "mapped in %zu MiB%s", chunk >> 20, access_at_once ? ", access at once" : "");
    report(title, bytes, whole);
    for (int part = 0; part < 7; part++) report(names[part], bytes, parts[part]);
}

int main() {
    CUdevice device;
    CUcontext context;
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    const size_t MIB = 1 << 20;
    // Work, so that the client runs under nvshare: memory of one that does not run is mapped when it does.
    CUdeviceptr used;
    CHECK(cuMemAlloc(&used, 2 * MIB));
    CHECK(cuMemsetD8(used, 1, 2 * MIB));
    CHECK(cuCtxSynchronize());
    allocations(2 * MIB, 400);
    allocations(64 * MIB, 400);
    allocations(512 * MIB, 100);
    allocations(4096 * MIB, 50);
    if (std::getenv("NVSHARE_RUNTIME_DIR")) return 0;
    mappings(64 * MIB, 64 * MIB, false, 200);
    for (bool at_once : {false, true}) {
        mappings(4096 * MIB, 64 * MIB, at_once, 30);
        mappings(4096 * MIB, 256 * MIB, at_once, 30);
        mappings(4096 * MIB, 1024 * MIB, at_once, 30);
    }
    mappings(4096 * MIB, 4096 * MIB, false, 30);
    return 0;
}
