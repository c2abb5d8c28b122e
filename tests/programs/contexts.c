/*
 * Contexts that end, that do not, and green ones: `contexts CASE [MIB]`. Afterwards the program says "ready" and goes on
 * with its memory until its standard input ends.
 */
#include "driver.h"
#include "more_driver.h"
#include <poll.h>

enum { INVALID_VALUE = 1, INVALID_CONTEXT = 201, CONTEXT_IS_DESTROYED = 709, INJECTED = 999 };

static CUdeviceptr memory;
static size_t bytes = 8 << 20;
static unsigned value;
/* Where the work goes at the end. */
static CUstream worker;

static void expect(CUresult result, CUresult expected, const char *call) {
    if (result != expected) {
        fprintf(stderr, "%s: CUDA error %d and not %d\n", call, result, expected);
        exit(3);
    }
}
#define EXPECT(expected, call) expect(call, expected, #call)

static void allocate(void) {
    CHECK(cuMemAlloc_v2(&memory, bytes));
    write_words(memory, bytes, ++value);
}

static CUcontext retain(void) {
    CUcontext context;
    CHECK(cuDevicePrimaryCtxRetain(&context, 0));
    CHECK(cuCtxSetCurrent(context));
    return context;
}

static CUcontext create(void) {
    CUcontext context;
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    return context;
}

static void is_active(int expected) {
    unsigned flags;
    int active;
    CHECK(cuDevicePrimaryCtxGetState(0, &flags, &active));
    if (active != expected) {
        fprintf(stderr, "the primary context is %sactive\n", active ? "" : "not ");
        exit(4);
    }
}

/* --- What the driver refuses ---------------------------------------------------------------------- */

static void primary_destroyed(void) {
    CUcontext context = retain();
    allocate();
    EXPECT(INVALID_CONTEXT, cuCtxDestroy_v2(context));
    EXPECT(INVALID_CONTEXT, cuCtxDetach(context));
    check_words(memory, bytes, value);
}

static void destroyed_twice(void) {
    CUcontext stays = create(), goes = create();
    CHECK(cuCtxDestroy_v2(goes));
    CHECK(cuCtxSetCurrent(stays));
    allocate();
    EXPECT(INVALID_CONTEXT, cuCtxDestroy_v2(goes));
    EXPECT(INVALID_CONTEXT, cuCtxDetach(goes));
    check_words(memory, bytes, value);
}

static void released_too_often(void) {
    retain();
    CHECK(cuDevicePrimaryCtxRelease_v2(0));
    EXPECT(INVALID_CONTEXT, cuDevicePrimaryCtxRelease_v2(0));
    CUcontext context = create();
    allocate();
    EXPECT(INVALID_CONTEXT, cuDevicePrimaryCtxRelease_v2(0));
    CHECK(cuCtxSetCurrent(context));
}

/* The simulated GPU's driver is told to fail once, which a real one may do for reasons of its own. */
static void failed(int other) {
    CUcontext second = other ? create() : NULL, context = create();
    allocate();
    CHECK(cuStreamCreate(&worker, CU_STREAM_NON_BLOCKING));
    EXPECT(INJECTED, cuCtxDestroy_v2(context));
    check_words(memory, bytes, value);
    CHECK(cuMemsetD32Async(memory, ++value, bytes / 4, worker));
    CHECK(cuStreamSynchronize(worker));
    check_words(memory, bytes, value);
    (void)second;
}

static void release_failed(void) {
    retain();
    allocate();
    EXPECT(INJECTED, cuDevicePrimaryCtxRelease_v2(0));
    check_words(memory, bytes, value);
}

static void reset_failed(void) {
    retain();
    allocate();
    EXPECT(INJECTED, cuDevicePrimaryCtxReset_v2(0));
    check_words(memory, bytes, value);
}

static void stream_failed(void) {
    create();
    allocate();
    CHECK(cuStreamCreate(&worker, CU_STREAM_NON_BLOCKING));
    EXPECT(INJECTED, cuStreamDestroy_v2(worker));
}

/* --- What ends later than the call ----------------------------------------------------------------- */

static void attached(void) {
    CUcontext context = create(), same;
    allocate();
    CHECK(cuCtxAttach(&same, 0));
    CHECK(cuCtxDetach(context));
    check_words(memory, bytes, value);
    CHECK(cuCtxDetach(context));
    EXPECT(INVALID_CONTEXT, cuCtxDetach(context));
    create();
    allocate();
}

/* Somebody else has retained the context, releases it after a reset, and the use of the others goes on. */
static void reset_with_holders(void) {
    size_t before, after, total;
    for (int round = 0; round < 3; round++) {
        CUcontext context = retain();
        retain();
        CHECK(cuMemGetInfo_v2(&before, &total));
        allocate();
        CHECK(cuMemsetD32Async(memory, 1, bytes / 4, 0));
        CHECK(cuDevicePrimaryCtxReset_v2(0));
        is_active(0);
        EXPECT(CONTEXT_IS_DESTROYED, cuMemAlloc_v2(&memory, bytes));
        if (retain() != context) SAY("the primary context has another handle");
        CHECK(cuMemGetInfo_v2(&after, &total));
        /* (The context itself is counted a moment later.) */
        if (after + bytes <= before) {
            fprintf(stderr, "%zu B were free before the reset, and %zu B after\n", before, after);
            exit(4);
        }
        allocate();
        CHECK(cuDevicePrimaryCtxRelease_v2(0));
        CHECK(cuDevicePrimaryCtxRelease_v2(0));
        is_active(1);
        check_words(memory, bytes, value);
        CHECK(cuDevicePrimaryCtxRelease_v2(0));
        is_active(0);
        EXPECT(INVALID_CONTEXT, cuDevicePrimaryCtxRelease_v2(0));
    }
    retain();
    CHECK(cuDevicePrimaryCtxReset_v2(0));
    CHECK(cuDevicePrimaryCtxReset_v2(0));
    CHECK(cuDevicePrimaryCtxRelease_v2(0));
    retain();
    allocate();
}

/* As the CUDA runtime does it in cudaDeviceReset: its hold goes with the reset, and a library's later one is the only one. */
static void reset_by_the_runtime(void) {
    for (int round = 0; round < 3; round++) {
        retain();
        allocate();
        CHECK(cuDevicePrimaryCtxReset(0));
        is_active(0);
        retain();
        allocate();
        check_words(memory, bytes, value);
        CHECK(cuDevicePrimaryCtxRelease_v2(0));
        is_active(0);
    }
    retain();
    allocate();
}

/* The application's references to physical memory outlive the last context. */
static void objects_outlive_contexts(void) {
    CUcontext made = create();
    CUmemAllocationProp prop = {.type = 1, .location = {1, 0}};
    CUmemGenericAllocationHandle handle;
    CHECK(cuMemCreate(&handle, 4 << 20, &prop, 0));
    CHECK(cuCtxDestroy_v2(made));
    CHECK(cuMemRelease(handle));
    EXPECT(INVALID_VALUE, cuMemRelease(handle));
    create();
    allocate();
}

static void *comes_and_goes(void *unused) {
    (void)unused;
    for (int round = 0; round < 100; round++) {
        CUdeviceptr own;
        retain();
        CHECK(cuMemAlloc_v2(&own, 2 << 20));
        CHECK(cuMemsetD32_v2(own, round, 1 << 19));
        check_words(own, 2 << 20, round);
        CHECK(cuMemFree_v2(own));
        CHECK(cuCtxSetCurrent(NULL));
        CHECK(cuDevicePrimaryCtxRelease_v2(0));
    }
    return NULL;
}

static void retained_at_once(void) {
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, comes_and_goes, NULL);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    is_active(0);
    retain();
    allocate();
}

static volatile int enough;

static void *works(void *context) {
    CUdeviceptr own;
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuMemAlloc_v2(&own, 4 << 20));
    for (unsigned round = 0; !enough; round++) {
        CHECK(cuMemsetD32_v2(own, round, 1 << 20));
        check_words(own, 4 << 20, round);
    }
    CHECK(cuMemFree_v2(own));
    return NULL;
}

static void others_destroyed(void) {
    CUcontext stays = create();
    pthread_t thread;
    allocate();
    pthread_create(&thread, NULL, works, stays);
    for (int round = 0; round < 30; round++) {
        CUdeviceptr gone;
        CUcontext goes = create();
        CHECK(cuMemAlloc_v2(&gone, 2 << 20));
        CHECK(cuMemsetD32Async(gone, round, 1 << 19, 0));
        CHECK(cuCtxDestroy_v2(goes));
    }
    enough = 1;
    pthread_join(thread, NULL);
    CHECK(cuCtxSetCurrent(stays));
    check_words(memory, bytes, value);
}

/* --- Green contexts ------------------------------------------------------------------------------- */

static CUgreenCtx green(void) {
    CUdevResource whole, group;
    CUdevResourceDesc description;
    CUgreenCtx made;
    unsigned count = 1;
    CHECK(cuDeviceGetDevResource(0, &whole, 1));
    CHECK(cuDevSmResourceSplitByCount(&group, &count, &whole, NULL, 0, 8));
    CHECK(cuDevResourceGenerateDesc(&description, &group, 1));
    CHECK(cuGreenCtxCreate(&made, description, 0, 1));
    return made;
}

static CUcontext use(CUgreenCtx made) {
    CUcontext context;
    CHECK(cuCtxFromGreenCtx(&context, made));
    CHECK(cuCtxSetCurrent(context));
    return context;
}

static void green_stream(void) {
    retain();
    allocate();
    CHECK(cuGreenCtxStreamCreate(&worker, green(), CU_STREAM_NON_BLOCKING, 0));
}

/* A stream that waits for the default stream of the green context, and not for that of the primary one. */
static void green_blocking_stream(void) {
    CUcontext primary = retain();
    allocate();
    use(green());
    CHECK(cuStreamCreate(&worker, 0));
    CHECK(cuCtxSetCurrent(primary));
}

/* Memory that is allocated meanwhile is the primary context's, and counted. */
static void green_current(CUstream stream) {
    size_t before, after, total;
    CUcontext primary = retain();
    CHECK(cuMemGetInfo_v2(&before, &total));
    CUgreenCtx made = green();
    use(made);
    allocate();
    CHECK(cuCtxSetCurrent(primary));
    CHECK(cuMemGetInfo_v2(&after, &total));
    if (before < after + bytes) {
        fprintf(stderr, "%zu B in a green context took %zu B\n", bytes, before - after);
        exit(4);
    }
    check_words(memory, bytes, value);
    use(made);
    worker = stream;
}

/* It retains the primary context; what it had to do goes on when it is destroyed, and so does the memory. */
static void green_destroyed(void) {
    CUcontext primary;
    CUgreenCtx other = green(), made = green();
    CUstream stream;
    is_active(1);
    EXPECT(INVALID_CONTEXT, cuCtxDestroy_v2(use(made)));
    allocate();
    CHECK(cuGreenCtxStreamCreate(&stream, made, CU_STREAM_NON_BLOCKING, 0));
    EXPECT(INVALID_VALUE, cuGreenCtxStreamCreate(&stream, made, 0, 0));
    CHECK(cuMemsetD32Async(memory, ++value, bytes / 4, stream));
    CHECK(cuGreenCtxDestroy(made));
    EXPECT(INVALID_CONTEXT, cuGreenCtxDestroy(made));
    CHECK(cuStreamDestroy_v2(stream));
    use(other);
    CHECK(cuCtxSynchronize());
    primary = retain();
    CHECK(cuCtxSynchronize());
    check_words(memory, bytes, value);
    CHECK(cuGreenCtxDestroy(other));
    check_words(memory, bytes, value);
    CHECK(cuDevicePrimaryCtxRelease_v2(0));
    is_active(0);
    CHECK(cuGreenCtxStreamCreate(&worker, green(), CU_STREAM_NON_BLOCKING, 0));
    CHECK(cuStreamGetCtx_v2(worker, &primary, &made));
    CHECK(cuCtxSetCurrent(primary));
    allocate();
}

/* --- The end of each case ------------------------------------------------------------------------- */

static int has_input(void) {
    struct pollfd input = {.fd = 0, .events = POLLIN};
    return poll(&input, 1, 0) > 0;
}

/* Always something in flight, so that memory that moves too early is seen. */
static void go_on(void) {
    do {
        for (int i = 0; i < 4; i++) CHECK(cuMemsetD32Async(memory, ++value, bytes / 4, worker));
        CHECK(cuStreamSynchronize(worker));
        check_words(memory, bytes, value);
        for (int i = 0; i < 4; i++) CHECK(cuMemsetD32Async(memory, ++value, bytes / 4, worker));
    } while (!has_input());
    CHECK(cuStreamSynchronize(worker));
    check_words(memory, bytes, value);
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    if (argc > 2) bytes = strtoul(argv[2], NULL, 10) << 20;
    CHECK(cuInit(0));
    if (!strcmp(name, "primary-destroyed")) primary_destroyed();
    else if (!strcmp(name, "destroyed-twice")) destroyed_twice();
    else if (!strcmp(name, "released-too-often")) released_too_often();
    else if (!strcmp(name, "destroy-failed")) failed(0);
    else if (!strcmp(name, "destroy-failed-beside")) failed(1);
    else if (!strcmp(name, "release-failed")) release_failed();
    else if (!strcmp(name, "reset-failed")) reset_failed();
    else if (!strcmp(name, "stream-failed")) stream_failed();
    else if (!strcmp(name, "attached")) attached();
    else if (!strcmp(name, "reset-with-holders")) reset_with_holders();
    else if (!strcmp(name, "reset-by-the-runtime")) reset_by_the_runtime();
    else if (!strcmp(name, "objects-outlive-contexts")) objects_outlive_contexts();
    else if (!strcmp(name, "retained-at-once")) retained_at_once();
    else if (!strcmp(name, "others-destroyed")) others_destroyed();
    else if (!strcmp(name, "green-stream")) green_stream();
    else if (!strcmp(name, "green-blocking-stream")) green_blocking_stream();
    else if (!strcmp(name, "green-current")) green_current(NULL);
    else if (!strcmp(name, "green-per-thread")) green_current(CU_STREAM_PER_THREAD);
    else if (!strcmp(name, "green-destroyed")) green_destroyed();
    else return 2;
    SAY("ready");
    go_on();
    return 0;
}
