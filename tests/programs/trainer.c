/*
 * One rank of a training as PyTorch's DDP runs it: `trainer JOB RANK RANKS BLOCK_MIB AHEAD DEVICE`.
 *
 * A rank does AHEAD steps without waiting for its GPU: layers that compute in one stream, and a collective for each of them in another
 * stream, as far apart as two events keep them. In the first steps it allocates as it goes: gradients, what the optimizer keeps, a
 * workspace. Then it allocates a large block, BLOCK_MIB, writes to it and reads from it, while the collectives may still be in
 * flight. It says "ready" when all of that is done, and "round N" now and then; each round is such a step, which uses the block too. It
 * goes on until the standard input of rank 0 ends, and looks at its data.
 *
 * The variable SEED decides how long the host takes between the calls, in each rank differently, and what else a rank does in the first
 * steps, in all ranks at the same place: it frees memory, copies and waits for that, or makes a second communicator. With AFTER=OTHER and AFTER_RANK=N, rank N comes to its first work on the GPU after that of the job OTHER, which
 * is in the same folder. With LOADS=1, all ranks but the first load a module after each collective of a round, in which
 * the first one is late. JOB is a name for a file, by which the ranks find their communicator. Exits with 5 if another rank has
 * ended.
 */
#include "nccl.h"
#include <fcntl.h>

enum { LAYERS = 2, LAYER_MIB = 2, SAY_EVERY = 10, MOST = 64 };

/* A module without kernels. */
static const char PTX[] = ".version 7.0\n.target sm_70\n.address_size 64\n";

static CUcontext context;
static CUstream compute, reduce;
static CUevent before, after;
static CUdeviceptr sums;
static unsigned of_job, of_rank, collectives;
static ncclComm_t comm;

static unsigned next(unsigned *seed) {
    *seed = *seed * 1103515245 + 12345;
    return *seed >> 16;
}

/* The host's part, which takes longer in one rank and then in another: mostly little, and now and then some milliseconds. */
static void host_works(void) {
    unsigned kind = next(&of_rank) % 16;
    if (kind < 8) return;
    usleep(kind < 15 ? next(&of_rank) % 500 : next(&of_rank) % 20000);
}

static ncclComm_t join(const char *job, int number, int rank, int ranks) {
    char name[256];
    snprintf(name, sizeof name, "%s.%d", job, number);
    ncclComm_t made;
    ncclResult_t result = ncclCommInitRank(&made, ranks, unique_id(name, rank), rank);
    if (result) exit(result == ncclRemoteError ? 5 : 2);
    return made;
}

static CUdeviceptr allocated(size_t mib) {
    CUdeviceptr address;
    host_works();
    CHECK(cuMemAlloc_v2(&address, mib << 20));
    return address;
}

/* Computes, and adds up one number of each rank, after what was computed. */
static void layer(CUdeviceptr memory, size_t mib, unsigned value) {
    host_works();
    CHECK(cuMemsetD32Async(memory, value, (mib << 20) / 4, compute));
    CHECK(cuEventRecord(before, compute));
    CHECK(cuStreamWaitEvent(reduce, before, 0));
    host_works();
    standInAllReduce(value, sums + 4 * (collectives++ % MOST), comm, reduce);
}

/* What follows is after all collectives so far. */
static void optimizer(void) {
    CHECK(cuEventRecord(after, reduce));
    CHECK(cuStreamWaitEvent(compute, after, 0));
}

static void wait_for_gpu(void) {
    CHECK(cuStreamSynchronize(compute));
    CHECK(cuStreamSynchronize(reduce));
    ncclResult_t result;
    ncclCommGetAsyncError(comm, &result);
    if (result) {
        SAY("another rank has ended");
        exit(5);
    }
}

/* Other things that programs do in their first steps. */
static void something_else(const char *job, int rank, int ranks) {
    static int communicators = 1;
    unsigned copy;
    CUdeviceptr memory;
    CUmodule module;
    switch (next(&of_job) % 8) {
    case 0:
        CHECK(cuMemcpyDtoH_v2(&copy, sums, sizeof copy));
        break;
    case 1:
        comm = join(job, communicators++, rank, ranks);
        break;
    case 2:
        memory = allocated(4);
        CHECK(cuMemsetD32Async(memory, 1, 1 << 20, compute));
        CHECK(cuMemFree_v2(memory));
        break;
    case 3:
        CHECK(cuCtxSynchronize());
        break;
    case 4:
    case 5:
        /* As drivers do that load a kernel when it is first launched. */
        CHECK(cuModuleLoadData(&module, PTX));
        break;
    }
}

/* The file that a rank of a job makes when it has done its first work. */
static const char *begun(const char *job, int rank) {
    static char name[300];
    snprintf(name, sizeof name, "%s.%d.begun", job, rank);
    return name;
}

/* The first work on the GPU. */
static void begin(const char *job, int rank, CUdeviceptr memory) {
    const char *after = getenv("AFTER"), *folder_ends = strrchr(job, '/');
    if (after && rank == atoi(getenv("AFTER_RANK"))) {
        char other[256];
        snprintf(other, sizeof other, "%.*s/%s", (int)(folder_ends - job), job, after);
        while (access(begun(other, rank), F_OK)) usleep(1000);
    }
    write_words(memory, LAYER_MIB << 20, 0);
    int file = open(begun(job, rank), O_WRONLY | O_CREAT, 0600);
    if (file < 0 || close(file)) exit(2);
}

int main(int count, char **arguments) {
    if (count != 7) return 2;
    const char *job = arguments[1];
    int rank = atoi(arguments[2]), ranks = atoi(arguments[3]), ahead = atoi(arguments[5]);
    int seed = getenv("SEED") ? atoi(getenv("SEED")) : 0;
    size_t block_mib = strtoul(arguments[4], NULL, 0);
    of_job = seed;
    of_rank = seed * 31 + rank;
    CUdevice device;
    CUdeviceptr weights[LAYERS], gradients[LAYERS], momenta[LAYERS], block;
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, atoi(arguments[6])));
    CHECK(cuCtxCreate_v2(&context, 0, device));
    CHECK(cuStreamCreate(&compute, CU_STREAM_NON_BLOCKING));
    CHECK(cuStreamCreate(&reduce, CU_STREAM_NON_BLOCKING));
    CHECK(cuEventCreate(&before, 2));
    CHECK(cuEventCreate(&after, 2));
    CHECK(cuMemAlloc_v2(&sums, 4 * MOST));
    for (int i = 0; i < LAYERS; i++) weights[i] = allocated(LAYER_MIB);
    begin(job, rank, weights[0]);
    comm = join(job, 0, rank, ranks);
    for (int step = 0; step < ahead; step++) {
        for (int i = 0; i < LAYERS; i++) {
            if (step == 0) gradients[i] = allocated(LAYER_MIB);
            layer(gradients[i], LAYER_MIB, step);
        }
        something_else(job, rank, ranks);
        optimizer();
        for (int i = 0; i < LAYERS; i++) {
            if (step == 0) momenta[i] = allocated(LAYER_MIB);
            host_works();
            CHECK(cuMemsetD32Async(momenta[i], step, (LAYER_MIB << 20) / 4, compute));
            CHECK(cuMemsetD32Async(weights[i], step, (LAYER_MIB << 20) / 4, compute));
        }
    }
    block = allocated(block_mib);
    unsigned seen, round = 0;
    int loads = getenv("LOADS") != NULL;
    CUmodule module;
    CHECK(cuModuleLoadData(&module, PTX));
    CHECK(cuMemsetD32Async(block, 7, (block_mib << 20) / 4, compute));
    CHECK(cuMemcpyDtoHAsync_v2(&seen, block, sizeof seen, compute));
    CHECK(cuStreamSynchronize(compute));
    if (seen != 7) {
        fprintf(stderr, "wrong data: %u and not 7\n", seen);
        return 4;
    }
    wait_for_gpu();
    SAY("ready");
    for (unsigned end = 0; !end;) {
        round++;
        for (int i = 0; i < LAYERS; i++) {
            if (loads && rank == 0) usleep(5000);
            layer(gradients[i], LAYER_MIB, round);
            if (!loads || rank == 0) continue;
            CHECK(cuModuleLoadData(&module, PTX));
            CHECK(cuModuleUnload(module));
        }
        optimizer();
        CHECK(cuMemsetD32Async(block, round, (block_mib << 20) / 4, compute));
        if (round % 5) continue;
        /* Rank 0 says whether to end. */
        CUdeviceptr told = sums + 4 * (collectives++ % MOST);
        standInAllReduce(rank == 0 && input_has_ended(), told, comm, reduce);
        wait_for_gpu();
        CHECK(cuMemcpyDtoH_v2(&end, told, sizeof end));
        CUdeviceptr last = sums + 4 * ((collectives - 2) % MOST);
        CHECK(cuMemcpyDtoH_v2(&seen, last, sizeof seen));
        if (seen != ranks * round) {
            fprintf(stderr, "wrong sum: %u and not %u\n", seen, ranks * round);
            return 4;
        }
        if (round % SAY_EVERY == 0) SAY("round %u", round);
    }
    check_words(block, block_mib << 20, round);
    for (int i = 0; i < LAYERS; i++) {
        check_words(gradients[i], LAYER_MIB << 20, round);
        check_words(momenta[i], LAYER_MIB << 20, ahead - 1);
    }
    SAY("done %u", round);
    ncclCommDestroy(comm);
    return 0;
}
