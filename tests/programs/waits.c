/*
 * A process that waits for the GPU in one thread, and destroys its only context in another: `waits [MIB]`.
 *
 * Says "waiting" before its thread submits; after its input has ended it destroys the context, says "destroyed", and ends.
 */
#include "driver.h"

static CUcontext context;
static CUdeviceptr memory;
static size_t bytes;

static void *submits(void *unused) {
    if (!cuCtxSetCurrent(context)) {
        SAY("waiting");
        /* The context may be gone when its turn comes. */
        cuMemsetD32_v2(memory, 7, bytes / 4);
    }
    return unused;
}

int main(int argc, char **argv) {
    pthread_t thread;
    char line;
    bytes = (argc > 1 ? strtoul(argv[1], NULL, 10) : 48) << 20;
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    CHECK(cuMemAlloc_v2(&memory, bytes));
    pthread_create(&thread, NULL, submits, NULL);
    while (read(0, &line, 1) > 0) continue;
    CHECK(cuCtxDestroy_v2(context));
    SAY("destroyed");
    pthread_join(thread, NULL);
    return 0;
}
