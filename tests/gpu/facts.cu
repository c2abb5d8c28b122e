// What the driver does that the design leans on and no manual says. One JSON object a line.
//
//     nvcc -O2 -o facts tests/gpu/facts.cu -lcuda && ./facts
#include <cuda.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static const char *name_of(CUresult result) {
    const char *name = "?";
    cuGetErrorName(result, &name);
    return name;
}

#define MUST(call)                                                                      \
    do {                                                                                \
        CUresult result_ = (call);                                                      \
        if (result_ != CUDA_SUCCESS) {                                                  \
            printf("{\"failed\": \"%s\", \"with\": \"%s\"}\n", #call, name_of(result_)); \
            exit(1);                                                                    \
        }                                                                               \
    } while (0)

static const size_t GRANULE = 2u << 20, CHUNK = 64u << 20;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static CUmemAllocationProp prop(bool host, bool exportable) {
    CUmemAllocationProp p = {};
    p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    p.location.type = host ? CU_MEM_LOCATION_TYPE_HOST_NUMA : CU_MEM_LOCATION_TYPE_DEVICE;
    p.location.id = 0;
    p.requestedHandleTypes = exportable ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_NONE;
    return p;
}

static void access(CUdeviceptr at, size_t size) {
    CUmemAccessDesc d = {};
    d.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    d.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    MUST(cuMemSetAccess(at, size, &d, 1));
}

static void back(CUdeviceptr at, size_t size, bool host) {
    CUmemAllocationProp p = prop(host, false);
    CUmemGenericAllocationHandle handle;
    MUST(cuMemCreate(&handle, size, &p, 0));
    MUST(cuMemMap(at, size, 0, handle, 0));
    MUST(cuMemRelease(handle));
}

static void vmm_costs(bool exportable) {
    const int n = 128;
    CUmemAllocationProp p = prop(false, exportable);
    CUdeviceptr base;
    MUST(cuMemAddressReserve(&base, n * CHUNK, 0, 0, 0));
    std::vector<CUmemGenericAllocationHandle> handles(n);
    double t[6];
    for (int round = 0; round < 2; ++round) {
        t[0] = now();
        for (int i = 0; i < n; ++i) MUST(cuMemCreate(&handles[i], CHUNK, &p, 0));
        t[1] = now();
        for (int i = 0; i < n; ++i) MUST(cuMemMap(base + i * CHUNK, CHUNK, 0, handles[i], 0));
        t[2] = now();
        for (int i = 0; i < n; ++i) access(base + i * CHUNK, CHUNK);
        t[3] = now();
        for (int i = 0; i < n; ++i) MUST(cuMemUnmap(base + i * CHUNK, CHUNK));
        t[4] = now();
        for (int i = 0; i < n; ++i) MUST(cuMemRelease(handles[i]));
        t[5] = now();
    }
    MUST(cuMemAddressFree(base, n * CHUNK));
    double gib = n * (double)CHUNK / (1u << 30);
    printf("{\"vmm_ms_per_gib\": {\"exportable\": %s, \"create\": %.3f, \"map\": %.3f, \"access\": %.3f, \"unmap\": %.3f, \"release\": %.3f}}\n",
           exportable ? "true" : "false", (t[1] - t[0]) / gib * 1e3, (t[2] - t[1]) / gib * 1e3,
           (t[3] - t[2]) / gib * 1e3, (t[4] - t[3]) / gib * 1e3, (t[5] - t[4]) / gib * 1e3);
}

__global__ void add(const float4 *x, const float4 *y, float4 *z, size_t n) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < n) {
        float4 a = x[i], b = y[i];
        z[i] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    }
}

// Three arrays of 28,000 x 28,000 floats, of which `host` granules are mapped to host memory: at the end of the array
// `which`, or (scattered) evenly over all three.
static double add_ms(int host, int which, bool scattered) {
    const size_t bytes = 28000ull * 28000 * 4, granules = (bytes + GRANULE - 1) / GRANULE;
    CUdeviceptr array[3];
    int placed = 0;
    for (int a = 0; a < 3; ++a) {
        MUST(cuMemAddressReserve(&array[a], granules * GRANULE, 0, 0, 0));
        size_t begin = 0;
        for (size_t g = 0; g < granules; ++g) {
            bool slow = false;
            if (scattered) {
                size_t all = 3 * granules, at = a * granules + g;
                slow = (at + 1) * host / all != at * host / all;
            } else {
                slow = a == which && g >= granules - host;
            }
            if (slow || g - begin == CHUNK / GRANULE) {
                if (g > begin) back(array[a] + begin * GRANULE, (g - begin) * GRANULE, false);
                begin = g;
            }
            if (slow) {
                back(array[a] + g * GRANULE, GRANULE, true);
                begin = g + 1;
                placed++;
            }
        }
        if (granules > begin) back(array[a] + begin * GRANULE, (granules - begin) * GRANULE, false);
        access(array[a], granules * GRANULE);
        MUST(cuMemsetD8(array[a], 0, granules * GRANULE));
    }
    CUevent from, to;
    MUST(cuEventCreate(&from, 0));
    MUST(cuEventCreate(&to, 0));
    size_t n = bytes / 16;
    auto run = [&](int times) {
        for (int i = 0; i < times; ++i)
            add<<<(unsigned)((n + 255) / 256), 256>>>((float4 *)array[0], (float4 *)array[1], (float4 *)array[2], n);
    };
    run(5);
    MUST(cuEventRecord(from, 0));
    run(40);
    MUST(cuEventRecord(to, 0));
    MUST(cuCtxSynchronize());
    float ms;
    MUST(cuEventElapsedTime(&ms, from, to));
    for (int a = 0; a < 3; ++a) {
        // A range of many mappings at once.
        MUST(cuMemUnmap(array[a], granules * GRANULE));
        MUST(cuMemAddressFree(array[a], granules * GRANULE));
    }
    if (placed != host) printf("{\"failed\": \"placed %d of %d\"}\n", placed, host);
    return ms / 40;
}

static void host_memory() {
    CUmemAllocationProp p = prop(true, false);
    for (size_t size : {GRANULE, CHUNK}) {
        std::vector<CUmemGenericAllocationHandle> handles((1u << 28) / size);
        double begin = now();
        for (auto &handle : handles) MUST(cuMemCreate(&handle, size, &p, 0));
        double made = now();
        for (auto &handle : handles) MUST(cuMemRelease(handle));
        printf("{\"host_numa_create_s_per_gib\": %.3f, \"piece_mib\": %zu}\n", (made - begin) * 4, size >> 20);
    }
    // From a host mapping into the GPU: how memory that has overflowed comes back.
    CUdeviceptr host, gpu;
    MUST(cuMemAddressReserve(&host, CHUNK, 0, 0, 0));
    MUST(cuMemAddressReserve(&gpu, CHUNK, 0, 0, 0));
    back(host, CHUNK, true);
    back(gpu, CHUNK, false);
    access(host, CHUNK);
    access(gpu, CHUNK);
    double begin = now();
    for (int i = 0; i < 10; ++i) MUST(cuMemcpyDtoDAsync(gpu, host, CHUNK, 0));
    MUST(cuCtxSynchronize());
    double there = now();
    for (int i = 0; i < 10; ++i) MUST(cuMemcpyDtoDAsync(host, gpu, CHUNK, 0));
    MUST(cuCtxSynchronize());
    double back_again = now();
    double gib = 10.0 * CHUNK / (1u << 30);
    printf("{\"copy_from_host_mapping_gib_s\": %.1f, \"copy_to_host_mapping_gib_s\": %.1f}\n", gib / (there - begin), gib / (back_again - there));
    MUST(cuMemUnmap(host, CHUNK));
    MUST(cuMemUnmap(gpu, CHUNK));
}

__global__ void count(const uint4 *words, size_t n, unsigned long long *found) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < n && (words[i].x | words[i].y | words[i].z | words[i].w)) atomicAdd(found, 1ull);
}

// Whether memory that was just dirtied and released comes back as zeros: what swap.rs relies on.
static void fresh(bool exportable) {
    const int n = 128;
    CUmemAllocationProp p = prop(false, exportable);
    CUdeviceptr base;
    unsigned long long *found;
    MUST((CUresult)cudaMallocManaged(&found, 8));
    MUST(cuMemAddressReserve(&base, n * CHUNK, 0, 0, 0));
    unsigned long long seen[2];
    for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < n; ++i) {
            CUmemGenericAllocationHandle handle;
            MUST(cuMemCreate(&handle, CHUNK, &p, 0));
            MUST(cuMemMap(base + i * CHUNK, CHUNK, 0, handle, 0));
            MUST(cuMemRelease(handle));
        }
        access(base, n * CHUNK);
        *found = 0;
        size_t pieces = n * CHUNK / 16;
        count<<<(unsigned)((pieces + 255) / 256), 256>>>((const uint4 *)base, pieces, found);
        MUST(cuCtxSynchronize());
        seen[round] = *found;
        MUST(cuMemsetD8(base, 0xab, n * CHUNK));
        MUST(cuCtxSynchronize());
        MUST(cuMemUnmap(base, n * CHUNK));
    }
    MUST(cuMemAddressFree(base, n * CHUNK));
    printf("{\"fresh_memory\": {\"exportable\": %s, \"gib\": 8, \"16_byte_words_not_zero\": [%llu, %llu]}}\n", exportable ? "true" : "false", seen[0], seen[1]);
}

static void two_addresses() {
    CUmemAllocationProp p = prop(false, false);
    CUmemGenericAllocationHandle handle;
    CUdeviceptr a, b;
    MUST(cuMemCreate(&handle, CHUNK, &p, 0));
    MUST(cuMemAddressReserve(&a, CHUNK, 0, 0, 0));
    MUST(cuMemAddressReserve(&b, CHUNK, 0, 0, 0));
    MUST(cuMemMap(a, CHUNK, 0, handle, 0));
    CUresult second = cuMemMap(b, CHUNK, 0, handle, 0);
    CUresult offset = cuMemMap(b, GRANULE, GRANULE, handle, 0);
    CUresult part = cuMemUnmap(a, GRANULE);
    printf("{\"second_mapping\": \"%s\", \"mapping_at_offset\": \"%s\", \"unmap_part\": \"%s\"}\n", name_of(second), name_of(offset), name_of(part));
    access(a, CHUNK);
    CUmemGenericAllocationHandle again;
    CUresult retained = cuMemRetainAllocationHandle(&again, (void *)(a + GRANULE));
    printf("{\"retain\": \"%s\", \"same_handle\": %s}\n", name_of(retained), again == handle ? "true" : "false");
    MUST(cuMemUnmap(a, CHUNK));
    if (second == CUDA_SUCCESS) MUST(cuMemUnmap(b, CHUNK));
    MUST(cuMemRelease(handle));
}

static void captures() {
    CUdeviceptr out, in;
    MUST(cuMemAddressReserve(&out, CHUNK, 0, 0, 0));
    MUST(cuMemAddressReserve(&in, CHUNK, 0, 0, 0));
    back(in, CHUNK, false);
    access(in, CHUNK);
    CUstream stream;
    MUST(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    MUST(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_RELAXED));
    add<<<1, 32, 0, (cudaStream_t)stream>>>((float4 *)out, (float4 *)out, (float4 *)out, 32);
    CUresult kernel = (CUresult)cudaGetLastError();
    CUresult memset = cuMemsetD8Async(out, 0, 4096, stream);
    CUresult copy = cuMemcpyDtoDAsync(out, in, 4096, stream);
    CUstreamCaptureStatus status;
    MUST(cuStreamIsCapturing(stream, &status));
    CUgraph graph = nullptr;
    CUresult end = cuStreamEndCapture(stream, &graph);
    printf("{\"captured_while_unmapped\": {\"kernel\": \"%s\", \"memset\": \"%s\", \"copy\": \"%s\", \"end\": \"%s\"}}\n", name_of(kernel), name_of(memset), name_of(copy), name_of(end));
    MUST(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_RELAXED));
    add<<<1, 32, 0, (cudaStream_t)stream>>>((float4 *)out, (float4 *)out, (float4 *)out, 32);
    MUST(cuStreamEndCapture(stream, &graph));
    CUgraphExec exec;
    CUresult made = cuGraphInstantiate(&exec, graph, 0);
    back(out, CHUNK, false);
    access(out, CHUNK);
    CUresult launched = cuGraphLaunch(exec, stream), done = cuStreamSynchronize(stream);
    printf("{\"instantiated_while_unmapped\": \"%s\", \"launched_after\": \"%s\", \"done\": \"%s\"}\n", name_of(made), name_of(launched), name_of(done));
    // An event recorded in another stream while this one captures, and one in the legacy stream.
    CUevent event;
    CUstream other;
    MUST(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    MUST(cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
    for (unsigned flags : {CU_STREAM_NON_BLOCKING, CU_STREAM_DEFAULT}) {
        CUstream capturing;
        MUST(cuStreamCreate(&capturing, flags));
        MUST(cuStreamBeginCapture(capturing, CU_STREAM_CAPTURE_MODE_RELAXED));
        CUresult in_other = cuEventRecord(event, other);
        CUresult in_legacy = cuEventRecord(event, CU_STREAM_LEGACY);
        CUresult ended = cuStreamEndCapture(capturing, &graph);
        printf("{\"event_while_capturing\": {\"captures_in\": \"%s\", \"other_stream\": \"%s\", \"legacy\": \"%s\", \"end\": \"%s\"}}\n",
               flags ? "non-blocking" : "blocking", name_of(in_other), name_of(in_legacy), name_of(ended));
    }
    MUST(cuMemUnmap(out, CHUNK));
    MUST(cuMemUnmap(in, CHUNK));
}

static void shared_memory_in_nvml(const char *self) {
    CUmemAllocationProp p = prop(false, true);
    CUmemGenericAllocationHandle handle;
    MUST(cuMemCreate(&handle, 4ull << 30, &p, 0));
    int fd;
    MUST(cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    fflush(stdout);
    // fd is inherited: CUDA's file descriptors are not close-on-exec unless told so.
    int passed = dup(fd);
    std::string command = std::string(self) + " import " + std::to_string(passed);
    if (system(command.c_str())) printf("{\"failed\": \"import\"}\n");
    close(passed);
    close(fd);
    MUST(cuMemRelease(handle));
}

static int import_and_look(int fd) {
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at;
    CUresult imported = cuMemImportFromShareableHandle(&handle, (void *)(uintptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    printf("{\"imported\": \"%s\", \"pids\": {\"importer\": %d, \"exporter\": %d}}\n", name_of(imported), getpid(), getppid());
    MUST(cuMemAddressReserve(&at, 4ull << 30, 0, 0, 0));
    MUST(cuMemMap(at, 4ull << 30, 0, handle, 0));
    access(at, 4ull << 30);
    fflush(stdout);
    return system("nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader | sed 's/^/nvml: /'");
}

static void full_gpu(const char *self) {
    CUmemAllocationProp p = prop(false, false);
    std::vector<CUmemGenericAllocationHandle> handles;
    for (size_t size : {CHUNK, GRANULE}) {
        CUmemGenericAllocationHandle handle;
        while (cuMemCreate(&handle, size, &p, 0) == CUDA_SUCCESS) handles.push_back(handle);
    }
    size_t free, total;
    MUST(cuMemGetInfo(&free, &total));
    printf("{\"full_gpu_free_mib\": %zu}\n", free >> 20);
    fflush(stdout);
    std::string command = std::string(self) + " context";
    if (system(command.c_str())) printf("{\"context_on_a_full_gpu\": \"failed\"}\n");
    CUmodule module;
    const char *ptx = ".version 6.0\n.target sm_50\n.address_size 64\n.global .align 16 .b8 big[67108864];\n.visible .entry k() { ret; }\n";
    CUresult loaded = cuModuleLoadData(&module, ptx);
    CUstream stream;
    CUresult made = cuStreamCreate(&stream, 0);
    CUdeviceptr pointer;
    CUresult managed = cuMemAllocManaged(&pointer, CHUNK, CU_MEM_ATTACH_GLOBAL);
    CUresult touched = managed == CUDA_SUCCESS ? cuMemsetD8(pointer, 1, CHUNK) : managed;
    if (touched == CUDA_SUCCESS) touched = cuCtxSynchronize();
    printf("{\"on_a_full_gpu\": {\"module_of_64_mib\": \"%s\", \"stream\": \"%s\", \"managed\": \"%s\", \"touched\": \"%s\"}}\n", name_of(loaded), name_of(made), name_of(managed), name_of(touched));
    for (int i = 0; i < 16 && !handles.empty(); ++i) {
        // 64 MiB chunks are the first: leave about 1 GiB.
        MUST(cuMemRelease(handles.front()));
        handles.erase(handles.begin());
    }
    fflush(stdout);
    if (system(command.c_str())) printf("{\"context_with_1_gib_free\": \"failed\"}\n");
    for (auto handle : handles) MUST(cuMemRelease(handle));
}

int main(int count, char **arguments) {
    MUST(cuInit(0));
    CUdevice device;
    MUST(cuDeviceGet(&device, 0));
    CUcontext context;
    CUresult made = cuDevicePrimaryCtxRetain(&context, device);
    if (count > 1 && !strcmp(arguments[1], "context")) {
        printf("{\"context\": \"%s\"}\n", name_of(made));
        return made != CUDA_SUCCESS;
    }
    MUST(made);
    MUST(cuCtxSetCurrent(context));
    if (count > 2) return import_and_look(atoi(arguments[2]));
    char text[96];
    int numa = -9, fds = -9;
    MUST(cuDeviceGetName(text, sizeof text, device));
    MUST(cuDeviceGetAttribute(&numa, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, device));
    MUST(cuDeviceGetAttribute(&fds, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device));
    printf("{\"gpu\": \"%s\", \"host_numa_id\": %d, \"posix_fds\": %d}\n", text, numa, fds);
    vmm_costs(false);
    vmm_costs(true);
    fresh(false);
    fresh(true);
    two_addresses();
    host_memory();
    captures();
    double native = add_ms(0, 0, false);
    printf("{\"add_ms\": %.3f}\n", native);
    for (int which = 0; which < 3; which += 2)
        printf("{\"add_ms_72_mib_in_host\": %.3f, \"array\": %d, \"together\": true, \"times\": %.2f}\n", add_ms(36, which, false), which, add_ms(36, which, false) / native);
    double spread = add_ms(36, 0, true);
    printf("{\"add_ms_72_mib_in_host\": %.3f, \"scattered\": true, \"times\": %.2f}\n", spread, spread / native);
    double more = add_ms(72, 0, true);
    printf("{\"add_ms_144_mib_in_host\": %.3f, \"scattered\": true, \"times\": %.2f}\n", more, more / native);
    fflush(stdout);
    shared_memory_in_nvml(arguments[0]);
    full_gpu(arguments[0]);
    return 0;
}
