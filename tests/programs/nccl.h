/*
 * The part of NCCL's interface that the stand-in (nccl_stand_in.c) has, for the programs in this folder, and what their ranks need.
 */
#ifndef NVSHARE_TEST_NCCL_H
#define NVSHARE_TEST_NCCL_H

#include "driver.h"
#include <fcntl.h>
#include <poll.h>

typedef struct { char internal[128]; } ncclUniqueId;
typedef struct ncclComm *ncclComm_t;
typedef enum { ncclSuccess = 0, ncclSystemError = 2, ncclInvalidArgument = 4, ncclRemoteError = 6 } ncclResult_t;

ncclResult_t ncclGetUniqueId(ncclUniqueId *id);
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank);
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int order, ncclComm_t *made, void *config);
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error);

/* Not NCCL's: adds up one number of each rank. The sum is at `to` on the GPU when the stream's work so far is done. */
ncclResult_t standInAllReduce(unsigned value, CUdeviceptr to, ncclComm_t comm, CUstream stream);

/* What the programs have in common that are a rank each. */

/* The unique id: rank 0 makes it and the others read it, by way of a file. */
static inline ncclUniqueId unique_id(const char *name, int rank) {
    ncclUniqueId id;
    char made[300];
    snprintf(made, sizeof made, "%s.made", name);
    if (rank == 0) {
        ncclGetUniqueId(&id);
        int file = open(made, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        if (file < 0 || write(file, &id, sizeof id) != sizeof id || close(file) || rename(made, name)) exit(2);
        return id;
    }
    for (;;) {
        int file = open(name, O_RDONLY);
        if (file >= 0 && read(file, &id, sizeof id) == sizeof id) return id;
        if (file >= 0) close(file);
        usleep(1000);
    }
}

static inline int input_has_ended(void) {
    struct pollfd input = {.fd = 0, .events = POLLIN};
    char byte;
    return poll(&input, 1, 0) > 0 && read(0, &byte, 1) <= 0;
}

#endif
