// Looks things up in every way there is and says where they were found, a line each: what, and which library has it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static void say(const char *what, void *address) {
    Dl_info info;
    const char *library = address && dladdr(address, &info) ? strrchr(info.dli_fname, '/') : NULL;
    printf("%s %s\n", what, !address ? "nowhere" : library ? library + 1 : "?");
}

int main(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    void *other = dlopen("libother.so", RTLD_NOW);
    if (!driver || !other) return puts(dlerror()), 1;
    void *(*next_of_other)(const char *) = (void *(*)(const char *))dlsym(other, "next_of_other");

    say("driver/cuInit", dlsym(driver, "cuInit"));
    say("driver/cuLaunchKernel", dlsym(driver, "cuLaunchKernel"));
    say("driver/cuEventRecord", dlsym(driver, "cuEventRecord"));
    say("driver/cuNoSuchThing", dlsym(driver, "cuNoSuchThing"));
    printf("error %s\n", dlerror() ? "told" : "forgotten");
    say("driver/cuMemAlloc_v2", dlsym(driver, "cuMemAlloc_v2"));
    printf("error %s\n", dlerror() ? "left" : "none");
    say("other/cuLaunchKernel", dlsym(other, "cuLaunchKernel"));
    say("default/cuInit", dlsym(RTLD_DEFAULT, "cuInit"));
    say("next/cuInit", dlsym(RTLD_NEXT, "cuInit"));
    say("next/getpid", dlsym(RTLD_NEXT, "getpid"));
    say("next-of-other/getpid", next_of_other("getpid"));

    // No NVML here: the function that stands in for its own must say so.
    int (*memory)(void *, void *) = (int (*)(void *, void *))dlsym(RTLD_DEFAULT, "nvmlDeviceGetMemoryInfo");
    say("default/nvmlDeviceGetMemoryInfo", (void *)memory);
    printf("without-nvml %d\n", memory ? memory(NULL, NULL) : -1);

    int (*get)(const char *, void **, int, unsigned long long, int *) =
        (int (*)(const char *, void **, int, unsigned long long, int *))dlsym(driver, "cuGetProcAddress_v2");
    void *found;
    int status = 7;
    get("cuLaunchKernel", &found, 12000, 0, &status);
    say("asked/cuLaunchKernel", found);
    printf("legacy %s\n", found == dlsym(driver, "cuLaunchKernel") ? "same" : "other");
    get("cuLaunchKernel", &found, 12000, 2, &status);
    printf("per-thread %s\n", found == dlsym(driver, "cuLaunchKernel_ptsz") ? "same" : "other");
    get("cuMemAlloc", &found, 12000, 0, &status);
    say("asked/cuMemAlloc", found);
    get("cuEventRecord", &found, 12000, 0, &status);
    say("asked/cuEventRecord", found);
    get("cuGetProcAddress", &found, 12000, 0, &status);
    printf("itself %s\n", found == (void *)get ? "same" : "other");
    printf("unknown %d", get("cuNoSuchThing", &found, 12000, 0, &status));
    printf(" %d\n", status);

    unsigned long long (*passed)(void) = (unsigned long long (*)(void))dlsym(RTLD_DEFAULT, "nvshare_unknown_entry_points");
    for (int i = 0; i < 3; i++) get("cuFromTheFuture", &found, 12000, 0, &status);
    say("asked/cuFromTheFuture", found);
    get("cuFromNextYear", &found, 12000, 0, &status);
    printf("passed %llu\n", passed());
    return 0;
}
