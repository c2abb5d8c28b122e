/*
 * Collectives between processes on the simulated GPU: a stand-in for libnccl.so.2 with the little of its interface that the
 * tests need.
 *
 * A collective is work in a stream that ends when all ranks have come to theirs, as NCCL's kernels are: if the work of one rank
 * cannot begin, that of the others waits. The ranks meet in shared memory that is named by the communicator's unique id. A
 * rank whose process has ended is noticed, as NCCL's proxies notice it by their connections, and the others' work ends with an
 * error.
 */
#include "nccl.h"
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>

enum { MOST_RANKS = 16, IN_FLIGHT = 4096, LOOK_FOR_THE_DEAD = 200 };

/* What the ranks of a communicator share. */
struct meeting {
    atomic_uint joined;
    atomic_int pids[MOST_RANKS];
    /* How many collectives a rank has come to, and what it brought to each of the last ones. */
    atomic_uint arrived[MOST_RANKS];
    atomic_uint brought[MOST_RANKS][IN_FLIGHT];
    atomic_int aborted;
};

struct ncclComm {
    struct meeting *meeting;
    int ranks, rank;
    unsigned launched;
    atomic_int error;
    char name[64];
};

/* One collective of this rank: what it brings, and the sum, which goes to the GPU from here. */
struct collective {
    ncclComm_t comm;
    unsigned number, value, sum;
};

/* In pinned memory, or the thread that launches a collective would wait for the copy of its sum, and so for all ranks. */
static struct collective *ring;
static atomic_uint next_in_ring;

static void make_ring(void) {
    void *memory;
    CHECK(cuMemHostAlloc(&memory, IN_FLIGHT * sizeof *ring, 0));
    ring = memory;
}

static int somebody_has_ended(struct meeting *meeting, int ranks) {
    for (int rank = 0; rank < ranks; rank++) {
        int pid = atomic_load(&meeting->pids[rank]);
        if (pid && kill(pid, 0) && errno == ESRCH) return 1;
    }
    return 0;
}

/* Waits for the other ranks, in a stream. */
static void meet(void *argument) {
    struct collective *this = argument;
    ncclComm_t comm = this->comm;
    struct meeting *meeting = comm->meeting;
    atomic_store(&meeting->brought[comm->rank][this->number % IN_FLIGHT], this->value);
    atomic_store(&meeting->arrived[comm->rank], this->number);
    this->sum = 0;
    for (int rank = 0, looks = 0; rank < comm->ranks; rank++) {
        while ((int)(atomic_load(&meeting->arrived[rank]) - this->number) < 0) {
            if (atomic_load(&meeting->aborted) || atomic_load(&comm->error) ||
                (++looks % LOOK_FOR_THE_DEAD == 0 && somebody_has_ended(meeting, comm->ranks))) {
                atomic_store(&comm->error, ncclRemoteError);
                return;
            }
            usleep(50);
        }
        this->sum += atomic_load(&meeting->brought[rank][this->number % IN_FLIGHT]);
    }
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static atomic_uint number;
    memset(id, 0, sizeof *id);
    /* With the time: a process that was killed leaves its file, and its pid comes again. */
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(id->internal, sizeof id->internal, "/nccl-stand-in-%d-%u-%lld.%09ld", getpid(), atomic_fetch_add(&number, 1),
             (long long)now.tv_sec, now.tv_nsec);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *made, int ranks, ncclUniqueId id, int rank) {
    if (ranks > MOST_RANKS || rank < 0 || rank >= ranks) return ncclInvalidArgument;
    int file = shm_open(id.internal, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(struct meeting))) return ncclSystemError;
    struct meeting *meeting = mmap(NULL, sizeof *meeting, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (meeting == MAP_FAILED) return ncclSystemError;
    ncclComm_t comm = calloc(1, sizeof *comm);
    comm->meeting = meeting;
    comm->ranks = ranks;
    comm->rank = rank;
    memcpy(comm->name, id.internal, sizeof comm->name - 1);
    atomic_store(&meeting->pids[rank], getpid());
    atomic_fetch_add(&meeting->joined, 1);
    /* As NCCL does, it returns when all ranks are there. */
    while (atomic_load(&meeting->joined) < (unsigned)ranks) {
        if (somebody_has_ended(meeting, ranks)) return ncclRemoteError;
        usleep(50);
    }
    shm_unlink(id.internal);
    *made = comm;
    return ncclSuccess;
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int order, ncclComm_t *made, void *config) {
    ncclUniqueId id;
    (void)config;
    memset(&id, 0, sizeof id);
    snprintf(id.internal, sizeof id.internal, "%.100s-%d", comm->name, color);
    return ncclCommInitRank(made, comm->ranks, id, order);
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    munmap(comm->meeting, sizeof *comm->meeting);
    free(comm);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    atomic_store(&comm->error, ncclRemoteError);
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
    *error = atomic_load(&comm->error);
    return ncclSuccess;
}

ncclResult_t standInAllReduce(unsigned value, CUdeviceptr to, ncclComm_t comm, CUstream stream) {
    static pthread_once_t made = PTHREAD_ONCE_INIT;
    pthread_once(&made, make_ring);
    struct collective *this = &ring[atomic_fetch_add(&next_in_ring, 1) % IN_FLIGHT];
    this->comm = comm;
    this->number = ++comm->launched;
    this->value = value;
    CHECK(cuLaunchHostFunc(stream, meet, this));
    CHECK(cuMemcpyHtoDAsync_v2(to, &this->sum, sizeof this->sum, stream));
    return ncclSuccess;
}
