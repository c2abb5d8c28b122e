/* Calls that fail, one after the other, and what each says. Its argument is the GPU's UUID, 32 hexadecimal digits. */
#include "nvshare_client.h"

#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int released;

static int fill(void *context, const nvshare_books *books) {
    (void)books;
    return *(volatile int *)context;
}

static int evict(void *context, const nvshare_books *books, uint32_t granules) {
    (void)context;
    nvshare_give(books, granules);
    return 0;
}

static void release(void *context) {
    (void)context;
    released++;
}

static void say(const char *what, nvshare_code code) {
    printf("%s: %s: %s\n", what, nvshare_code_name(code), code == NVSHARE_OK ? "" : nvshare_message());
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (argc != 2 || strlen(argv[1]) != 32 || nvshare_client_api() != NVSHARE_CLIENT_API)
        return 2;
    volatile int answer = 0;
    nvshare_options options = {.name = "errors"};
    nvshare_runtime runtime = {.context = (void *)&answer, .evict = evict, .release = release};
    nvshare_client *client = (nvshare_client *)1;
    nvshare_pass *pass;
    for (int at = 0; at < 16; at++) {
        unsigned byte;
        if (sscanf(argv[1] + 2 * at, "%2x", &byte) != 1)
            return 2;
        options.gpu[at] = (uint8_t)byte;
    }
    say("nothing", nvshare_open(NULL, &runtime, &client));
    say("no size", nvshare_open(&options, &runtime, &client));
    if (client)
        return 3;
    options.size = sizeof options;
    say("no fill", nvshare_open(&options, &runtime, &client));
    runtime.fill = fill;
    options.priority = 7;
    say("priority", nvshare_open(&options, &runtime, &client));
    options.priority = 0;
    options.runtime_dir = "/nowhere";
    options.connect_timeout_ns = 1;
    say("no arbiter", nvshare_open(&options, &runtime, &client));
    options.runtime_dir = NULL;
    options.connect_timeout_ns = 0;
    options.gpu[0] ^= 0xff;
    say("other gpu", nvshare_open(&options, &runtime, &client));
    options.gpu[0] ^= 0xff;
    if (released != 0)
        return 4;

    say("open", nvshare_open(&options, &runtime, &client));
    say("too large", nvshare_grow(client, 4096, NULL, NULL));
    say("enter", nvshare_enter(client, NVSHARE_FOREVER, &pass));
    /* More memory shuts the gate, and fill is to say that it was recalled: nobody enters. */
    answer = NVSHARE_FILL_RECALLED;
    if (nvshare_grow(client, 1, NULL, NULL) != NVSHARE_OK || !nvshare_should_yield(pass))
        return 5;
    nvshare_pass *second = (nvshare_pass *)1;
    say("busy", nvshare_enter(client, 1000, &second));
    if (second)
        return 6;
    answer = NVSHARE_FILL_COMPLETE;
    pid_t child = fork();
    if (child == 0) {
        say("child", nvshare_enter(client, NVSHARE_FOREVER, &second));
        nvshare_give(nvshare_books_of(client), 1);
        nvshare_leave(pass);
        _exit(nvshare_close(client) == NVSHARE_ERROR_FORKED ? 0 : 1);
    }
    int ended;
    if (waitpid(child, &ended, 0) != child || ended != 0)
        return 7;
    nvshare_leave(pass);
    say("close", nvshare_close(client));
    if (released != 1)
        return 8;

    answer = -42;
    if (nvshare_open(&options, &runtime, &client) != NVSHARE_OK)
        return 9;
    say("failing", nvshare_enter(client, NVSHARE_FOREVER, &pass));
    say("close failed", nvshare_close(client));
    return released == 2 ? 0 : 10;
}
