/*
 * A process whose memory can no longer be moved: `broken [MIB]`.
 *
 * It uses the GPU until a call fails, says "failed CODE", and makes calls of all kinds, which must fail as well, with the
 * same code, and at once. Then it says "all fail", and waits for the end of its standard input. A line of input before has
 * it forbid membarrier(2) to all its threads, as a sandbox may that is entered late.
 */
#include "driver.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static void forbid_membarrier(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_membarrier, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program)) {
        perror("seccomp");
        exit(5);
    }
}

static int line_of_input(void) {
    struct pollfd input = {0, POLLIN, 0};
    char line[16];
    return poll(&input, 1, 0) > 0 && read(0, line, sizeof line) > 0;
}

int main(int argc, char **argv) {
    size_t bytes = (argc > 1 ? strtoul(argv[1], NULL, 10) : 40) << 20;
    CUcontext context;
    CUdeviceptr memory = 0, other;
    CUstream stream = NULL;
    unsigned word = 7;
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    int said = 0;
    /* An engine that cannot begin says so at some time from here on. */
    CUresult failed = cuMemAlloc_v2(&memory, bytes);
    if (!failed) CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    while (!failed) {
        if (line_of_input()) forbid_membarrier();
        failed = cuMemsetD32Async(memory, word, bytes / 4, stream);
        if (!failed && !said++) SAY("ready");
        CHECK(cuStreamSynchronize(stream));
        usleep(1000);
    }
    SAY("failed %d", failed);
    struct {
        const char *name;
        CUresult result;
    } calls[] = {
        {"cuMemsetD32Async", cuMemsetD32Async(memory, word, 1, stream)},
        {"cuMemcpyHtoD", cuMemcpyHtoD_v2(memory, &word, sizeof word)},
        {"cuMemcpyDtoH", cuMemcpyDtoH_v2(&word, memory, sizeof word)},
        {"cuMemAlloc", cuMemAlloc_v2(&other, 4 << 20)},
        {"cuMemAllocManaged", cuMemAllocManaged(&other, 4 << 20, 1)},
        {"cuMemAllocAsync", cuMemAllocAsync(&other, 4 << 20, stream)},
        {"cuMemFree", cuMemFree_v2(memory)},
        {"cuStreamBeginCapture", cuStreamBeginCapture_v2(stream, 0)},
    };
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        if (calls[i].result != failed) {
            fprintf(stderr, "%s: CUDA error %d, not %d\n", calls[i].name, calls[i].result, failed);
            return 4;
        }
    }
    SAY("all fail");
    char end;
    while (read(0, &end, 1) > 0) continue;
    /* What ends, ends. */
    cuStreamDestroy_v2(stream);
    cuCtxDestroy_v2(context);
    return 0;
}
