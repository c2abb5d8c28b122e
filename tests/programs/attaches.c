/*
 * A process with two GPUs that attaches to the second while it works with the first. For each line that it reads it makes a
 * round of calls on the first; the first line also starts the thread, "attaching", that makes the context on the second.
 */
#include "driver.h"
#include <sys/prctl.h>

static void *attaches(void *unused) {
    CUcontext context;
    (void)unused;
    prctl(PR_SET_NAME, "attaching");
    CHECK(cuCtxCreate_v2(&context, 0, 1));
    SAY("attached");
    return NULL;
}

int main(void) {
    CUcontext context;
    pthread_t thread;
    char line[16];
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    SAY("ready");
    for (int round = 0; fgets(line, sizeof line, stdin); round++) {
        CUdeviceptr memory;
        if (!round) {
            pthread_create(&thread, NULL, attaches, NULL);
            continue;
        }
        CHECK(cuMemAlloc_v2(&memory, 4 << 20));
        write_words(memory, 4 << 20, round);
        check_words(memory, 4 << 20, round);
        CHECK(cuMemFree_v2(memory));
        SAY("round");
    }
    pthread_join(thread, NULL);
    return 0;
}
