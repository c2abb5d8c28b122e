/*
 * A library for `deepbind`: allocates in the current context, by the linker's own binding and by dlsym, and leaves the
 * memory to be seen.
 */
#include <dlfcn.h>

#include "driver.h"

CUresult plugin_allocate(size_t bytes) {
    CUdeviceptr first, second;
    CUresult result = cuMemAlloc_v2(&first, bytes);
    if (result) return result;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    CUresult (*allocate)(CUdeviceptr *, size_t) = driver ? dlsym(driver, "cuMemAlloc_v2") : NULL;
    return allocate ? allocate(&second, bytes) : 500;
}
