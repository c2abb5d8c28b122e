/*
 * A client that runs another program in its place, as launchers and reloaders do: `exec MIB PROGRAM [ARGUMENT...]`.
 * Says "exec", and, if the program cannot be run, goes on: "no exec", and its data is still right.
 */
#include "driver.h"

int main(int argc, char **argv) {
    size_t bytes = strtoul(argv[1], NULL, 10) << 20;
    CUcontext context;
    CUdeviceptr memory;
    if (argc < 3) return 2;
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    CHECK(cuMemAlloc_v2(&memory, bytes));
    write_words(memory, bytes, 7);
    SAY("exec");
    execvp(argv[2], argv + 2);
    SAY("no exec");
    while (getchar() != EOF) {
        check_words(memory, bytes, 7);
        write_words(memory, bytes, 7);
        SAY("right");
    }
    return 0;
}
