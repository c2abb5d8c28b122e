/*
 * A client whose standard error is in some state, and that gives the shim reasons to say something there: `quiet SIGPIPE
 * [FILE]`. SIGPIPE is what the application does about that signal: default, ignored or handled. With FILE, the program
 * closes descriptor 2 and opens FILE, which gets that number.
 *
 * Exits with 5 if a SIGPIPE came, with 6 if somebody wrote to FILE.
 */
#include "driver.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>

static volatile sig_atomic_t pipes;

static void count(int signal) {
    (void)signal;
    pipes++;
}

int main(int argc, char **argv) {
    CUcontext context;
    CUdeviceptr memory;
    struct stat file;
    if (argc > 1 && !strcmp(argv[1], "ignored")) signal(SIGPIPE, SIG_IGN);
    if (argc > 1 && !strcmp(argv[1], "handled")) signal(SIGPIPE, count);
    if (argc > 2) {
        close(2);
        if (open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0600) != 2) return 2;
        if (write(2, "mine", 4) != 4) return 2;
    }
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    for (int i = 0; i < 20; i++) {
        if (cuMemAlloc_v2(&memory, (size_t)10 << 30) != 2) return 3;
    }
    CHECK(cuMemAlloc_v2(&memory, 4 << 20));
    write_words(memory, 4 << 20, 7);
    check_words(memory, 4 << 20, 7);
    if (pipes) return 5;
    if (argc > 2 && (fstat(2, &file) || file.st_size != 4)) return 6;
    SAY("all well");
    return 0;
}
