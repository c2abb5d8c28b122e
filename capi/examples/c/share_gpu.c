/*
 * A program in C that shares a GPU: it moves its memory itself, by CUDA's virtual memory management, and takes turns with all other
 * clients of nvshare.
 *
 *   cc -Wall share_gpu.c $(pkg-config --cflags --libs nvshare-client) -lcuda -pthread -o share_gpu
 *   ./share_gpu 64 1        64 MiB, data that begins with 1; works until its standard input ends
 *
 * Its memory is a range of addresses. A granule of it is on the GPU, with physical memory behind its addresses, or its data is in the
 * host's memory. The work lets the granules' data go round: in each step every granule gets what the next one had. So what each must
 * hold in the end is known to the byte.
 *
 * Not to be run with the preloaded library: that would make the process a client twice (set NVSHARE_DISABLE=1 where it is preloaded).
 */
#include "nvshare_client.h"

#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__has_include)
#if __has_include(<cuda.h>)
#include <cuda.h>
#define HAS_CUDA_H
#endif
#endif
#ifndef HAS_CUDA_H
#include "cuda_driver.h"
#endif

#define WORDS (NVSHARE_GRANULE / sizeof(uint64_t))

/* A call in the program's own threads: the program ends if it fails. */
#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        int check_result = (int)(call);                                                                                \
        if (check_result) {                                                                                            \
            fprintf(stderr, "share_gpu: %s: CUDA error %d\n", #call, check_result);                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* A call of nvshare's. */
#define SHARE(call)                                                                                                    \
    do {                                                                                                               \
        nvshare_code share_code = (call);                                                                              \
        if (share_code != NVSHARE_OK) {                                                                                \
            fprintf(stderr, "share_gpu: %s: %s\n", nvshare_code_name(share_code), nvshare_message());                  \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* A call in one of the runtime's functions, which returns an error of its own. */
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        int try_result = (int)(call);                                                                                  \
        if (try_result) {                                                                                              \
            fprintf(stderr, "share_gpu: %s: CUDA error %d\n", #call, try_result);                                      \
            return -try_result;                                                                                        \
        }                                                                                                              \
    } while (0)

struct granule {
    CUmemGenericAllocationHandle handle; /* while it is on the GPU */
    uint64_t *evicted;                   /* its data while it is not; NULL while it is */
};

struct memory {
    CUcontext context;
    CUdeviceptr base;
    uint32_t count;
    struct granule *granules;
};

static CUdeviceptr address(const struct memory *memory, uint32_t at) {
    return memory->base + at * NVSHARE_GRANULE;
}

/* Puts physical memory behind the addresses of a granule for which nvshare has given room, and its data into it. */
static int bring_in(struct memory *memory, uint32_t at, const nvshare_books *books) {
    struct granule *granule = &memory->granules[at];
    CUmemAllocationProp properties;
    CUmemAccessDesc access;
    memset(&properties, 0, sizeof properties);
    memset(&access, 0, sizeof access);
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type = access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    TRY(cuMemCreate(&granule->handle, NVSHARE_GRANULE, &properties, 0));
    TRY(cuMemMap(address(memory, at), NVSHARE_GRANULE, 0, granule->handle, 0));
    TRY(cuMemSetAccess(address(memory, at), NVSHARE_GRANULE, &access, 1));
    TRY(cuMemcpyHtoD(address(memory, at), granule->evicted, NVSHARE_GRANULE));
    free(granule->evicted);
    granule->evicted = NULL;
    nvshare_copied_in(books, NVSHARE_GRANULE, 0);
    return 0;
}

static int fill(void *context, const nvshare_books *books) {
    struct memory *memory = context;
    TRY(cuCtxSetCurrent(memory->context));
    for (uint32_t at = 0; at < memory->count; at++) {
        if (!memory->granules[at].evicted)
            continue;
        if (nvshare_take(books, 1) == NVSHARE_FILL_RECALLED)
            return NVSHARE_FILL_RECALLED;
        TRY(bring_in(memory, at, books));
    }
    return NVSHARE_FILL_COMPLETE;
}

static int prefetch(void *context, const nvshare_books *books) {
    struct memory *memory = context;
    TRY(cuCtxSetCurrent(memory->context));
    for (uint32_t at = 0; at < memory->count; at++) {
        if (!memory->granules[at].evicted)
            continue;
        if (!nvshare_take_ahead(books, 1))
            break;
        TRY(bring_in(memory, at, books));
    }
    return 0;
}

static int evict(void *context, const nvshare_books *books, uint32_t granules) {
    struct memory *memory = context;
    TRY(cuCtxSetCurrent(memory->context));
    for (uint32_t at = 0; at < memory->count && granules > 0; at++) {
        struct granule *granule = &memory->granules[at];
        if (granule->evicted)
            continue;
        uint64_t *data = malloc(NVSHARE_GRANULE);
        if (!data)
            return -2;
        TRY(cuMemcpyDtoH(data, address(memory, at), NVSHARE_GRANULE));
        TRY(cuMemUnmap(address(memory, at), NVSHARE_GRANULE));
        TRY(cuMemRelease(granule->handle));
        granule->evicted = data;
        nvshare_copied_out(books, NVSHARE_GRANULE, 0);
        nvshare_give(books, 1);
        granules--;
    }
    return 0;
}

/* The last call: everything is freed. */
static void release(void *context) {
    struct memory *memory = context;
    cuCtxSetCurrent(memory->context);
    for (uint32_t at = 0; at < memory->count; at++) {
        struct granule *granule = &memory->granules[at];
        if (!granule->evicted) {
            cuMemUnmap(address(memory, at), NVSHARE_GRANULE);
            cuMemRelease(granule->handle);
        }
        free(granule->evicted);
    }
    free(memory->granules);
    cuMemAddressFree(memory->base, memory->count * NVSHARE_GRANULE);
}

/* A word of a granule's first data. */
static uint64_t first(uint64_t seed, uint32_t granule, uint64_t word) {
    return (seed << 40 | (uint64_t)granule << 20 | word) * UINT64_C(0x9E3779B97F4A7C15);
}

static bool input_has_ended(void) {
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    char line[64];
    return poll(&input, 1, 0) > 0 && read(STDIN_FILENO, line, sizeof line) <= 0;
}

/* Every granule gets what the next one had, and the last one what the first one had, by way of the spare one. */
static void step(const struct memory *memory) {
    uint32_t last = memory->count - 1;
    CHECK(cuMemcpyDtoD(address(memory, last), address(memory, 0), NVSHARE_GRANULE));
    for (uint32_t at = 0; at < last; at++)
        CHECK(cuMemcpyDtoD(address(memory, at), address(memory, at + 1), NVSHARE_GRANULE));
    /* The work is done before the pass is given back. */
    CHECK(cuCtxSynchronize());
}

int main(int argc, char **argv) {
    uint32_t count = (uint32_t)((argc > 1 ? strtoul(argv[1], NULL, 10) : 32) * 1024 * 1024 / NVSHARE_GRANULE);
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    if (count < 3) {
        fprintf(stderr, "usage: share_gpu [MIB, 6 or more [SEED]]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);

    /* The context first: what the process has on the GPU when it registers is its context. */
    CUdevice device;
    struct memory memory = {.count = count};
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDevicePrimaryCtxRetain(&memory.context, device));
    CHECK(cuCtxSetCurrent(memory.context));
    CHECK(cuMemAddressReserve(&memory.base, count * NVSHARE_GRANULE, 0, 0, 0));
    memory.granules = calloc(count, sizeof *memory.granules);
    for (uint32_t at = 0; at < count; at++) {
        uint64_t *data = memory.granules[at].evicted = malloc(NVSHARE_GRANULE);
        for (uint64_t word = 0; word < WORDS; word++)
            data[word] = first(seed, at, word);
    }

    nvshare_options options = {.size = sizeof options, .name = "share_gpu"};
    CUuuid uuid;
    CHECK(cuDeviceGetUuid(&uuid, device));
    memcpy(options.gpu, uuid.bytes, sizeof options.gpu);
    nvshare_runtime runtime = {&memory, fill, evict, prefetch, release};
    nvshare_client *client;
    SHARE(nvshare_open(&options, &runtime, &client));
    SHARE(nvshare_grow(client, count, NULL, NULL));
    printf("client\n");

    uint64_t steps = 0;
    bool ended = false;
    while (!ended) {
        nvshare_pass *pass;
        SHARE(nvshare_enter(client, NVSHARE_FOREVER, &pass));
        do {
            step(&memory);
            steps++;
            ended = input_has_ended();
        } while (!ended && !nvshare_should_yield(pass));
        nvshare_leave(pass);
    }

    nvshare_pass *pass;
    SHARE(nvshare_enter(client, NVSHARE_FOREVER, &pass));
    uint64_t *found = malloc(NVSHARE_GRANULE);
    /* The last granule is the spare one. */
    for (uint32_t at = 0; at < count - 1; at++) {
        uint32_t from = (uint32_t)((at + steps) % (count - 1));
        CHECK(cuMemcpyDtoH(found, address(&memory, at), NVSHARE_GRANULE));
        for (uint64_t word = 0; word < WORDS; word++) {
            if (found[word] != first(seed, from, word)) {
                fprintf(stderr, "share_gpu: word %llu of granule %u is wrong after %llu steps\n",
                        (unsigned long long)word, at, (unsigned long long)steps);
                return 1;
            }
        }
    }
    free(found);
    nvshare_leave(pass);
    SHARE(nvshare_close(client));
    CHECK(cuDevicePrimaryCtxRelease(device));
    printf("right after %llu steps\n", (unsigned long long)steps);
    return 0;
}
