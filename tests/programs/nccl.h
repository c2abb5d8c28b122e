/*
 * The part of NCCL's interface that the stand-in (nccl_stand_in.c) has, for the programs in this folder.
 */
#ifndef NVSHARE_TEST_NCCL_H
#define NVSHARE_TEST_NCCL_H

#include "driver.h"

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

#endif
