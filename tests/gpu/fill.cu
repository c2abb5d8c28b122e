// What bringing memory in costs beside its copies: creating, mapping and opening (cuMemSetAccess) physical memory while copies are
// under way, by the size of a chunk and by how many neighbouring chunks are opened with one call; and unmapping and releasing it.
//
//     nvcc -O2 -std=c++17 -o fill tests/gpu/fill.cu -lcuda && ./fill [GiB]
//
// One line for each case, the median of five rounds: GiB/s by the wall clock, and how long the driver's calls took, us for each 64 MiB.

#include "timed.cuh"
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <sys/mman.h>
#include <vector>

constexpr size_t MIB = 1 << 20, UNIT = 64 * MIB;
constexpr int DEPTH = 8, ROUNDS = 5;

struct Case {
    const char *name;
    size_t chunk;
    // How many chunks are opened by one call.
    int group;
    // The bytes of one copy; 0: all that is opened at once.
    size_t piece;
    bool maps, copies;
};

static const Case CASES[] = {
    {"copies alone, 64 MiB each", 64 * MIB, 1, 0, false, true},
    {"copies alone, 2 MiB each", 64 * MIB, 1, 2 * MIB, false, true},
    {"chunks of 64 MiB, no copies", 64 * MIB, 1, 0, true, false},
    {"chunks of 64 MiB", 64 * MIB, 1, 0, true, true},
    {"the same, copies of 2 MiB", 64 * MIB, 1, 2 * MIB, true, true},
    {"chunks of 64 MiB, opened by 2", 64 * MIB, 2, 0, true, true},
    {"chunks of 64 MiB, opened by 4", 64 * MIB, 4, 0, true, true},
    {"chunks of 64 MiB, opened by 8", 64 * MIB, 8, 0, true, true},
    {"chunks of 64 MiB, opened by 16", 64 * MIB, 16, 0, true, true},
    {"chunks of 64 MiB, opened all at once, no copies", 64 * MIB, 1 << 20, 0, true, false},
    {"chunks of 64 MiB, opened all at once", 64 * MIB, 1 << 20, 64 * MIB, true, true},
    {"chunks of 16 MiB", 16 * MIB, 1, 0, true, true},
    {"chunks of 128 MiB", 128 * MIB, 1, 0, true, true},
    {"chunks of 256 MiB", 256 * MIB, 1, 0, true, true},
    {"chunks of 512 MiB", 512 * MIB, 1, 0, true, true},
    {"copies alone, 64 MiB each, again", 64 * MIB, 1, 0, false, true},
};

int main(int count, char **arguments) {
    size_t total = (count > 1 ? strtoul(arguments[1], nullptr, 10) : 8) << 30;
    CHECK(cuInit(0));
    CUdevice device;
    CHECK(cuDeviceGet(&device, 0));
    char name[100];
    CHECK(cuDeviceGetName(name, sizeof name, device));
    printf("%s, %zu GiB\n", name, total >> 30);
    CUcontext context;
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CUstream stream;
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    char *host = static_cast<char *>(mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    madvise(host, total, MADV_HUGEPAGE);
    memset(host, 1, total);
    CHECK(cuMemHostRegister(host, total, CU_MEMHOSTREGISTER_PORTABLE));
    CUdeviceptr base;
    CHECK(cuMemAddressReserve(&base, total, 2 * MIB, 0, 0));
    CUmemAllocationProp prop = {};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};

    for (const Case &each : CASES) {
        size_t chunks = total / each.chunk;
        size_t group = std::min(chunks, size_t(each.group));
        std::vector<double> seconds, created, mapped, opened, unmapped, released;
        for (int round = 0; round < ROUNDS; round++) {
            std::vector<CUmemGenericAllocationHandle> handles(chunks);
            double create = 0, map = 0, open = 0, unmap = 0, release = 0, from = 0;
            auto lap = [&](double &sum) {
                double time = now();
                sum += time - from;
                from = time;
            };
            auto bring = [&](size_t first) {
                from = now();
                for (size_t at = first; at < first + group; at++) {
                    CHECK(cuMemCreate(&handles[at], each.chunk, &prop, 0));
                    lap(create);
                    CHECK(cuMemMap(base + at * each.chunk, each.chunk, 0, handles[at], 0));
                    lap(map);
                }
                CHECK(cuMemSetAccess(base + first * each.chunk, group * each.chunk, &access, 1));
                lap(open);
            };
            if (!each.maps)
                for (size_t at = 0; at < chunks; at += group)
                    bring(at);
            std::deque<CUevent> flying;
            auto retire = [&] {
                CHECK(cuEventSynchronize(flying.front()));
                CHECK(cuEventDestroy(flying.front()));
                flying.pop_front();
            };
            double began = now();
            for (size_t at = 0; at < chunks; at += group) {
                if (each.maps)
                    bring(at);
                size_t bytes = group * each.chunk, piece = each.piece ? each.piece : bytes;
                for (size_t done = 0; each.copies && done < bytes; done += piece)
                    CHECK(cuMemcpyHtoDAsync(base + at * each.chunk + done, host + at * each.chunk + done, piece, stream));
                CUevent event;
                CHECK(cuEventCreate(&event, CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING));
                CHECK(cuEventRecord(event, stream));
                flying.push_back(event);
                if (flying.size() >= DEPTH)
                    retire();
            }
            while (!flying.empty())
                retire();
            seconds.push_back(now() - began);
            from = now();
            for (size_t at = 0; at < chunks; at++) {
                CHECK(cuMemUnmap(base + at * each.chunk, each.chunk));
                lap(unmap);
                CHECK(cuMemRelease(handles[at]));
                lap(release);
            }
            created.push_back(create), mapped.push_back(map), opened.push_back(open);
            unmapped.push_back(unmap), released.push_back(release);
        }
        auto median = [](std::vector<double> &values) {
            std::sort(values.begin(), values.end());
            return values[values.size() / 2];
        };
        double per = 1e6 * UNIT / total;
        printf(
            "%-48s %5.1f ms, %5.1f GiB/s; create %5.1f map %5.1f open %5.1f unmap %5.1f release %5.1f us\n", each.name,
            1e3 * median(seconds), total / median(seconds) / (1 << 30), per * median(created), per * median(mapped),
            per * median(opened), per * median(unmapped), per * median(released)
        );
        fflush(stdout);
    }
}
