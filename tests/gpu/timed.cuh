// What the programs share that time the driver: a check of each result, after which a process ends at once, and a clock.
#pragma once

#include <cuda.h>

#include <cstdio>
#include <time.h>
#include <unistd.h>

#define CHECK(call)                                                                                  \
    do {                                                                                             \
        CUresult said = (call);                                                                      \
        if (said != CUDA_SUCCESS) {                                                                  \
            const char *name = "?";                                                                  \
            cuGetErrorName(said, &name);                                                             \
            fprintf(stderr, "%s:%d: %s said %s\n", __FILE__, __LINE__, #call, name);                 \
            _exit(1);                                                                                \
        }                                                                                            \
    } while (0)

// Seconds.
static inline double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}
