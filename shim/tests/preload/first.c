// Preloaded before the shim: looks up the next malloc from within the first malloc of the process, when no constructor
// has run yet.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

static void *(*next)(size_t);
int first_is_in_place;

void *malloc(size_t size) {
    if (!next) next = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
    first_is_in_place = 1;
    return next(size);
}
