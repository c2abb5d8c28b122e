/*
 * A client that ends, or seems to, in one of the ways of Unix: `ends HOW MIB`. Says "PID of the client" when it has memory
 * on the GPU, and waits for a line before it ends.
 *
 *   _exit       from another thread than the first
 *   vfork       a child of vfork runs another program and outlives the client, which returns from main
 *   daemon      forks twice, as daemons do: the grandchild is the client, and the others are gone before there is one
 *   left        has a context, then forks twice: the client is gone, and its grandchild lives on
 *   closed      closes every descriptor that it knows of, as daemons do, and goes on: it says "right" for each line
 *   clone       a child that fork's handlers know nothing of (clone) lives on with its descriptors
 *   runs        a child of fork lives on with its descriptors, and the client runs another program
 */
#include "driver.h"
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static size_t bytes;
static CUdeviceptr memory;

static void become_client(void) {
    CUcontext context;
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    CHECK(cuMemAlloc_v2(&memory, bytes));
    write_words(memory, bytes, 7);
    SAY("%d of the client", getpid());
}

static void wait_for_line(void) {
    char line[16];
    if (!fgets(line, sizeof line, stdin)) exit(2);
}

/* A process that holds whatever it inherited until its standard input ends. */
static void live_on(void) {
    char byte;
    SAY("%d lives on", getpid());
    while (read(0, &byte, 1) > 0) {}
    _exit(0);
}

static void *leave(void *unused) {
    (void)unused;
    _exit(0);
}

int main(int argc, char **argv) {
    const char *how = argc > 2 ? argv[1] : "";
    bytes = argc > 2 ? strtoul(argv[2], NULL, 10) << 20 : 0;
    setvbuf(stdin, NULL, _IONBF, 0);
    if (!strcmp(how, "daemon")) {
        for (int i = 0; i < 2; i++) {
            if (fork()) _exit(0);
            setsid();
        }
        become_client();
        wait_for_line();
        return 0;
    }
    become_client();
    wait_for_line();
    if (!strcmp(how, "_exit")) {
        pthread_t thread;
        pthread_create(&thread, NULL, leave, NULL);
        pause();
    } else if (!strcmp(how, "vfork")) {
        if (!vfork()) {
            execlp("cat", "cat", NULL);
            _exit(2);
        }
    } else if (!strcmp(how, "left")) {
        if (!fork()) {
            setsid();
            if (fork()) _exit(0);
            live_on();
        }
        wait(NULL);
        _exit(0);
    } else if (!strcmp(how, "closed")) {
        for (int fd = 3; fd < 1024; fd++) close(fd);
        for (;;) {
            check_words(memory, bytes, 7);
            SAY("right");
            wait_for_line();
        }
    } else if (!strcmp(how, "clone")) {
        if (!syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)) live_on();
    } else if (!strcmp(how, "runs")) {
        if (!syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)) live_on();
        execlp("cat", "cat", NULL);
    }
    return 0;
}
