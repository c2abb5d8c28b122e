// What the two sides of a switch do to each other: one process copies out while another copies in, each as the swap
// engine does it (chunks of 64 MiB, eight in flight, registered huge pages), with and without creating and mapping the
// memory that comes in, and unmapping and releasing the memory that goes out; by the copy engines and by a kernel.
//
//     nvcc -o duplex tests/gpu/duplex.cu -lcuda && ./duplex [GiB each way]
//
// One line for each case: GiB/s each way by the wall clock and by the GPU's, median of five rounds, and how long the two
// processes' driver calls took in it, ms.

#include "timed.cuh"
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

constexpr size_t CHUNK = 64 << 20, HUGE = 2 << 20;
constexpr int DEPTH = 8, ROUNDS = 5;

struct Result {
    double wall_s, copying_s, calls_s;
};

struct Shared {
    std::atomic<int> arrived;
    // Chunks that went out in this round, for the case in which what comes in waits for them.
    std::atomic<int> gone;
    Result result[2];
};

enum { OUT, IN };

// How a chunk is copied.
enum By { ENGINE, KERNEL };

struct Case {
    const char *name;
    bool out, in, unmaps, maps, follows;
    // The most copies out that are in flight.
    int out_depth;
    By out_by = ENGINE, in_by = ENGINE;
    // What is unmapped is released only when all is copied.
    bool releases_late = false;
    int blocks = 0;
};

static const Case CASES[] = {
    {"in alone", false, true, false, false, false, DEPTH},
    {"out alone", true, false, false, false, false, DEPTH},
    {"both", true, true, false, false, false, DEPTH},
    {"in alone, maps", false, true, false, true, false, DEPTH},
    {"out alone, unmaps", true, false, true, false, false, DEPTH},
    {"both, in maps", true, true, false, true, false, DEPTH},
    {"both, out unmaps", true, true, true, false, false, DEPTH},
    {"both, maps and unmaps", true, true, true, true, false, DEPTH},
    {"a switch: in follows out", true, true, true, true, true, DEPTH},
    {"a switch, two copies out in flight", true, true, true, true, true, 2},
    {"a switch, one copy out in flight", true, true, true, true, true, 1},
    {"both, out unmaps, releases late", true, true, true, false, false, DEPTH, ENGINE, ENGINE, true},
    {"in alone by kernel, 16 blocks", false, true, false, false, false, DEPTH, ENGINE, KERNEL, false, 16},
    {"in alone by kernel, 66 blocks", false, true, false, false, false, DEPTH, ENGINE, KERNEL, false, 66},
    {"in alone by kernel, 264 blocks", false, true, false, false, false, DEPTH, ENGINE, KERNEL, false, 264},
    {"out alone by kernel, 66 blocks", true, false, false, false, false, DEPTH, KERNEL, ENGINE, false, 66},
    {"both, in by kernel, 66 blocks", true, true, false, false, false, DEPTH, ENGINE, KERNEL, false, 66},
    {"a switch, in by kernel, 16 blocks", true, true, true, true, true, DEPTH, ENGINE, KERNEL, false, 16},
    {"a switch, in by kernel, 66 blocks", true, true, true, true, true, DEPTH, ENGINE, KERNEL, false, 66},
    {"a switch, in by kernel, 264 blocks", true, true, true, true, true, DEPTH, ENGINE, KERNEL, false, 264},
    {"a switch, out by kernel, 66 blocks", true, true, true, true, true, DEPTH, KERNEL, ENGINE, false, 66},
    {"a switch: in follows out, again", true, true, true, true, true, DEPTH},
};

// 16 bytes a load, eight loads in flight in each thread.
__global__ void copy(uint4 *to, const uint4 *from, size_t count) {
    constexpr int AHEAD = 8;
    size_t step = size_t(gridDim.x) * blockDim.x;
    for (size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += step * AHEAD) {
        uint4 held[AHEAD];
#pragma unroll
        for (int each = 0; each < AHEAD; each++)
            if (at + each * step < count) held[each] = __ldcs(from + at + each * step);
#pragma unroll
        for (int each = 0; each < AHEAD; each++)
            if (at + each * step < count) __stcs(to + at + each * step, held[each]);
    }
}

// Both processes are here.
static void meet(Shared *shared, int &round) {
    int target = 2 * ++round;
    shared->arrived.fetch_add(1);
    while (shared->arrived.load() < target) {
    }
}

struct Side {
    int side;
    size_t chunks;
    Shared *shared;
    CUdeviceptr base;
    std::vector<CUmemGenericAllocationHandle> handles;
    char *host;
    CUstream stream;
    std::vector<CUevent> begins, ends;
    CUmemAllocationProp prop = {};
    CUmemAccessDesc access = {};

    void create(size_t chunk) {
        CUdeviceptr at = base + chunk * CHUNK;
        CHECK(cuMemCreate(&handles[chunk], CHUNK, &prop, 0));
        CHECK(cuMemMap(at, CHUNK, 0, handles[chunk], 0));
        CHECK(cuMemSetAccess(at, CHUNK, &access, 1));
    }

    void drop(size_t chunk, bool release = true) {
        CHECK(cuMemUnmap(base + chunk * CHUNK, CHUNK));
        if (release) let_go(chunk);
    }

    void let_go(size_t chunk) {
        CHECK(cuMemRelease(handles[chunk]));
        handles[chunk] = 0;
    }

    Result round(const Case &one) {
        bool maps = side == IN && one.maps, unmaps = side == OUT && one.unmaps;
        for (size_t chunk = 0; chunk < chunks; chunk++) {
            if (maps && handles[chunk]) drop(chunk);
            if (!maps && !handles[chunk]) create(chunk);
        }
        int depth = side == OUT ? one.out_depth : DEPTH;
        Result result = {};
        std::deque<size_t> flying;
        shared->gone = 0;
        meet(shared, met);
        if (!(side == OUT ? one.out : one.in)) {
            meet(shared, met);
            return result;
        }
        double began = now();
        auto retire = [&] {
            size_t chunk = flying.front();
            flying.pop_front();
            CHECK(cuEventSynchronize(ends[chunk]));
            float ms = 0;
            CHECK(cuEventElapsedTime(&ms, begins[chunk], ends[chunk]));
            result.copying_s += ms / 1e3;
            if (unmaps) {
                double at = now();
                drop(chunk, !one.releases_late);
                result.calls_s += now() - at;
            }
            if (side == OUT) shared->gone.fetch_add(1);
        };
        for (size_t chunk = 0; chunk < chunks; chunk++) {
            if (side == IN && one.follows)
                while (shared->gone.load() <= (int)chunk) {
                }
            if (maps) {
                double at = now();
                create(chunk);
                result.calls_s += now() - at;
            }
            CHECK(cuEventRecord(begins[chunk], stream));
            CUdeviceptr device = base + chunk * CHUNK;
            char *memory = host + chunk * CHUNK;
            if ((side == OUT ? one.out_by : one.in_by) == KERNEL) {
                auto there = (uint4 *)device, here = (uint4 *)memory;
                copy<<<one.blocks, 512, 0, stream>>>(side == OUT ? here : there, side == OUT ? there : here, CHUNK / sizeof(uint4));
            } else if (side == OUT)
                CHECK(cuMemcpyDtoHAsync(memory, device, CHUNK, stream));
            else
                CHECK(cuMemcpyHtoDAsync(device, memory, CHUNK, stream));
            CHECK(cuEventRecord(ends[chunk], stream));
            flying.push_back(chunk);
            while ((int)flying.size() >= depth) retire();
        }
        while (!flying.empty()) retire();
        result.wall_s = now() - began;
        if (unmaps && one.releases_late)
            for (size_t chunk = 0; chunk < chunks; chunk++) let_go(chunk);
        meet(shared, met);
        return result;
    }

    int met = 0;

    void run() {
        CHECK(cuInit(0));
        CUdevice device;
        CUcontext context;
        CHECK(cuDeviceGet(&device, 0));
        CHECK(cuDevicePrimaryCtxRetain(&context, device));
        CHECK(cuCtxSetCurrent(context));
        CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
        begins.resize(chunks), ends.resize(chunks), handles.resize(chunks);
        for (auto events : {&begins, &ends})
            for (auto &event : *events) CHECK(cuEventCreate(&event, CU_EVENT_BLOCKING_SYNC));
        size_t bytes = chunks * CHUNK;
        char *mapped = (char *)mmap(nullptr, bytes + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        host = (char *)(((size_t)mapped + HUGE - 1) / HUGE * HUGE);
        madvise(host, bytes, MADV_HUGEPAGE);
        memset(host, 1, bytes);
        CHECK(cuMemHostRegister(host, bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP));
        prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
        prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        prop.location.id = device;
        access.location = prop.location;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        CHECK(cuMemAddressReserve(&base, bytes, 0, 0, 0));
        double gib = bytes / double(1 << 30);
        for (const Case &one : CASES) {
            std::vector<double> wall[2], copying[2], calls[2], whole;
            for (int number = 0; number < ROUNDS; number++) {
                shared->result[side] = round(one);
                meet(shared, met);
                for (int each : {OUT, IN}) {
                    wall[each].push_back(shared->result[each].wall_s);
                    copying[each].push_back(shared->result[each].copying_s);
                    calls[each].push_back(shared->result[each].calls_s);
                }
                whole.push_back(std::max(shared->result[OUT].wall_s, shared->result[IN].wall_s));
                meet(shared, met);
            }
            if (side == IN) continue;
            auto median = [](std::vector<double> &values) {
                std::sort(values.begin(), values.end());
                return values[values.size() / 2];
            };
            auto rate = [&](std::vector<double> &values) {
                double took = median(values);
                return took > 0 ? gib / took : 0;
            };
            printf("%-36s out %5.1f (GPU %5.1f) in %5.1f (GPU %5.1f) whole %5.1f GiB/s; calls out %5.1f in %5.1f ms\n",
                   one.name, rate(wall[OUT]), rate(copying[OUT]), rate(wall[IN]), rate(copying[IN]), rate(whole),
                   median(calls[OUT]) * 1e3, median(calls[IN]) * 1e3);
            fflush(stdout);
        }
    }
};

int main(int count, char **arguments) {
    double gib = count > 1 ? atof(arguments[1]) : 8;
    void *memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    Shared *shared = new (memory) Shared{};
    size_t chunks = size_t(gib * (1 << 30) / CHUNK);
    for (int side : {OUT, IN}) {
        if (fork() == 0) {
            Side one = {};
            one.side = side, one.chunks = chunks, one.shared = shared;
            one.run();
            _exit(0);
        }
    }
    int worst = 0, status;
    while (wait(&status) > 0) worst = std::max(worst, WIFEXITED(status) ? WEXITSTATUS(status) : 1);
    return worst;
}
