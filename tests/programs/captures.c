/*
 * Captures that are open, and captures that are over without having been ended: `captures CASE [MIB]`.
 *
 * In the cases of two threads, one capture is open while another of the same handle ends, and while memory is freed. In
 * the others a capture is over because its stream, its context or its thread is gone, or because it was ruined, or it is
 * still open because the driver refused to end it; "unsafe" makes calls that a capture forbids, or does not, and
 * "unsafe-without-room" makes one for which the GPU has no room beside other processes. Then the program says "ready", and
 * goes on with its memory until its standard input ends: nothing is captured any more, so others get their turn.
 *
 * In the cases that begin with "open" it says "ready" while a capture is open, of a stream that the legacy stream does not
 * wait for, and ends the capture when its standard input ends.
 */
#include "driver.h"
#include "more_driver.h"

enum { GLOBAL, THREAD_LOCAL, RELAXED };

static CUcontext context;
static CUdeviceptr memory;
static size_t bytes = 8 << 20;
static pthread_barrier_t barrier;

typedef struct {
    CUstream stream;
    CUresult (*begin)(CUstream, int);
    CUresult (*end)(CUstream, CUgraph *);
    CUresult (*set)(CUdeviceptr, unsigned, size_t, CUstream);
} Flavour;

static const Flavour explicit = {CU_STREAM_PER_THREAD, cuStreamBeginCapture_v2, cuStreamEndCapture, cuMemsetD32Async};
static const Flavour implicit = {NULL, cuStreamBeginCapture_v2_ptsz, cuStreamEndCapture_ptsz, cuMemsetD32Async_ptsz};

/* An allocation and a free, as any library may make at any time. A free waits for what is submitted. */
static void allocate_and_free(void) {
    CUdeviceptr other;
    CHECK(cuMemAlloc_v2(&other, 4 << 20));
    CHECK(cuMemFree_v2(other));
}

/* Launches what a capture has recorded, and looks at what it wrote. */
static void replay(CUgraph graph, unsigned value) {
    CUgraphExec executable;
    CUstream stream;
    CHECK(cuStreamCreate(&stream, 0));
    CHECK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    CHECK(cuGraphLaunch(executable, stream));
    CHECK(cuStreamSynchronize(stream));
    check_words(memory, bytes, value);
    CHECK(cuStreamDestroy_v2(stream));
}

static void *captures_longer(void *argument) {
    const Flavour *flavour = argument;
    static CUgraph graph;
    CHECK(cuCtxSetCurrent(context));
    CHECK(flavour->begin(flavour->stream, THREAD_LOCAL));
    pthread_barrier_wait(&barrier); /* both are open */
    pthread_barrier_wait(&barrier); /* the other has ended */
    CHECK(flavour->set(memory, 7, bytes / 4, flavour->stream));
    CHECK(flavour->end(flavour->stream, &graph));
    return graph;
}

static void two_threads(const Flavour *flavour) {
    pthread_t thread;
    CUgraph first;
    void *second;
    pthread_barrier_init(&barrier, NULL, 2);
    pthread_create(&thread, NULL, captures_longer, (void *)flavour);
    CHECK(flavour->begin(flavour->stream, THREAD_LOCAL));
    pthread_barrier_wait(&barrier);
    CHECK(flavour->set(memory, 5, bytes / 4, flavour->stream));
    CHECK(flavour->end(flavour->stream, &first));
    allocate_and_free();
    pthread_barrier_wait(&barrier);
    pthread_join(thread, &second);
    replay(second, 7);
    replay(first, 5);
}

static void *begins_and_ends_itself(void *flavour) {
    CHECK(cuCtxSetCurrent(context));
    CHECK(((const Flavour *)flavour)->begin(((const Flavour *)flavour)->stream, THREAD_LOCAL));
    return NULL;
}

static void *ends_another_ones(void *stream) {
    CUgraph graph = NULL;
    CHECK(cuCtxSetCurrent(context));
    return (void *)(intptr_t)cuStreamEndCapture(stream, &graph);
}

static void in_a_thread(void *(*function)(void *), void *argument, intptr_t expected) {
    pthread_t thread;
    void *result;
    pthread_create(&thread, NULL, function, argument);
    pthread_join(thread, &result);
    if ((intptr_t)result != expected) {
        fprintf(stderr, "CUDA error %ld and not %ld\n", (long)(intptr_t)result, (long)expected);
        exit(3);
    }
}

/* A stream that the legacy default stream waits for: nobody may use that one while this one captures. */
static CUstream capturing(int mode) {
    CUstream stream;
    CHECK(cuStreamCreate(&stream, 0));
    CHECK(cuStreamBeginCapture_v2(stream, mode));
    return stream;
}

static void expect(CUresult result, CUresult expected, const char *call) {
    if (result != expected) {
        fprintf(stderr, "%s: CUDA error %d and not %d\n", call, result, expected);
        exit(3);
    }
}

/* A thread that did not begin the capture may not end it: it goes on. */
static void refused(void) {
    CUstream stream = capturing(THREAD_LOCAL);
    CUgraph graph;
    int mode = RELAXED;
    in_a_thread(ends_another_ones, stream, 908);
    CHECK(cuThreadExchangeStreamCaptureMode(&mode));
    allocate_and_free();
    CHECK(cuThreadExchangeStreamCaptureMode(&mode));
    CHECK(cuMemsetD32Async(memory, 9, bytes / 4, stream));
    CHECK(cuStreamEndCapture(stream, &graph));
    replay(graph, 9);
    expect(cuStreamEndCapture(stream, &graph), 401, "the end of what is no capture");
}

static void ruined(void) {
    CUstream stream = capturing(GLOBAL);
    CUgraph graph;
    expect(cuCtxSynchronize(), 900, "cuCtxSynchronize");
    expect(cuStreamEndCapture(stream, &graph), 901, "the end of a ruined capture");
}

/* The driver does not destroy a stream that captures; a capture is ruined by the attempt. */
/* The end of a stream that captures would be an event of the graph, which never comes. */
static void destroyed(unsigned flags) {
    CUstream stream;
    CUgraph graph;
    CHECK(cuStreamCreate(&stream, flags));
    CHECK(cuStreamBeginCapture_v2(stream, RELAXED));
    expect(cuStreamDestroy_v2(stream), 900, "cuStreamDestroy");
    expect(cuStreamEndCapture(stream, &graph), 901, "the end of a ruined capture");
    CHECK(cuStreamDestroy_v2(stream));
}

static void to_a_graph(void) {
    CUstream stream;
    CUgraph graph, same;
    CHECK(cuGraphCreate(&graph, 0));
    CHECK(cuStreamCreate(&stream, 0));
    CHECK(cuStreamBeginCaptureToGraph(stream, graph, NULL, NULL, 0, RELAXED));
    allocate_and_free();
    CHECK(cuMemsetD32Async(memory, 11, bytes / 4, stream));
    CHECK(cuStreamEndCapture(stream, &same));
    replay(graph, 11);
}

static volatile int captured;

static void waits_for_a_capture(void *unused) {
    (void)unused;
    while (!captured) usleep(1000);
}

static void *frees(void *address) {
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuMemFree_v2((CUdeviceptr)(uintptr_t)address));
    return NULL;
}

/* A free waits for work, and the work for a thread that captures meanwhile. */
static void during_a_free(void) {
    CUstream works;
    CUdeviceptr other;
    CUgraph graph;
    pthread_t thread;
    CHECK(cuMemAlloc_v2(&other, 4 << 20));
    CHECK(cuStreamCreate(&works, CU_STREAM_NON_BLOCKING));
    CHECK(cuLaunchHostFunc(works, waits_for_a_capture, NULL));
    CHECK(cuMemsetD32Async(other, 3, 1 << 20, works));
    pthread_create(&thread, NULL, frees, (void *)(uintptr_t)other);
    /* Until the free has begun and waits, a capture that begins would have it give up: so several. */
    for (int i = 0; i < 200; i++) {
        CUstream stream = capturing(RELAXED);
        CHECK(cuMemsetD32Async(memory, 13, bytes / 4, stream));
        CHECK(cuStreamEndCapture(stream, &graph));
        CHECK(cuStreamDestroy_v2(stream));
        usleep(500);
    }
    captured = 1;
    pthread_join(thread, NULL);
    CHECK(cuStreamSynchronize(works));
    replay(graph, 13);
}

/* A second context, with a capture that is open when the context goes. */
static void with_its_context(void) {
    CUcontext gone;
    CHECK(cuCtxCreate_v2(&gone, 0, 0));
    capturing(RELAXED);
    CHECK(cuCtxDestroy_v2(gone));
    CHECK(cuCtxSetCurrent(context));
}

static void with_a_reset(void) {
    CUcontext gone;
    CHECK(cuDevicePrimaryCtxRetain(&gone, 0));
    CHECK(cuCtxPushCurrent_v2(gone));
    capturing(RELAXED);
    CHECK(cuDevicePrimaryCtxReset_v2(0));
    CHECK(cuCtxPopCurrent_v2(&gone));
    CHECK(cuDevicePrimaryCtxRelease_v2(0));
}

/* What a thread that does not make the calls itself has another one do. */
typedef struct {
    int own; /* the calling thread's mode */
    int refused;
    CUstream other; /* captures nothing */
    CUdeviceptr ordered; /* was allocated in it */
} Unsafe;

static void *makes_unsafe_calls(void *argument) {
    const Unsafe *unsafe = argument;
    CUresult expected = unsafe->refused ? 900 : 0;
    CUdeviceptr block = 1, pitched = 1;
    size_t pitch;
    int mode = unsafe->own;
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuThreadExchangeStreamCaptureMode(&mode));
    expect(cuMemAlloc_v2(&block, 0), 1, "cuMemAlloc of nothing");
    expect(cuMemAlloc_v2(&block, 4 << 20), expected, "cuMemAlloc");
    expect(cuMemAllocPitch_v2(&pitched, &pitch, 100, 10, 4), expected, "cuMemAllocPitch");
    expect(!block, unsafe->refused, "an address of memory that was refused");
    expect(!pitched, unsafe->refused, "an address of memory that was refused");
    expect(cuMemFree_v2(unsafe->refused ? memory : block), expected, "cuMemFree");
    if (!unsafe->refused) CHECK(cuMemFree_v2(pitched));
    expect(cuMemFree_v2(0), 0, "cuMemFree of nothing");
    CUdeviceptr ordered = 1;
    CUmemoryPool pool;
    CHECK(cuDeviceGetDefaultMemPool(&pool, 0));
    expect(cuMemAllocAsync(&ordered, 1 << 20, unsafe->other), expected, "cuMemAllocAsync");
    expect(!ordered, unsafe->refused, "an address of stream-ordered memory that was refused");
    expect(cuMemPoolTrimTo(pool, 0), expected, "cuMemPoolTrimTo");
    expect(cuMemFree_v2(unsafe->refused ? unsafe->ordered : ordered), expected, "cuMemFree of stream-ordered memory");
    expect(cuMemFreeAsync(unsafe->ordered, unsafe->other), expected, "cuMemFreeAsync");
    CHECK(cuThreadExchangeStreamCaptureMode(&mode));
    return NULL;
}

/*
 * Whoever may not make a call that is unsafe while a stream captures is refused, and the capture is ruined: by the
 * capture's mode, the caller's own, and whether it is the caller that captures.
 */
static void unsafe_calls(void) {
    for (int mode = GLOBAL; mode <= RELAXED; mode++)
        for (int own = GLOBAL; own <= RELAXED; own++)
            for (int here = 0; here <= 1; here++) {
                int local = here && mode != RELAXED;
                Unsafe unsafe = {own, own == RELAXED ? 0 : own == THREAD_LOCAL ? local : local || mode == GLOBAL};
                CHECK(cuStreamCreate(&unsafe.other, CU_STREAM_NON_BLOCKING));
                CHECK(cuMemAllocAsync(&unsafe.ordered, 1 << 20, unsafe.other));
                CHECK(cuStreamSynchronize(unsafe.other));
                CUstream stream = capturing(mode);
                CUgraph graph = NULL;
                CHECK(cuMemsetD32Async(memory, 15, bytes / 4, stream));
                if (here) makes_unsafe_calls(&unsafe);
                else in_a_thread(makes_unsafe_calls, &unsafe, 0);
                expect(cuStreamEndCapture(stream, &graph), unsafe.refused ? 901 : 0, "the end of the capture");
                if (!unsafe.refused) replay(graph, 15);
                else CHECK(cuMemFreeAsync(unsafe.ordered, unsafe.other));
                CHECK(cuStreamDestroy_v2(unsafe.other));
                CHECK(cuStreamDestroy_v2(stream));
            }
}

/* The same of memory that only the driver can place, for which the GPU has no room. */
static void unsafe_calls_without_room(void) {
    CUstream stream = capturing(GLOBAL);
    CUdeviceptr managed = 1;
    CUgraph graph;
    expect(cuMemAllocManaged(&managed, 16 << 20, 1), 900, "cuMemAllocManaged");
    expect(!managed, 1, "an address of managed memory that was refused");
    expect(cuStreamEndCapture(stream, &graph), 901, "the end of the capture");
    CHECK(cuStreamDestroy_v2(stream));
    /* Room can be made for it when nobody captures. */
    CHECK(cuMemAllocManaged(&managed, 16 << 20, 1));
    CHECK(cuMemFree_v2(managed));
}

static CUstream apart(void) {
    CUstream stream;
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    return stream;
}

static void takes_long(void *unused) {
    (void)unused;
    sleep(3);
}

/* Work that uses the memory in a few seconds. */
static void works_later(CUstream stream, unsigned value) {
    CHECK(cuLaunchHostFunc(stream, takes_long, NULL));
    CHECK(cuMemsetD32Async(memory, value, bytes / 4, stream));
}

static void *allocates(void *unused) {
    int mode = RELAXED;
    CHECK(cuThreadExchangeStreamCaptureMode(&mode));
    CHECK(cuCtxSetCurrent(context));
    allocate_and_free();
    return unused;
}

/*
 * A capture that is open for as long as somebody wants. Work that streams had before they captured is still under way, or
 * other streams work beside it.
 */
static void stays_open(const char *what) {
    CUstream captures = apart(), other = apart();
    CUevent forked, joined;
    CUgraph graph;
    CHECK(cuEventCreate(&forked, 0));
    CHECK(cuEventCreate(&joined, 0));
    if (!strcmp(what, "open-after-work")) works_later(captures, 31);
    if (!strcmp(what, "open-joined-after-work")) works_later(other, 31);
    if (!strcmp(what, "open-beside-legacy-work")) works_later(CU_STREAM_LEGACY, 31);
    CHECK(cuStreamBeginCapture_v2(captures, GLOBAL));
    if (!strcmp(what, "open-joined-after-work")) {
        CHECK(cuEventRecord(forked, captures));
        CHECK(cuStreamWaitEvent(other, forked, 0));
        CHECK(cuMemsetD32Async(memory, 29, bytes / 4, other));
        CHECK(cuEventRecord(joined, other));
        CHECK(cuStreamWaitEvent(captures, joined, 0));
    }
    if (!strcmp(what, "open-beside-work")) works_later(other, 31);
    CHECK(cuMemsetD32Async(memory, 33, bytes / 8, captures));
    SAY("ready");
    for (char c; read(0, &c, 1) > 0;) {}
    in_a_thread(allocates, NULL, 0);
    CHECK(cuMemsetD32Async(memory + bytes / 2, 33, bytes / 8, captures));
    CHECK(cuStreamEndCapture(captures, &graph));
    CHECK(cuCtxSynchronize());
    check_words(memory, bytes, strcmp(what, "open") ? 31 : 1);
    replay(graph, 33);
}

static pthread_barrier_t freed, begun;

/* Frees in order before a capture begins, and ends after. */
static void *frees_in_order(void *unused) {
    CUdeviceptr block;
    CUstream stream = CU_STREAM_PER_THREAD;
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuMemAllocAsync(&block, 4 << 20, stream));
    CHECK(cuMemsetD32Async(block, 3, 1 << 20, stream));
    CHECK(cuMemFreeAsync(block, stream));
    pthread_barrier_wait(&freed);
    pthread_barrier_wait(&begun);
    return unused;
}

/* What a thread leaves behind is no matter for a capture that another one has open. */
static void beside_the_end_of_a_thread(void) {
    CUstream stream = apart();
    CUgraph graph;
    pthread_t thread;
    pthread_barrier_init(&freed, NULL, 2);
    pthread_barrier_init(&begun, NULL, 2);
    pthread_create(&thread, NULL, frees_in_order, NULL);
    pthread_barrier_wait(&freed);
    CHECK(cuStreamBeginCapture_v2(stream, GLOBAL));
    pthread_barrier_wait(&begun);
    pthread_join(thread, NULL);
    CHECK(cuMemsetD32Async(memory, 15, bytes / 4, stream));
    CHECK(cuStreamEndCapture(stream, &graph));
    replay(graph, 15);
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    if (argc > 2) bytes = strtoul(argv[2], NULL, 10) << 20;
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    CHECK(cuMemAlloc_v2(&memory, bytes));
    write_words(memory, bytes, 1);
    if (!strncmp(name, "open", 4)) return stays_open(name), 0;
    if (!strcmp(name, "two-threads")) two_threads(&explicit);
    else if (!strcmp(name, "two-threads-by-null")) two_threads(&implicit);
    else if (!strcmp(name, "thread-ends")) in_a_thread(begins_and_ends_itself, (void *)&explicit, 0);
    else if (!strcmp(name, "refused")) refused();
    else if (!strcmp(name, "ruined")) ruined();
    else if (!strcmp(name, "destroyed")) destroyed(0);
    else if (!strcmp(name, "destroyed-apart")) destroyed(CU_STREAM_NON_BLOCKING);
    else if (!strcmp(name, "to-a-graph")) to_a_graph();
    else if (!strcmp(name, "during-a-free")) during_a_free();
    else if (!strcmp(name, "another-thread-ends")) beside_the_end_of_a_thread();
    else if (!strcmp(name, "context-destroyed")) with_its_context();
    else if (!strcmp(name, "context-reset")) with_a_reset();
    else if (!strcmp(name, "unsafe")) unsafe_calls();
    else if (!strcmp(name, "unsafe-without-room")) unsafe_calls_without_room();
    else return 2;
    write_words(memory, bytes, 21);
    SAY("ready");
    for (char c; read(0, &c, 1) > 0;) {}
    check_words(memory, bytes, 21);
    return 0;
}
