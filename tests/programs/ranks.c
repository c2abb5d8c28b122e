/*
 * One rank of a job whose ranks are processes: `ranks JOB RANK RANKS MIB AHEAD DEVICE...`.
 *
 * In each round a rank writes to all its memory on each of its devices, computes for a time that differs from rank to rank, and
 * meets the other ranks in a collective (nccl_stand_in.c). It waits for its GPU after every AHEAD rounds, so with more than one the
 * ranks launch ahead of each other. It says "ready" after the first round and "round N" now and then, and goes on until the
 * standard input of rank 0 ends. Then it looks at its data.
 *
 * With LATE_US=N, ranks but the first come N microseconds later in each round, so the first one is far ahead of them.
 *
 * JOB is a name for a file, by which the ranks find their communicator. With NCCL_AT_RUN_TIME=1 it finds NCCL as vLLM does, by
 * dlopen and dlsym. Exits with 5 if another rank has ended.
 */
#include "nccl.h"
#include <dlfcn.h>

enum { MOST_DEVICES = 4, SAY_EVERY = 10 };

static CUcontext contexts[MOST_DEVICES];
static CUdeviceptr memory[MOST_DEVICES], sums;
static CUstream streams[MOST_DEVICES];

static ncclResult_t (*init)(ncclComm_t *, int, ncclUniqueId, int) = ncclCommInitRank;

int main(int count, char **arguments) {
    if (count < 7) return 2;
    int rank = atoi(arguments[2]), ranks = atoi(arguments[3]), devices = count - 6, end = 0;
    size_t bytes = strtoul(arguments[4], NULL, 0) << 20;
    unsigned ahead = atoi(arguments[5]), seed = 1 + rank;
    if (getenv("NCCL_AT_RUN_TIME")) {
        void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
        init = library ? (ncclResult_t (*)(ncclComm_t *, int, ncclUniqueId, int))dlsym(library, "ncclCommInitRank") : NULL;
        if (!init) return 2;
    }
    CHECK(cuInit(0));
    for (int i = 0; i < devices; i++) {
        CUdevice device;
        CHECK(cuDeviceGet(&device, atoi(arguments[6 + i])));
        CHECK(cuCtxCreate_v2(&contexts[i], 0, device));
        CHECK(cuMemAlloc_v2(&memory[i], bytes));
        CHECK(cuStreamCreate(&streams[i], CU_STREAM_NON_BLOCKING));
    }
    CHECK(cuMemAlloc_v2(&sums, 4 * ahead));
    useconds_t late = rank && getenv("LATE_US") ? atoi(getenv("LATE_US")) : 0;
    ncclComm_t comm;
    ncclResult_t result = init(&comm, ranks, unique_id(arguments[1], rank), rank);
    if (result) return result == ncclRemoteError ? 5 : 2;
    unsigned round = 0, *seen = malloc(4 * ahead);
    while (!end) {
        for (unsigned i = 0; i < ahead; i++, round++) {
            for (int d = 0; d < devices; d++) {
                CHECK(cuCtxSetCurrent(contexts[d]));
                CHECK(cuMemsetD32Async(memory[d], round, bytes / 4, streams[d]));
            }
            /* The host's part, which is longer in one rank and then in the other. */
            seed = seed * 1103515245 + 12345;
            usleep((seed >> 16 & 2047) + late);
            /* In the last one of a batch, rank 0 says whether to end; else it is the number of the round. */
            int last = i + 1 == ahead;
            unsigned value = !last ? round : rank == 0 && input_has_ended();
            standInAllReduce(value, sums + 4 * i, comm, streams[devices - 1]);
        }
        for (int d = 0; d < devices; d++) {
            CHECK(cuCtxSetCurrent(contexts[d]));
            CHECK(cuStreamSynchronize(streams[d]));
        }
        ncclCommGetAsyncError(comm, &result);
        if (result) {
            SAY("another rank has ended");
            return 5;
        }
        CHECK(cuMemcpyDtoH_v2(seen, sums, 4 * ahead));
        for (unsigned i = 0; i + 1 < ahead; i++) {
            unsigned right = ranks * (round - ahead + i);
            if (seen[i] != right) {
                fprintf(stderr, "wrong sum: %u and not %u\n", seen[i], right);
                return 4;
            }
        }
        end = seen[ahead - 1];
        if (round == ahead) SAY("ready");
        if (round / SAY_EVERY != (round - ahead) / SAY_EVERY) SAY("round %u", round);
    }
    for (int d = 0; d < devices; d++) {
        CHECK(cuCtxSetCurrent(contexts[d]));
        check_words(memory[d], bytes, round - 1);
    }
    SAY("done %u", round);
    ncclCommDestroy(comm);
    return 0;
}
