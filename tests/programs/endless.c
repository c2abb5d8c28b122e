/*
 * A kernel that does not end before the program's standard input does: `endless KERNELS.ptx [quiet|capture]`.
 *
 * Says "ready" when it runs, and then "launched" after each launch in another stream; quiet, it launches nothing more. When
 * the input has ended it lets the kernel end, and looks at its data. With "capture" it is a capture that does not end.
 */
#include "driver.h"
#include <poll.h>

int main(int argc, char **argv) {
    const size_t bytes = 40 << 20;
    CUcontext context;
    CUdeviceptr memory;
    CUmodule module;
    CUfunction await_u32;
    CUstream endless, other;
    unsigned *flag, value = 1;
    if (argc < 2) return 2;
    int capture = argc > 2 && !strcmp(argv[2], "capture");
    int quiet = capture || (argc > 2 && !strcmp(argv[2], "quiet"));
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    CHECK(cuModuleLoad(&module, argv[1]));
    CHECK(cuModuleGetFunction(&await_u32, module, "nvshare_await_u32"));
    CHECK(cuMemAlloc_v2(&memory, bytes));
    CHECK(cuStreamCreate(&endless, 0));
    CHECK(cuStreamCreate(&other, 0));
    CHECK(cuMemHostAlloc((void **)&flag, sizeof *flag, CU_MEMHOSTALLOC_DEVICEMAP));
    *flag = 0;
    CUdeviceptr word = (CUdeviceptr)flag;
    void *parameters[] = {&word, &value};
    CHECK(cuMemsetD32Async(memory, 1, bytes / 4, other));
    CHECK(cuStreamSynchronize(other));
    if (capture) CHECK(cuStreamBeginCapture_v2(endless, 0));
    CHECK(cuLaunchKernel(await_u32, 1, 1, 1, 1, 1, 1, 0, endless, parameters, NULL));
    SAY("ready");
    unsigned round = 1;
    struct pollfd input = {0, POLLIN, 0};
    while (poll(&input, 1, quiet ? -1 : 10) == 0) {
        CHECK(cuMemsetD32Async(memory, ++round, bytes / 4, other));
        CHECK(cuStreamSynchronize(other));
        SAY("launched");
    }
    *(volatile unsigned *)flag = value;
    CUgraph graph;
    if (capture) CHECK(cuStreamEndCapture(endless, &graph));
    CHECK(cuCtxSynchronize());
    check_words(memory, bytes, round);
    return 0;
}
