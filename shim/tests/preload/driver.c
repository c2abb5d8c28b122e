// A driver with a handful of entry points that do nothing, for tests of how they are found.
#include <stddef.h>
#include <string.h>

#define ENTRY(name) int name(void) { return 0; }
ENTRY(cuInit)
ENTRY(cuMemAlloc_v2)
ENTRY(cuLaunchKernel)
ENTRY(cuLaunchKernel_ptsz)
ENTRY(cuEventRecord)
ENTRY(cuFromTheFuture)
ENTRY(cuFromNextYear)

int cuGetProcAddress_v2(const char *symbol, void **pfn, int version, unsigned long long flags, int *status) {
    *pfn = NULL;
    if (!strcmp(symbol, "cuLaunchKernel")) *pfn = flags & 2 ? (void *)cuLaunchKernel_ptsz : (void *)cuLaunchKernel;
    if (!strcmp(symbol, "cuMemAlloc") && version >= 3020) *pfn = (void *)cuMemAlloc_v2;
    if (!strcmp(symbol, "cuEventRecord")) *pfn = (void *)cuEventRecord;
    if (!strcmp(symbol, "cuFromTheFuture")) *pfn = (void *)cuFromTheFuture;
    if (!strcmp(symbol, "cuFromNextYear")) *pfn = (void *)cuFromNextYear;
    if (!strcmp(symbol, "cuGetProcAddress")) *pfn = (void *)cuGetProcAddress_v2;
    if (status) *status = *pfn ? 0 : 1;
    return *pfn || status ? 0 : 500;
}
