/*
 * Allocates while kernels in eight streams run for a second, says "busy", and at a line on standard input maps and unmaps memory of its own:
 * `looked_at MIB`. Whoever looks at the memory meanwhile (to see what would have to be moved) must be done with it in the end.
 */
#include "more_driver.h"

int main(int argc, char **argv) {
    size_t bytes = (argc > 1 ? strtoul(argv[1], NULL, 10) : 40) << 20, piece = 2 << 20;
    CUmemAllocationProp properties = {1, 0, {1, 0}, NULL, {0}};
    CUmemAccessDesc rights = {{1, 0}, 3};
    CUmemGenericAllocationHandle object;
    CUcontext context;
    CUdeviceptr memory, more, view;
    CUmodule module;
    CUfunction spin;
    CUstream streams[8];
    char line[16];
    CHECK(cuInit(0));
    CHECK(cuCtxCreate_v2(&context, 0, 0));
    CHECK(cuModuleLoadData(&module, MODULE));
    CHECK(cuModuleGetFunction(&spin, module, "nvshare_spin"));
    for (int i = 0; i < 8; i++) CHECK(cuStreamCreate(&streams[i], CU_STREAM_NON_BLOCKING));
    CHECK(cuMemAlloc_v2(&memory, bytes));
    write_words(memory, bytes, 7);
    SAY("ready");
    if (!fgets(line, sizeof line, stdin)) return 0;
    for (int i = 0; i < 8; i++) CHECK(launch(spin, streams[i], 125000000, 0, 0));
    CHECK(cuMemAlloc_v2(&more, piece));
    SAY("busy");
    if (!fgets(line, sizeof line, stdin)) return 0;
    CHECK(cuMemCreate(&object, piece, &properties, 0));
    CHECK(cuMemAddressReserve(&view, piece, 0, 0, 0));
    CHECK(cuMemMap(view, piece, 0, object, 0));
    CHECK(cuMemSetAccess(view, piece, &rights, 1));
    write_words(view, piece, 8);
    CHECK(cuMemUnmap(view, piece));
    CHECK(cuMemRelease(object));
    check_words(memory, bytes, 7);
    SAY("done");
    return 0;
}
