/*
 * One process of the stress run: `random_client SEED DEPTH`, with the rest in the environment (see `settings`). It does
 * at random what programs do: threads that come and go with memory of every kind, streams, captures, contexts, host
 * functions, fork, exec, signals, every way to end. Each thread knows what its memory must hold and checks it.
 *
 * Each process has a row in a file that the supervisor maps, too: what each of its threads does, since when, and what
 * they did before. So who is stuck can be told from who is slow, and what led there is known.
 */
#include "more_driver.h"
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>

/* ---- the row; `progress.rs` of the supervisor has the same layout ---- */

#define ROWS 512
#define LANES 16
#define EVENTS 100

enum { FREE, LIVING, ENDING, KILLS_ITSELF };

typedef struct {
    _Atomic uint32_t thread, serial;
    char what[56];
} Lane;

typedef struct {
    uint64_t when;
    uint32_t thread;
    char what[52];
} Event;

typedef struct {
    _Atomic uint32_t state, pid;
    uint64_t seed;
    _Atomic uint64_t actions, refused, next_event, begun;
    uint64_t unused[2];
    Lane lanes[LANES];
    Event events[EVENTS];
    char unused_too[704];
} Row;

_Static_assert(sizeof(Row) == 8192, "the supervisor has the same layout");

static Row *row;

/* ---- what the supervisor asks for ---- */

enum {
    THREADS, STREAMS, CAPTURES, OPEN_CAPTURES, PER_THREAD, CONTEXTS, FORK, EXEC, SIGNALS, HOST_FUNCTIONS, LOCKS, ASYNC_MEMORY,
    POOLS, MAPPED, PITCHED, MANAGED, ARRAYS, DESTRUCTORS, AT_EXIT, ENDS, DAEMONS, SECOND_GPU, RESET, ACTIONS
};
static const char *const NAMES[ACTIONS] = {
    "threads", "streams", "captures", "open-captures", "per-thread", "contexts", "fork", "exec", "signals", "host-functions",
    "locks", "async", "pools", "mapped", "pitched", "managed", "arrays", "destructors", "atexit", "ends", "daemons", "second-gpu", "reset",
};
static int with[ACTIONS];
static int gpus = 1;
static size_t most_bytes = 16 << 20;
static const char *self;
static int depth;

static atomic_size_t held;
static atomic_int ending;
/* What a host function takes, and a thread that launches: Python's lock, for instance. */
static pthread_mutex_t interpreter = PTHREAD_MUTEX_INITIALIZER;
static CUcontext shared_contexts[16];

/* ---- threads ---- */

enum { ALLOCATED, ORDERED, POOLED, VIEWED, PITCH, UNIFIED };

typedef struct {
    int kind;
    CUdeviceptr address;
    size_t bytes;
    uint64_t words;
    CUmemGenericAllocationHandle object;
    CUmemoryPool pool;
    /* What it holds: what an iota of this seed wrote, or this value in each word, and then mixed so. */
    int constant, mixes;
    uint64_t seed, mix[8];
} Buffer;

#define BUFFERS 6
#define OWN_STREAMS 3

typedef struct {
    Dice dice;
    Lane *lane;
    int number, device, private, main;
    CUcontext context;
    CUmodule module;
    CUfunction iota, mixes, spin;
    CUstream stream, streams[OWN_STREAMS];
    CUmemoryPool pool;
    Buffer buffers[BUFFERS];
    int count;
    atomic_int calls;
} Thread;

static void log_event(const char *what) {
    uint64_t at = atomic_fetch_add(&row->next_event, 1) % EVENTS;
    Event *event = &row->events[at];
    event->when = (uint64_t)(now_s() * 1e6);
    event->thread = (uint32_t)syscall(SYS_gettid);
    strncpy(event->what, what, sizeof event->what - 1);
}

/* Says what the thread does from now on. What begins with '~' may take any time. */
__attribute__((format(printf, 2, 3))) static void doing(Thread *thread, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    char what[sizeof thread->lane->what];
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    memcpy(thread->lane->what, what, sizeof what);
    thread->lane->serial++;
    row->actions++;
    log_event(what);
}

/* The process fails. Threads that go on while it ends get what errors they like, and stop. */
static void fail(int status, const char *format, ...) {
    if (ending) for (;;) pause();
    char what[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    log_event(what);
    fprintf(stderr, "FAILED [%d, seed %llu, thread %ld]: %s\n", getpid(), (unsigned long long)row->seed, syscall(SYS_gettid), what);
    _exit(status);
}

#define MUST(call)                                                                                                     \
    do {                                                                                                               \
        CUresult must_result = (call);                                                                                 \
        if (must_result) fail(3, "line %d: %s: CUDA error %d", __LINE__, #call, must_result);                          \
    } while (0)

/* Whether memory was given; refused for want of it is no failure. */
static int given(CUresult result, const char *what) {
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        row->refused++;
        return 0;
    }
    if (result) fail(3, "%s: CUDA error %d", what, result);
    return 1;
}

static void nap(Thread *t, unsigned most_us) { usleep(below(&t->dice, most_us)); }

/* ---- memory ---- */

static int may_hold(size_t bytes) {
    if (atomic_fetch_add(&held, bytes) + bytes <= most_bytes) return 1;
    atomic_fetch_sub(&held, bytes);
    return 0;
}

static size_t some_bytes(Thread *t) {
    switch (below(&t->dice, 6)) {
    case 0: return 8 * (1 + below(&t->dice, 64));
    case 1: return 8 * (1 + below(&t->dice, 60000));
    case 2: return 2 << 20;
    case 3: return (2 << 20) + 8 * below(&t->dice, 1000);
    default: return 8 * (1 + below(&t->dice, most_bytes / 4 / 8));
    }
}

static int view(Thread *t, Buffer *b) {
    size_t bytes = (b->bytes + (2 << 20) - 1) & ~((size_t)(2 << 20) - 1);
    CUmemAllocationProp properties = {1, 0, {1, t->device}, NULL, {0}};
    CUmemAccessDesc rights = {{1, t->device}, 3};
    if (!given(cuMemCreate(&b->object, bytes, &properties, 0), "cuMemCreate")) return 0;
    MUST(cuMemAddressReserve(&b->address, bytes, 0, 0, 0));
    MUST(cuMemMap(b->address, bytes, 0, b->object, 0));
    MUST(cuMemSetAccess(b->address, bytes, &rights, 1));
    return 1;
}

static void unview(Thread *t, Buffer *b) {
    size_t bytes = (b->bytes + (2 << 20) - 1) & ~((size_t)(2 << 20) - 1);
    if (once_in(&t->dice, 2)) {
        MUST(cuMemRelease(b->object));
        MUST(cuMemUnmap(b->address, bytes));
    } else {
        MUST(cuMemUnmap(b->address, bytes));
        MUST(cuMemRelease(b->object));
    }
    MUST(cuMemAddressFree(b->address, bytes));
}

static int take(Thread *t, Buffer *b) {
    switch (b->kind) {
    case ORDERED: return given(cuMemAllocAsync(&b->address, b->bytes, t->stream), "cuMemAllocAsync");
    case POOLED: return given(cuMemAllocFromPoolAsync(&b->address, b->bytes, t->pool, t->stream), "cuMemAllocFromPoolAsync");
    case VIEWED: return view(t, b);
    case UNIFIED: return given(cuMemAllocManaged(&b->address, b->bytes, 1), "cuMemAllocManaged");
    case PITCH: {
        size_t pitch = 0, height = 1 + below(&t->dice, 8);
        if (!given(cuMemAllocPitch_v2(&b->address, &pitch, b->bytes / height + 1, height, 8), "cuMemAllocPitch")) return 0;
        b->words = b->words < pitch * height / 8 ? b->words : pitch * height / 8;
        return 1;
    }
    default: return given(cuMemAlloc_v2(&b->address, b->bytes), "cuMemAlloc");
    }
}

static int some_kind(Thread *t) {
    switch (below(&t->dice, 10)) {
    case 0: case 1: return with[ASYNC_MEMORY] ? ORDERED : ALLOCATED;
    case 2: return with[POOLS] && t->pool ? POOLED : ALLOCATED;
    case 3: case 4: return with[MAPPED] ? VIEWED : ALLOCATED;
    case 5: return with[PITCHED] ? PITCH : ALLOCATED;
    case 6: return with[MANAGED] && once_in(&t->dice, 3) ? UNIFIED : ALLOCATED;
    default: return ALLOCATED;
    }
}

static uint64_t expected(const Buffer *b, uint64_t i) {
    uint64_t word = b->constant ? b->seed : iota_word(i, b->seed);
    for (int k = 0; k < b->mixes; k++) word = mix_word(word, b->mix[k]);
    return word;
}

static void compare(Thread *t, const Buffer *b, const uint64_t *words, uint64_t first, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) {
        uint64_t wanted = expected(b, first + i);
        if (words[i] != wanted)
            fail(4, "WRONG DATA: kind %d at %#llx (%llu words, %d mixes, constant %d), word %llu of [%llu, %llu): %#llx and not %#llx; "
                    "device %d, thread %d",
                 b->kind, (unsigned long long)b->address, (unsigned long long)b->words, b->mixes, b->constant,
                 (unsigned long long)(first + i), (unsigned long long)first, (unsigned long long)(first + count),
                 (unsigned long long)words[i], (unsigned long long)wanted, t->device, t->number);
    }
}

static void check(Thread *t, Buffer *b) {
    uint64_t first = 0, count = b->words;
    if (once_in(&t->dice, 2)) {
        first = below(&t->dice, b->words);
        count = 1 + below(&t->dice, b->words - first);
    }
    doing(t, "check %#llx of kind %d, %llu words", (unsigned long long)b->address, b->kind, (unsigned long long)count);
    uint64_t *words = malloc(count * 8);
    CUdeviceptr from = b->address + first * 8;
    if (once_in(&t->dice, 2)) {
        MUST(cuMemcpyDtoHAsync_v2(words, from, count * 8, t->stream));
        MUST(cuStreamSynchronize(t->stream));
    } else {
        MUST(cuStreamSynchronize(t->stream));
        MUST(cuMemcpyDtoH_v2(words, from, count * 8));
    }
    compare(t, b, words, first, count);
    free(words);
}

/* Has it hold something else. */
static void fill(Thread *t, Buffer *b) {
    b->mixes = 0;
    b->constant = 0;
    b->seed = roll(&t->dice);
    int way = below(&t->dice, 4);
    doing(t, "fill %#llx of kind %d, way %d, %llu words", (unsigned long long)b->address, b->kind, way, (unsigned long long)b->words);
    if (way == 0) {
        uint64_t *words = malloc(b->words * 8);
        for (uint64_t i = 0; i < b->words; i++) words[i] = iota_word(i, b->seed);
        MUST(cuStreamSynchronize(t->stream));
        MUST(cuMemcpyHtoD_v2(b->address, words, b->words * 8));
        free(words);
    } else if (way == 1) {
        uint32_t half = (uint32_t)b->seed;
        b->constant = 1;
        b->seed = (uint64_t)half << 32 | half;
        MUST(cuMemsetD32Async(b->address, half, b->words * 2, t->stream));
    } else {
        MUST(launch(t->iota, t->stream, b->address, b->words, b->seed));
    }
}

static void mix(Thread *t, Buffer *b) {
    if (b->mixes == 8) fill(t, b);
    doing(t, "mix %#llx of kind %d", (unsigned long long)b->address, b->kind);
    b->mix[b->mixes] = roll(&t->dice);
    MUST(launch(t->mixes, t->stream, b->address, b->words, b->mix[b->mixes]));
    b->mixes++;
}

static void allocate(Thread *t) {
    Buffer buffer = {0}, *b = &buffer;
    b->kind = some_kind(t);
    b->bytes = some_bytes(t);
    b->words = b->bytes / 8;
    if (t->count == BUFFERS || !may_hold(b->bytes)) return;
    doing(t, "allocate %zu bytes of kind %d", b->bytes, b->kind);
    if (!take(t, b)) {
        held -= b->bytes;
        return;
    }
    fill(t, b);
    t->buffers[t->count++] = *b;
}

static void drop(Thread *t, int index) {
    Buffer *b = &t->buffers[index];
    if (once_in(&t->dice, 2)) check(t, b);
    doing(t, "free %#llx of kind %d", (unsigned long long)b->address, b->kind);
    switch (b->kind) {
    case ORDERED: case POOLED: MUST(cuMemFreeAsync(b->address, t->stream)); break;
    case VIEWED: MUST(cuStreamSynchronize(t->stream)); unview(t, b); break;
    default: MUST(cuMemFree_v2(b->address));
    }
    held -= b->bytes;
    t->buffers[index] = t->buffers[--t->count];
}

/* A copy inside the GPU: what one holds, the other holds from its beginning, if it is no longer. */
static void copy(Thread *t) {
    Buffer *from = &t->buffers[below(&t->dice, t->count)], *to = &t->buffers[below(&t->dice, t->count)];
    if (from == to || to->words > from->words) return;
    doing(t, "copy %#llx to %#llx", (unsigned long long)from->address, (unsigned long long)to->address);
    MUST(cuMemcpyDtoDAsync_v2(to->address, from->address, to->words * 8, t->stream));
    to->seed = from->seed;
    to->constant = from->constant;
    to->mixes = from->mixes;
    memcpy(to->mix, from->mix, sizeof to->mix);
}

/* An array: made, written, read and destroyed. */
static void array(Thread *t) {
    CUDA_ARRAY_DESCRIPTOR description = {64 + below(&t->dice, 4000), 0, 0x20, 1};
    size_t bytes = description.width * 4;
    if (!with[ARRAYS]) return;
    doing(t, "array of %zu bytes", bytes);
    CUarray array = NULL;
    if (!given(cuArrayCreate_v2(&array, &description), "cuArrayCreate")) return;
    uint32_t *in = malloc(bytes), *out = malloc(bytes);
    for (size_t i = 0; i < bytes / 4; i++) in[i] = (uint32_t)roll(&t->dice);
    MUST(cuMemcpyHtoA_v2(array, 0, in, bytes));
    nap(t, 3000);
    MUST(cuMemcpyAtoH_v2(out, array, 0, bytes));
    if (memcmp(in, out, bytes)) fail(4, "WRONG DATA: array of %zu bytes", bytes);
    free(in);
    free(out);
    MUST(cuArrayDestroy(array));
}

/* ---- streams, graphs, host functions ---- */

static void change_stream(Thread *t) {
    CUstream next = t->streams[below(&t->dice, OWN_STREAMS)];
    if (with[PER_THREAD] && once_in(&t->dice, 4)) next = CU_STREAM_PER_THREAD;
    if (once_in(&t->dice, 8)) next = once_in(&t->dice, 2) ? NULL : CU_STREAM_LEGACY;
    doing(t, "change from stream %p to %p", (void *)t->stream, (void *)next);
    if (once_in(&t->dice, 2)) {
        MUST(cuStreamSynchronize(t->stream));
    } else {
        CUevent event;
        MUST(cuEventCreate(&event, 2));
        MUST(cuEventRecord(event, t->stream));
        MUST(cuStreamWaitEvent(next, event, 0));
        MUST(cuEventDestroy_v2(event));
    }
    t->stream = next;
}

static void renew_stream(Thread *t) {
    int index = below(&t->dice, OWN_STREAMS);
    if (!with[STREAMS] || t->stream == t->streams[index]) return;
    doing(t, "renew stream %p", (void *)t->streams[index]);
    MUST(cuStreamSynchronize(t->streams[index]));
    MUST(cuStreamDestroy_v2(t->streams[index]));
    MUST(cuStreamCreate(&t->streams[index], below(&t->dice, 2)));
}

static void count_call(void *thread) { ((Thread *)thread)->calls++; }

static void take_lock(void *thread) {
    pthread_mutex_lock(&interpreter);
    ((Thread *)thread)->calls++;
    pthread_mutex_unlock(&interpreter);
}

/* Launches while it holds the lock that host functions take, as an interpreter does. */
static void launch_locked(Thread *t) {
    if (!with[LOCKS] || !t->count) return;
    Buffer *b = &t->buffers[below(&t->dice, t->count)];
    doing(t, "wait for the lock");
    pthread_mutex_lock(&interpreter);
    mix(t, b);
    doing(t, "spin with the lock");
    MUST(launch(t->spin, t->stream, 1000 * below(&t->dice, 2000), 0, 0));
    if (once_in(&t->dice, 3)) nap(t, 3000);
    pthread_mutex_unlock(&interpreter);
}

static void host_function(Thread *t) {
    if (!with[HOST_FUNCTIONS]) return;
    int before = t->calls, times = 1 + below(&t->dice, 3);
    doing(t, "%d host functions", times);
    for (int i = 0; i < times; i++) {
        MUST(launch(t->spin, t->stream, 1000 * below(&t->dice, 500), 0, 0));
        MUST(cuLaunchHostFunc(t->stream, with[LOCKS] ? take_lock : count_call, t));
    }
    doing(t, "wait for %d host functions", times);
    MUST(cuStreamSynchronize(t->stream));
    if (t->calls != before + times) fail(4, "%d host functions were called and not %d", t->calls - before, times);
}

static void spin(Thread *t) {
    doing(t, "spin");
    MUST(launch(t->spin, t->stream, 1000 * below(&t->dice, 20000), 0, 0));
    if (once_in(&t->dice, 2)) {
        CUevent event;
        MUST(cuEventCreate(&event, below(&t->dice, 2) | 2));
        MUST(cuEventRecord(event, t->stream));
        MUST(cuEventSynchronize(event));
        MUST(cuEventDestroy_v2(event));
    }
}

/* A capture on a stream that does not wait for others, or on the thread's own where nobody else has the context. */
static void capture(Thread *t) {
    if (!with[CAPTURES] || !t->count) return;
    CUstream stream;
    MUST(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    CUstream on = with[PER_THREAD] && t->private && once_in(&t->dice, 3) ? CU_STREAM_PER_THREAD : stream;
    Buffer *b = &t->buffers[below(&t->dice, t->count)];
    if (b->mixes > 4) fill(t, b);
    MUST(cuStreamSynchronize(t->stream));
    MUST(cuStreamSynchronize(on));
    doing(t, "capture on %p", (void *)on);
    MUST(cuStreamBeginCapture_v2(on, 1 + (int)below(&t->dice, 2)));
    uint64_t seed = roll(&t->dice);
    MUST(launch(t->mixes, on, b->address, b->words, seed));
    if (with[HOST_FUNCTIONS] && once_in(&t->dice, 3)) MUST(cuLaunchHostFunc(on, count_call, t));
    if (once_in(&t->dice, 2)) nap(t, once_in(&t->dice, 10) ? 150000 : 5000);
    CUgraph graph = NULL;
    doing(t, "end of capture on %p", (void *)on);
    MUST(cuStreamEndCapture(on, &graph));
    if (!once_in(&t->dice, 6)) {
        CUgraphExec executable;
        MUST(cuGraphInstantiateWithFlags(&executable, graph, 0));
        int times = 1 + below(&t->dice, 3);
        doing(t, "launch graph %d times", times);
        for (int i = 0; i < times; i++) {
            MUST(cuGraphLaunch(executable, on));
            b->mix[b->mixes++] = seed;
        }
        MUST(cuStreamSynchronize(on));
        MUST(cuGraphExecDestroy(executable));
    }
    MUST(cuGraphDestroy(graph));
    MUST(cuStreamDestroy_v2(stream));
}

/* A capture that nobody ends before its context is destroyed, or ends without a use for it. */
static void leave_capture_open(Thread *t) {
    if (!with[OPEN_CAPTURES]) return;
    CUstream stream;
    MUST(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    doing(t, "capture on %p that may stay open", (void *)stream);
    MUST(cuStreamBeginCapture_v2(stream, 2));
    if (t->count) MUST(launch(t->mixes, stream, t->buffers[0].address, t->buffers[0].words, 1));
    if (t->private && once_in(&t->dice, 2)) return;
    CUgraph graph;
    MUST(cuStreamEndCapture(stream, &graph));
    MUST(cuGraphDestroy(graph));
    MUST(cuStreamDestroy_v2(stream));
}

/* ---- processes ---- */

static void become_another(Thread *t) {
    /* The timer stays, and the handlers go: what is ignored stays so until the new program has its own. */
    struct itimerval never = {{0, 0}, {0, 0}};
    signal(SIGALRM, SIG_IGN);
    signal(SIGUSR1, SIG_IGN);
    setitimer(ITIMER_REAL, &never, NULL);
    char seed[32], deeper[16];
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)roll(&t->dice) >> 1);
    snprintf(deeper, sizeof deeper, "%d", depth + 1);
    char *arguments[] = {(char *)self, seed, deeper, NULL};
    execv(self, arguments);
    _exit(9);
}

/* How a child ended that must end well, unless somebody kills it. */
static void child_ended(Thread *t, pid_t child, const char *what) {
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    if (WIFEXITED(status) && WEXITSTATUS(status)) fail(WEXITSTATUS(status), "the child %d (%s) ended with %d", child, what, WEXITSTATUS(status));
    if (WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL) fail(5, "the child %d (%s) ended by signal %d", child, what, WTERMSIG(status));
    doing(t, "the child %d ended", child);
}

static void fork_child(Thread *t) {
    if (!with[FORK]) return;
    int what = below(&t->dice, 4);
    if (what == 3 && (!with[EXEC] || depth > 2)) what = 0;
    doing(t, "fork, and the child does %d", what);
    pid_t child = fork();
    if (child < 0) fail(5, "fork: %s", strerror(errno));
    if (child == 0) {
        CUdeviceptr address = 0;
        if (what == 1) _exit(cuMemAlloc_v2(&address, 4096) == CUDA_SUCCESS || cuCtxSynchronize() == CUDA_SUCCESS ? 7 : 0);
        if (what == 2) usleep(50000);
        if (what == 3) become_another(t);
        _exit(0);
    }
    doing(t, "%swait for the child %d that does %d", what == 3 ? "~" : "", child, what);
    child_ended(t, child, "forked");
}

static void vfork_child(Thread *t) {
    if (!with[FORK] || !with[EXEC]) return;
    doing(t, "vfork");
    pid_t child = vfork();
    if (child == 0) {
        execl("/bin/true", "true", NULL);
        _exit(9);
    }
    if (child < 0) fail(5, "vfork: %s", strerror(errno));
    doing(t, "wait for the child %d of vfork", child);
    child_ended(t, child, "vforked");
}

static void exec_self(Thread *t) {
    if (!with[EXEC] || depth > 2 || !once_in(&t->dice, 8)) return;
    doing(t, "exec");
    if (atomic_exchange(&ending, 1)) for (;;) pause();
    row->state = ENDING;
    become_another(t);
}

/* ---- a thread's life ---- */

static void act(Thread *t) {
    switch (below(&t->dice, 32)) {
    case 0: case 1: case 2: case 3: allocate(t); break;
    case 4: case 5: if (t->count) drop(t, below(&t->dice, t->count)); break;
    case 6: case 7: case 8: if (t->count) check(t, &t->buffers[below(&t->dice, t->count)]); break;
    case 9: case 10: if (t->count) fill(t, &t->buffers[below(&t->dice, t->count)]); break;
    case 11: case 12: case 13: case 14: if (t->count) mix(t, &t->buffers[below(&t->dice, t->count)]); break;
    case 15: if (t->count) copy(t); break;
    case 16: case 17: change_stream(t); break;
    case 18: renew_stream(t); break;
    case 19: case 20: host_function(t); break;
    case 21: case 22: launch_locked(t); break;
    case 23: spin(t); break;
    case 24: case 25: capture(t); break;
    case 26: if (once_in(&t->dice, 4)) leave_capture_open(t); break;
    case 27: array(t); break;
    case 28: if (once_in(&t->dice, 3)) fork_child(t); break;
    case 29: if (once_in(&t->dice, 3)) vfork_child(t); break;
    case 30: if (once_in(&t->dice, 2)) exec_self(t); break;
    default: doing(t, "nap"); nap(t, once_in(&t->dice, 10) ? 100000 : 10000);
    }
}

static Lane *take_lane(void) {
    for (int i = 0; i < LANES; i++) {
        uint32_t nobody = 0;
        if (atomic_compare_exchange_strong(&row->lanes[i].thread, &nobody, (uint32_t)syscall(SYS_gettid))) return &row->lanes[i];
    }
    fail(5, "more than %d threads", LANES);
    return NULL;
}

static int enter(Thread *t) {
    if (t->private) {
        doing(t, "create context on GPU %d", t->device);
        if (!given(cuCtxCreate_v2(&t->context, 0, t->device), "cuCtxCreate")) return 0;
    } else {
        t->context = shared_contexts[t->device];
        doing(t, "enter context of GPU %d", t->device);
        MUST(cuCtxSetCurrent(t->context));
    }
    if (!given(cuModuleLoadData(&t->module, MODULE), "cuModuleLoadData")) return 0;
    MUST(cuModuleGetFunction(&t->iota, t->module, "nvshare_iota_u64"));
    MUST(cuModuleGetFunction(&t->mixes, t->module, "nvshare_mix_u64"));
    MUST(cuModuleGetFunction(&t->spin, t->module, "nvshare_spin"));
    for (int i = 0; i < OWN_STREAMS; i++) MUST(cuStreamCreate(&t->streams[i], below(&t->dice, 2)));
    CUmemPoolProps properties = {1, 0, {1, t->device}, NULL, 0, 0, {0}};
    if (with[POOLS] && once_in(&t->dice, 3)) MUST(cuMemPoolCreate(&t->pool, &properties));
    t->stream = t->streams[0];
    return 1;
}

/* A context of its own goes with all that is in it; of a shared one, the thread's part is given back. */
static void leave(Thread *t) {
    int with_all = t->private && once_in(&t->dice, 2);
    for (int i = t->count - 1; i >= 0; i--) {
        /* Such memory is no context's. */
        int kind = t->buffers[i].kind;
        if (with_all && (kind == ALLOCATED || kind == PITCH || kind == UNIFIED)) {
            held -= t->buffers[i].bytes;
            t->buffers[i] = t->buffers[--t->count];
        } else {
            drop(t, i);
        }
    }
    doing(t, "leave");
    if (t->pool) {
        MUST(cuStreamSynchronize(t->stream));
        MUST(cuMemPoolDestroy(t->pool));
    }
    if (!with_all) {
        MUST(cuStreamSynchronize(t->stream));
        for (int i = 0; i < OWN_STREAMS; i++) MUST(cuStreamDestroy_v2(t->streams[i]));
        MUST(cuModuleUnload(t->module));
    }
    if (t->private) {
        doing(t, "destroy context");
        MUST(cuCtxDestroy_v2(t->context));
    }
}

/*
 * A thread-local destructor that still uses the GPU, as those of libraries do. It is registered as C++ registers that of a
 * thread_local object, after the thread's first use of the driver, so it runs before the driver's own.
 */
int __cxa_thread_atexit_impl(void (*destructor)(void *), void *object, void *library);

static void fulfil(void *pointer) {
    Thread *t = pointer;
    while (t->count) {
        check(t, &t->buffers[0]);
        drop(t, 0);
    }
    leave(t);
    t->lane->thread = 0;
    free(t);
}

static void *live(void *pointer) {
    Thread *t = pointer;
    t->lane = take_lane();
    if (!enter(t)) {
        doing(t, "no room for a context");
        t->lane->thread = 0;
        free(t);
        return NULL;
    }
    for (int i = 10 + below(&t->dice, 60); i > 0 && !ending; i--) act(t);
    if (ending) for (;;) pause();
    if (with[DESTRUCTORS] && once_in(&t->dice, 3)) {
        cuStreamQuery(CU_STREAM_PER_THREAD);
        __cxa_thread_atexit_impl(fulfil, t, &most_bytes);
        return NULL;
    }
    leave(t);
    t->lane->thread = 0;
    free(t);
    return NULL;
}

/* ---- the process ---- */

static void on_signal(int signal) { (void)signal; }

static void settings(void) {
    const char *without = getenv("STRESS_WITHOUT"), *count = getenv("STRESS_GPUS"), *bytes = getenv("STRESS_BYTES");
    for (int i = 0; i < ACTIONS; i++) {
        size_t length = strlen(NAMES[i]);
        with[i] = 1;
        for (const char *at = without; at && (at = strstr(at, NAMES[i])); at += length)
            if ((at == without || at[-1] == ',') && (at[length] == ',' || !at[length])) with[i] = 0;
    }
    if (count) gpus = atoi(count);
    if (bytes) most_bytes = strtoull(bytes, NULL, 10);
}

static void take_row(uint64_t seed) {
    const char *path = getenv("STRESS_PROGRESS");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    Row *rows = mmap(NULL, ROWS * sizeof(Row), PROT_READ | PROT_WRITE, file < 0 ? MAP_SHARED | MAP_ANONYMOUS : MAP_SHARED, file, 0);
    for (int i = 0; i < ROWS; i++) {
        uint32_t unused = FREE;
        if (!atomic_compare_exchange_strong(&rows[i].state, &unused, LIVING)) continue;
        row = &rows[i];
        memset((void *)row->lanes, 0, sizeof row->lanes);
        row->seed = seed;
        row->actions = row->refused = row->next_event = 0;
        row->begun = (uint64_t)(now_s() * 1e6);
        row->pid = (uint32_t)getpid();
        return;
    }
    fprintf(stderr, "FAILED: no row is free in %s\n", path);
    _exit(5);
}

static void signals(Dice *dice) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = once_in(dice, 2) ? SA_RESTART : 0};
    sigaction(SIGALRM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    if (!with[SIGNALS] || !once_in(dice, 2)) return;
    struct itimerval often = {{0, 1000 + (long)below(dice, 20000)}, {0, 1000}};
    setitimer(ITIMER_REAL, &often, NULL);
}

/* Memory that an atexit handler gives back. */
static CUdeviceptr kept;

static void at_the_end(void) {
    if (kept && cuMemFree_v2(kept)) {
        fprintf(stderr, "FAILED [%d]: cuMemFree in an atexit handler\n", getpid());
        _exit(3);
    }
}

static void end(Thread *main) {
    int how = with[ENDS] ? below(&main->dice, 8) : 0;
    doing(main, "end %d", how);
    if (how == 4) row->state = KILLS_ITSELF;
    if (atomic_exchange(&ending, 1)) for (;;) pause();
    if (how != 4) row->state = ENDING;
    switch (how) {
    case 1: case 2: _exit(0);
    case 3:
        if (with[AT_EXIT] && cuCtxSetCurrent(shared_contexts[main->device]) == CUDA_SUCCESS && cuMemAlloc_v2(&kept, 3 << 20) == CUDA_SUCCESS) atexit(at_the_end);
        exit(0);
    case 4: kill(getpid(), SIGKILL); break;
    case 5: if (cuDevicePrimaryCtxRelease_v2(main->device)) {} exit(0);
    default: exit(0);
    }
}

static Thread *new_thread(Dice *dice, int number) {
    Thread *t = calloc(1, sizeof *t);
    t->dice.state = roll(dice);
    t->number = number;
    t->device = with[SECOND_GPU] ? (int)below(dice, gpus) : 0;
    t->private = with[CONTEXTS] && once_in(dice, 3);
    return t;
}

/* Some threads live beside each other; those that nobody waits for may live on. */
static void round_of_threads(Thread *main, int round) {
    pthread_t threads[4];
    int started = 0, count = with[THREADS] ? 1 + below(&main->dice, 3) : 1;
    for (int i = 0; i < count; i++) {
        Thread *t = new_thread(&main->dice, round * 10 + i);
        pthread_t thread;
        if (pthread_create(&thread, NULL, live, t)) fail(5, "pthread_create");
        if (with[DAEMONS] && depth == 0 && round < 3 && once_in(&main->dice, 8)) pthread_detach(thread);
        else threads[started++] = thread;
    }
    for (int i = 0; i < started; i++) {
        doing(main, "~join thread %d", i);
        pthread_join(threads[i], NULL);
    }
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    self = argv[0];
    depth = argc > 2 ? atoi(argv[2]) : 0;
    settings();
    take_row(seed);
    Thread first = {.dice = {seed}, .main = 1};
    first.lane = take_lane();
    first.device = with[SECOND_GPU] ? (int)below(&first.dice, gpus) : 0;
    signals(&first.dice);
    doing(&first, "cuInit");
    MUST(cuInit(0));
    for (int i = 0; i < gpus; i++) {
        doing(&first, "retain the primary context of GPU %d", i);
        CUresult result = cuDevicePrimaryCtxRetain(&shared_contexts[i], i);
        if (given(result, "cuDevicePrimaryCtxRetain")) continue;
        row->state = ENDING;
        _exit(0);
    }
    int rounds = 1 + below(&first.dice, 4);
    for (int round = 0; round < rounds; round++) round_of_threads(&first, round);
    end(&first);
}
