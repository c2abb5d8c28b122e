/*
 * A client that always wants the GPU and checks its own data: `compete MIB ROUNDS [PAUSE_MS [GPU]]`.
 * Says "rounds N" after each round, so that a test can wait for one.
 */
#include "driver.h"

int main(int argc, char **argv) {
    size_t bytes = (argc > 1 ? strtoul(argv[1], NULL, 10) : 50) << 20;
    int rounds = argc > 2 ? atoi(argv[2]) : 3;
    int pause_ms = argc > 3 ? atoi(argv[3]) : 0;
    int gpu = argc > 4 ? atoi(argv[4]) : 0;
    CUcontext context;
    CUdeviceptr memory;
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, gpu));
    CHECK(cuMemAlloc_v2(&memory, bytes));
    for (int round = 1; round <= rounds; round++) {
        write_words(memory, bytes, 0x1000 + round);
        if (pause_ms) usleep(pause_ms * 1000);
        check_words(memory, bytes, 0x1000 + round);
        SAY("rounds %d", round);
    }
    return 0;
}
