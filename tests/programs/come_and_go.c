/*
 * Threads, streams and contexts that come and go while nobody drains: `come_and_go THREADS STREAMS CONTEXTS`. Says how many
 * pages more the process has in memory after all of each than after the first fifth.
 *
 * Each thread submits work to the legacy stream and to its own default stream, and allocates and frees in the order of the
 * latter. Each stream is destroyed with work in it. Each context goes with an array, a stream and memory in it.
 */
#include "driver.h"
#include <malloc.h>

typedef struct { size_t width, height; int format; unsigned channels; } CUDA_ARRAY_DESCRIPTOR;
typedef struct CUarray_st *CUarray;
CUresult cuArrayCreate_v2(CUarray *array, const CUDA_ARRAY_DESCRIPTOR *descriptor);

static CUcontext context;
static CUdeviceptr memory;

static long resident_pages(void) {
    long size, resident = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    if (!statm || fscanf(statm, "%ld %ld", &size, &resident) != 2) exit(2);
    fclose(statm);
    return resident;
}

static void *comes_and_goes(void *unused) {
    CUdeviceptr own;
    (void)unused;
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuMemsetD32Async(memory, 1, 16, CU_STREAM_LEGACY));
    CHECK(cuMemAllocAsync(&own, 256, CU_STREAM_PER_THREAD));
    CHECK(cuMemsetD32Async(own, 2, 16, CU_STREAM_PER_THREAD));
    CHECK(cuMemFreeAsync(own, CU_STREAM_PER_THREAD));
    CHECK(cuStreamSynchronize(CU_STREAM_PER_THREAD));
    return NULL;
}

static void threads(long count) {
    for (long i = 0; i < count; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, comes_and_goes, NULL)) exit(2);
        pthread_join(thread, NULL);
    }
}

static void streams(long count) {
    for (long i = 0; i < count; i++) {
        CUstream stream;
        CHECK(cuStreamCreate(&stream, i % 2 ? CU_STREAM_NON_BLOCKING : 0));
        CHECK(cuMemsetD32Async(memory, i, 16, stream));
        CHECK(cuStreamDestroy_v2(stream));
        /* Else there are as many as the machine is behind. */
        if (i % 64 == 63) CHECK(cuCtxSynchronize());
    }
}

static void contexts(long count) {
    for (long i = 0; i < count; i++) {
        CUDA_ARRAY_DESCRIPTOR descriptor = {.width = 1024, .height = 1024, .format = 0x20, .channels = 1};
        CUdeviceptr own;
        CUstream stream;
        CUarray array;
        CHECK(cuCtxCreate_v2(&context, 0, 0));
        CHECK(cuMemAlloc_v2(&own, 4 << 20));
        CHECK(cuArrayCreate_v2(&array, &descriptor));
        CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
        CHECK(cuMemsetD32Async(own, 1, 1 << 20, stream));
        CHECK(cuCtxDestroy_v2(context));
    }
}

static void say_growth(const char *of, void (*make)(long), long count) {
    long first = count / 5;
    make(first);
    long before = resident_pages();
    make(count - first);
    SAY("%s: %ld pages", of, resident_pages() - before);
}

int main(int argc, char **argv) {
    /* How many arenas there are, and how full, depends on which threads meet. */
    mallopt(M_ARENA_MAX, 1);
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    CHECK(cuMemAlloc_v2(&memory, 64));
    say_growth("threads", threads, argc > 1 ? atol(argv[1]) : 20000);
    say_growth("streams", streams, argc > 2 ? atol(argv[2]) : 20000);
    CHECK(cuCtxDestroy_v2(context));
    say_growth("contexts", contexts, argc > 3 ? atol(argv[3]) : 1000);
    return 0;
}
