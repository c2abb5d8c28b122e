/*
 * Loads a library with RTLD_DEEPBIND and has it allocate: `deepbind LIBRARY MIB`. Says "allocated", and ends when its
 * standard input does.
 */
#include <dlfcn.h>

#include "driver.h"

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    CUcontext context;
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_DEEPBIND);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 3;
    }
    CUresult (*allocate)(size_t) = dlsym(library, "plugin_allocate");
    CHECK(allocate((size_t)atoi(argv[2]) << 20));
    SAY("allocated");
    while (getchar() != EOF) {}
    return 0;
}
