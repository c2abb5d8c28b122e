/*
 * A library that does its CUDA work in a constructor, as static objects of C++ do: `opens libconstructor.so`. Whoever opens
 * it holds the dynamic loader's lock meanwhile, which threads need that begin, look symbols up or open libraries. It goes on
 * until standard input ends.
 */
#include "driver.h"
#include <poll.h>

#define BYTES ((size_t)50 << 20)

static int input_ended(void) {
    struct pollfd input = {.fd = 0, .events = POLLIN};
    return poll(&input, 1, 0) > 0;
}

__attribute__((constructor)) static void work(void) {
    CUcontext context;
    CUdeviceptr memory;
    int round = 0;
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    CHECK(cuMemAlloc_v2(&memory, BYTES));
    do {
        round++;
        write_words(memory, BYTES, round);
        check_words(memory, BYTES, round);
        SAY("round %d", round);
    } while (!input_ended());
    CHECK(cuMemFree_v2(memory));
    CHECK(cuCtxDestroy_v2(context));
}
