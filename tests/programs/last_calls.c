/*
 * CUDA calls where threads and processes end: `last_calls WHERE`. Each place says what every call of a list returned there.
 *
 *   thread-local       the destructor of a C++ thread-local that is older than the thread's first CUDA call
 *   key                the destructors of two pthread keys, one made before cuInit and one after, in each of their rounds
 *   return, exit, quick_exit, _exit, pthread_exit
 *                      the process ends so; exit handlers from before and after cuInit, a destructor of the program and a
 *                      thread-local of the first thread make the calls. After pthread_exit another thread makes them first
 *   thread-local-loop, key-loop
 *                      write and check memory in such a destructor, in the last round of a key, until standard input ends
 *   launching HOW      eight threads submit work while the process ends by `return`, `quick_exit`, `_exit` or `pthread_exit`,
 *                      or by `joined`: an exit handler from before cuInit waits until the threads have seen an error
 */
#include "driver.h"
#include <poll.h>
#include <stdatomic.h>

#define MIB ((size_t)1 << 20)
#define THREADS 8

/* What a compiler makes of a thread-local with a destructor. */
extern int __cxa_thread_atexit_impl(void (*destructor)(void *), void *object, void *library);
extern void *__dso_handle;

static CUcontext context;
static CUdeviceptr loop_memory, memories[THREADS];
static size_t loop_bytes = 50 * MIB;
static pthread_key_t early_key, late_key, loop_key;
static pthread_t first, threads[THREADS];
static atomic_int working;

/* What a thread has made before. */
struct scratch {
    const char *where;
    CUdeviceptr memory;
    CUstream stream;
    int round;
};

static void make(struct scratch *scratch, const char *where) {
    *scratch = (struct scratch){.where = where};
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuMemAlloc_v2(&scratch->memory, 4 * MIB));
    CHECK(cuStreamCreate(&scratch->stream, CU_STREAM_NON_BLOCKING));
    CHECK(cuMemsetD32Async(scratch->memory, 5, MIB, scratch->stream));
}

static void use(struct scratch *scratch) {
    CUcontext current = NULL;
    CUdeviceptr memory = 0, ordered = 0;
    unsigned word = 0;
    size_t free, total;
    int got = cuCtxGetCurrent(&current), set = cuCtxSetCurrent(context);
    int allocated = cuMemAlloc_v2(&memory, 3 * MIB), filled = cuMemsetD32_v2(memory, 9, 3 * MIB / 4);
    int copied = cuMemcpyDtoH_v2(&word, memory + MIB, 4), told = cuMemGetInfo_v2(&free, &total);
    int in_order = cuMemAllocAsync(&ordered, MIB, CU_STREAM_PER_THREAD);
    int freed_in_order = cuMemFreeAsync(ordered, CU_STREAM_PER_THREAD);
    int freed = cuMemFree_v2(memory), destroyed = cuStreamDestroy_v2(scratch->stream);
    int given_back = cuMemFree_v2(scratch->memory);
    SAY("%s, round %d: current %d (%s) %d, alloc %d, fill %d, copy %d (%u), info %d, in order %d %d, free %d, "
        "destroy %d, give back %d",
        scratch->where, scratch->round, got, current ? "ours" : "none", set, allocated, filled, copied, word, told,
        in_order, freed_in_order, freed, destroyed, given_back);
    scratch->memory = 0, scratch->stream = NULL;
}

/* Whose it is makes something new for the next round. */
static void use_and_make(struct scratch *scratch) {
    int round = scratch->round + 1;
    use(scratch);
    make(scratch, scratch->where);
    scratch->round = round;
}

static void at_thread_end(void *scratch) { use(scratch); }

static void at_key(pthread_key_t key, struct scratch *scratch) {
    if (scratch->round == 3) return use(scratch);
    use_and_make(scratch);
    pthread_setspecific(key, scratch);
}

static void at_early_key(void *scratch) { at_key(early_key, scratch); }
static void at_late_key(void *scratch) { at_key(late_key, scratch); }

static int input_ended(void) {
    struct pollfd input = {.fd = 0, .events = POLLIN};
    return poll(&input, 1, 0) > 0;
}

static void loop(void *unused) {
    int round = 0;
    (void)unused;
    CHECK(cuCtxSetCurrent(context));
    do {
        round++;
        CHECK(cuMemsetD32_v2(loop_memory, round, loop_bytes / 4));
        check_words(loop_memory, loop_bytes, round);
        SAY("round %d", round);
    } while (!input_ended());
}

static void at_loop_key(void *rounds) {
    if (rounds == (void *)4) return loop(NULL);
    pthread_setspecific(loop_key, (char *)rounds + 1);
}

static void *ends_with_a_thread_local(void *loops) {
    static __thread struct scratch scratch;
    __cxa_thread_atexit_impl(loops ? loop : at_thread_end, &scratch, &__dso_handle);
    if (loops) CHECK(cuCtxSetCurrent(context));
    else make(&scratch, "thread-local");
    CHECK(cuMemsetD32_v2(loop_memory, 1, 1));
    return NULL;
}

static void *ends_with_keys(void *loops) {
    static __thread struct scratch early, late;
    if (loops) {
        pthread_setspecific(loop_key, (void *)1);
        CHECK(cuCtxSetCurrent(context));
        CHECK(cuMemsetD32_v2(loop_memory, 1, 1));
        return NULL;
    }
    make(&early, "key from before cuInit");
    make(&late, "key from after cuInit");
    pthread_setspecific(early_key, &early);
    pthread_setspecific(late_key, &late);
    return NULL;
}

static void in_a_thread(void *(*run)(void *), void *argument) {
    pthread_t thread;
    pthread_create(&thread, NULL, run, argument);
    pthread_join(thread, NULL);
}

static struct scratch early_handler, late_handler, own_destructor, own_thread_local, other_thread;
static int in_exit;

static void at_early_exit(void) { use(&early_handler); }
static void at_late_exit(void) { use(&late_handler); }
__attribute__((destructor)) static void at_unload(void) {
    if (in_exit) use(&own_destructor);
}

static void *goes_on(void *unused) {
    (void)unused;
    pthread_join(first, NULL);
    use(&other_thread);
    /* The driver's own threads would keep the process. */
    exit(0);
}

static void leave(const char *how) {
    pthread_t thread;
    if (!strcmp(how, "exit")) exit(0);
    if (!strcmp(how, "quick_exit")) quick_exit(0);
    if (!strcmp(how, "_exit")) _exit(0);
    if (!strcmp(how, "pthread_exit")) {
        first = pthread_self();
        pthread_create(&thread, NULL, goes_on, NULL);
        pthread_exit(NULL);
    }
}

static void *submits(void *memory) {
    int result;
    CHECK(cuCtxSetCurrent(context));
    while (!(result = cuMemsetD32Async(*(CUdeviceptr *)memory, 1, MIB / 4, CU_STREAM_LEGACY))) {
        if (!(result = cuStreamSynchronize(CU_STREAM_LEGACY))) atomic_fetch_add(&working, 1);
    }
    return (void *)(intptr_t)result;
}

static void join(void) {
    void *result;
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], &result);
        SAY("a thread has seen %d", (int)(intptr_t)result);
    }
}

static void *leaves_later(void *unused) {
    (void)unused;
    pthread_join(first, NULL);
    exit(0);
}

static int launching(const char *how) {
    pthread_t thread;
    for (int i = 0; i < THREADS; i++) {
        CHECK(cuMemAlloc_v2(&memories[i], 6 * MIB));
        pthread_create(&threads[i], NULL, submits, &memories[i]);
        if (strcmp(how, "joined")) pthread_detach(threads[i]);
    }
    /* All memory is out at times, when others want it. */
    while (atomic_load(&working) < 200 || !input_ended()) sched_yield();
    if (!strcmp(how, "pthread_exit")) {
        first = pthread_self();
        pthread_create(&thread, NULL, leaves_later, NULL);
        pthread_exit(NULL);
    }
    leave(how);
    return 0;
}

int main(int argc, char **argv) {
    const char *where = argc > 1 ? argv[1] : "";
    int loops = strstr(where, "-loop") != NULL;
    pthread_key_create(&early_key, at_early_key);
    if (!strcmp(where, "launching") && argc > 2 && !strcmp(argv[2], "joined")) atexit(join);
    int in_process = strncmp(where, "thread-local", 12) && strncmp(where, "key", 3) && strcmp(where, "launching");
    if (in_process) atexit(at_early_exit);
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    pthread_key_create(&late_key, at_late_key);
    pthread_key_create(&loop_key, at_loop_key);
    if (!strcmp(where, "launching")) return launching(argc > 2 ? argv[2] : "return");
    if (in_process) {
        make(&early_handler, "exit handler from before cuInit");
        make(&late_handler, "exit handler from after cuInit");
        make(&own_destructor, "destructor");
        make(&own_thread_local, "thread-local of the first thread");
        make(&other_thread, "another thread");
        atexit(at_late_exit);
        __cxa_thread_atexit_impl(at_thread_end, &own_thread_local, &__dso_handle);
        in_exit = 1;
        leave(where);
        return 0;
    }
    CHECK(cuMemAlloc_v2(&loop_memory, loops ? loop_bytes : 4));
    in_a_thread(strncmp(where, "key", 3) ? ends_with_a_thread_local : ends_with_keys, loops ? &loops : NULL);
    SAY("the process goes on");
    return 0;
}
