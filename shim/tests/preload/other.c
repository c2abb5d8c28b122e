// A library that happens to export a name of the driver, and that looks for what comes after itself.
#define _GNU_SOURCE
#include <dlfcn.h>

int cuLaunchKernel(void) { return 1; }

void *next_of_other(const char *name) { return dlsym(RTLD_NEXT, name); }
