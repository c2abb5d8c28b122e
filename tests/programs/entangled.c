/*
 * Work on the GPU that waits for a thread which is about to submit more: `entangled CASE [MIB]`.
 *
 * Every case is a legal pattern: natively no submission waits for the GPU, so none ever stops. Each round submits work that
 * does not end, does something else for a while, and then submits what lets it end. The program says "ready" after the
 * first round, goes on until its standard input ends, and looks at its data then.
 */
#include "driver.h"
#include <poll.h>

/* How long the work waits in each round, us: longer than the slices that the tests set. */
enum { A_WHILE = 30000, DEVICES = 2 };

static size_t bytes;
static unsigned number; /* of the round */
static CUcontext contexts[DEVICES];
static CUdeviceptr memory[DEVICES], flag;
static CUstream first[DEVICES], second[DEVICES];
static CUfunction await_u32;
static unsigned *host_flag;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void fill(int device, CUstream stream) {
    CHECK(cuMemsetD32Async(memory[device], number, bytes / 4, stream));
}

/* A kernel that ends when the word there is the round's number. */
static void launch_resident(CUdeviceptr word, CUstream stream) {
    void *parameters[] = {&word, &number};
    CHECK(cuLaunchKernel(await_u32, 1, 1, 1, 1, 1, 1, 0, stream, parameters, NULL));
}

static void copy_flag(CUstream stream) {
    static unsigned value;
    value = number;
    CHECK(cuMemcpyHtoDAsync_v2(flag, &value, sizeof value, stream));
}

/* A host function takes a lock whose holder is launching, as with Python's. */
static void take_lock(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    pthread_mutex_unlock(&lock);
}

static void callback(void) {
    pthread_mutex_lock(&lock);
    CHECK(cuLaunchHostFunc(first[0], take_lock, NULL));
    usleep(A_WHILE);
    fill(0, second[0]);
    pthread_mutex_unlock(&lock);
}

/* The same, and the holder allocates before it launches. */
static void allocation(void) {
    static CUdeviceptr more;
    if (more) CHECK(cuMemFree_v2(more));
    pthread_mutex_lock(&lock);
    CHECK(cuLaunchHostFunc(first[0], take_lock, NULL));
    usleep(A_WHILE);
    CHECK(cuMemAlloc_v2(&more, 4 << 20));
    CHECK(cuMemsetD32Async(more, number, 1 << 20, second[0]));
    fill(0, second[0]);
    pthread_mutex_unlock(&lock);
    CHECK(cuStreamSynchronize(second[0]));
    check_words(more, 4 << 20, number);
}

/* A resident kernel is fed by a copy in another stream. */
static void copy(void) {
    launch_resident(flag, first[0]);
    usleep(A_WHILE);
    copy_flag(second[0]);
    fill(0, first[0]);
}

/* The same kernel in the default stream. */
static void copy_beside_default(void) {
    launch_resident(flag, NULL);
    usleep(A_WHILE);
    copy_flag(second[0]);
    fill(0, NULL);
}

/* Mapped host memory feeds it, after another submission. */
static void mapped(void) {
    CUdeviceptr word = (CUdeviceptr)host_flag;
    launch_resident(word, first[0]);
    usleep(A_WHILE);
    fill(0, second[0]);
    *(volatile unsigned *)host_flag = number;
}

static void value32(void) {
    CHECK(cuStreamWaitValue32_v2(first[0], flag, number, 0));
    fill(0, first[0]);
    usleep(A_WHILE);
    CHECK(cuStreamWriteValue32_v2(second[0], flag, number, 0));
}

static void value64(void) {
    CHECK(cuStreamWaitValue64_v2(first[0], flag, number, 1));
    fill(0, first[0]);
    usleep(A_WHILE);
    CHECK(cuStreamWriteValue64_v2(second[0], flag, number, 0));
}

static void *waits_for_event(void *event) {
    CHECK(cuCtxSetCurrent(contexts[0]));
    pthread_mutex_lock(&lock);
    CHECK(cuEventSynchronize(event));
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* Another thread waits for the kernel with a lock held that a host function wants. */
static void event(void) {
    CUevent end;
    pthread_t thread;
    CHECK(cuEventCreate(&end, 0));
    launch_resident(flag, first[0]);
    CHECK(cuEventRecord(end, first[0]));
    pthread_create(&thread, NULL, waits_for_event, end);
    usleep(A_WHILE);
    CHECK(cuLaunchHostFunc(first[0], take_lock, NULL));
    copy_flag(second[0]);
    pthread_join(thread, NULL);
    fill(0, first[0]);
    CHECK(cuEventDestroy_v2(end));
}

static void *copies_at_once(void *unused) {
    unsigned word;
    CHECK(cuCtxSetCurrent(contexts[0]));
    CHECK(cuMemcpyDtoH_v2(&word, memory[0], sizeof word));
    return unused;
}

/* Another thread is in the middle of a call that waits for the kernel. */
static void synchronous(void) {
    pthread_t thread;
    launch_resident(flag, NULL);
    pthread_create(&thread, NULL, copies_at_once, NULL);
    usleep(A_WHILE);
    copy_flag(second[0]);
    pthread_join(thread, NULL);
    fill(0, NULL);
}

static void *frees(void *address) {
    CHECK(cuCtxSetCurrent(contexts[0]));
    CHECK(cuMemFree_v2((CUdeviceptr)address));
    return NULL;
}

/* The same, with a free. */
static void free_meanwhile(void) {
    pthread_t thread;
    CUdeviceptr more;
    CHECK(cuMemAlloc_v2(&more, 2 << 20));
    launch_resident(flag, first[0]);
    pthread_create(&thread, NULL, frees, (void *)more);
    usleep(A_WHILE);
    copy_flag(second[0]);
    pthread_join(thread, NULL);
    fill(0, first[0]);
}

/* A part of a collective: done when the other GPU's has begun. */
static void take_part(void *device) {
    static unsigned at[DEVICES];
    int own = device != NULL;
    unsigned mine = __atomic_add_fetch(&at[own], 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&at[!own], __ATOMIC_SEQ_CST) < mine) usleep(50);
}

/* One thread launches a collective on one GPU and then on the other. */
static void collective(void) {
    for (int device = 0; device < DEVICES; device++) {
        if (device) usleep(A_WHILE);
        CHECK(cuCtxSetCurrent(contexts[device]));
        fill(device, first[device]);
        CHECK(cuLaunchHostFunc(first[device], take_part, device ? &lock : NULL));
    }
}

static void *destroys(void *context) {
    CHECK(cuCtxDestroy_v2(context));
    return NULL;
}

/* A GPU's last context is destroyed while its work waits for a launch on the other GPU. */
static void destruction(void) {
    pthread_t thread;
    CUcontext gone;
    CUstream stream;
    CUdeviceptr more;
    CHECK(cuCtxCreate_v2(&gone, 0, 1));
    CHECK(cuMemAlloc_v2(&more, 8 << 20));
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    CHECK(cuMemsetD32Async(more, number, 2 << 20, stream));
    pthread_mutex_lock(&lock);
    CHECK(cuLaunchHostFunc(stream, take_lock, NULL));
    pthread_create(&thread, NULL, destroys, gone);
    usleep(A_WHILE);
    CHECK(cuCtxSetCurrent(contexts[0]));
    fill(0, first[0]);
    pthread_mutex_unlock(&lock);
    pthread_join(thread, NULL);
    CHECK(cuCtxSetCurrent(contexts[0]));
}

typedef struct {
    const char *name;
    void (*round)(void);
    int devices;
    unsigned streams; /* their flags */
} Case;

static const Case cases[] = {
    {"callback", callback, 1, CU_STREAM_NON_BLOCKING},
    {"allocation", allocation, 1, CU_STREAM_NON_BLOCKING},
    {"copy", copy, 1, CU_STREAM_NON_BLOCKING},
    {"copy-blocking", copy, 1, 0},
    {"copy-beside-default", copy_beside_default, 1, CU_STREAM_NON_BLOCKING},
    {"mapped", mapped, 1, 0},
    {"value32", value32, 1, 0},
    {"value64", value64, 1, CU_STREAM_NON_BLOCKING},
    {"event", event, 1, 0},
    {"synchronous", synchronous, 1, CU_STREAM_NON_BLOCKING},
    {"free", free_meanwhile, 1, 0},
    {"collective", collective, 2, CU_STREAM_NON_BLOCKING},
    {"destruction", destruction, 1, CU_STREAM_NON_BLOCKING},
};

static void prepare(const Case *chosen, const char *kernels) {
    CHECK(cuInit(0));
    for (int device = 0; device < chosen->devices; device++) {
        CHECK(cuCtxCreate_v2(&contexts[device], 0, device));
        CHECK(cuMemAlloc_v2(&memory[device], bytes));
        CHECK(cuStreamCreate(&first[device], chosen->streams));
        CHECK(cuStreamCreate(&second[device], chosen->streams));
    }
    CUmodule module;
    CHECK(cuCtxSetCurrent(contexts[0]));
    CHECK(cuModuleLoad(&module, kernels));
    CHECK(cuModuleGetFunction(&await_u32, module, "nvshare_await_u32"));
    CHECK(cuMemAlloc_v2(&flag, 8));
    CHECK(cuMemsetD32_v2(flag, 0, 2));
    CHECK(cuMemHostAlloc((void **)&host_flag, sizeof *host_flag, CU_MEMHOSTALLOC_DEVICEMAP));
    *host_flag = 0;
}

static int input_has_ended(void) {
    struct pollfd input = {0, POLLIN, 0};
    return poll(&input, 1, 0) > 0;
}

int main(int argc, char **argv) {
    const Case *chosen = cases, *end = cases + sizeof cases / sizeof *cases;
    while (chosen < end && (argc < 3 || strcmp(argv[1], chosen->name))) chosen++;
    if (chosen == end) {
        fprintf(stderr, "usage: entangled CASE KERNELS.ptx [MIB]\n");
        return 2;
    }
    bytes = (argc > 3 ? strtoul(argv[3], NULL, 10) : 40) << 20;
    prepare(chosen, argv[2]);
    do {
        number++;
        chosen->round();
        for (int device = 0; device < chosen->devices; device++) {
            CHECK(cuCtxSetCurrent(contexts[device]));
            CHECK(cuCtxSynchronize());
        }
        CHECK(cuCtxSetCurrent(contexts[0]));
        if (number == 1) SAY("ready");
    } while (!input_has_ended());
    for (int device = 0; device < chosen->devices; device++) {
        CHECK(cuCtxSetCurrent(contexts[device]));
        check_words(memory[device], bytes, number);
    }
    SAY("rounds %u", number);
    return 0;
}
