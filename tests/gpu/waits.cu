// Which calls of the driver wait until a running kernel ends, and which keep another thread's copies out meanwhile. A
// kernel may wait for a copy or a launch that its process makes later. Whoever makes such a call beside it then stops both.
//
//     nvcc -O2 -std=c++17 -o waits tests/gpu/waits.cu -lcuda && ./waits FILE.ptx ... ; CUDA_MODULE_LOADING=EAGER ./waits FILE.ptx ...
//
// For each call: a kernel runs until it is told to end, and it is told when the call has returned, but after 300 ms at the latest; another thread copies
// 4 bytes every millisecond in a stream of its own. One line for each call: how long it took, us; whether it returned
// before the kernel was told to end; and the longest of the copies meanwhile, us.

#include "timed.cuh"
#include <atomic>
#include <cstdlib>
#include <functional>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <vector>

constexpr size_t MIB = 1 << 20;
constexpr double PATIENCE = 0.3;

// Runs until *end is set, or for three seconds.
__global__ void stay(volatile int *begun, volatile int *end) {
    unsigned long long first, at;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(first));
    *begun = 1;
    __threadfence_system();
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(at));
    } while (!*end && at - first < 3000000000ull);
}

static CUcontext context;
static CUstream running, copying;
static volatile int *flags;
static int *place_there;

// Tells for one call what it does beside a kernel that stays.
static void beside(const std::string &what, const std::function<void()> &call) {
    flags[0] = flags[1] = 0;
    int *there;
    CHECK(cuMemHostGetDevicePointer((CUdeviceptr *)&there, (void *)flags, 0));
    stay<<<1, 1, 0, (cudaStream_t)running>>>(there, there + 1);
    while (!flags[0]) std::this_thread::yield();
    std::atomic<bool> over{false}, told{false};
    double longest = 0;
    std::thread teller([&] {
        double until = now() + PATIENCE;
        while (!over && now() < until) std::this_thread::sleep_for(std::chrono::microseconds(200));
        told = !over;
        flags[1] = 1;
    });
    std::thread copier([&] {
        CHECK(cuCtxSetCurrent(context));
        while (!over) {
            double began = now();
            int value = 1;
            CHECK(cuMemcpyHtoDAsync((CUdeviceptr)place_there, &value, sizeof value, copying));
            CHECK(cuStreamSynchronize(copying));
            double took = now() - began;
            if (took > longest) longest = took;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    double began = now();
    call();
    double took = now() - began;
    bool waited = told;
    over = true;
    teller.join();
    copier.join();
    CHECK(cuStreamSynchronize(running));
    printf("%-58s %9.0f us  %-7s  longest copy beside it %9.0f us\n", what.c_str(), took * 1e6, waited ? "WAITED" : "at once", longest * 1e6);
    fflush(stdout);
}

static std::vector<char> read_all(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(1);
    }
    std::vector<char> text(1 << 20);
    text.resize(fread(text.data(), 1, text.size() - 1, file));
    text.push_back(0);
    fclose(file);
    return text;
}

int main(int count, char **arguments) {
    CHECK(cuInit(0));
    CUdevice device;
    CHECK(cuDeviceGet(&device, 0));
    char name[100];
    CHECK(cuDeviceGetName(name, sizeof name, device));
    const char *loading = getenv("CUDA_MODULE_LOADING");
    printf("%s, CUDA_MODULE_LOADING=%s\n", name, loading ? loading : "(unset)");
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuStreamCreate(&running, CU_STREAM_NON_BLOCKING));
    CHECK(cuStreamCreate(&copying, CU_STREAM_NON_BLOCKING));
    CHECK(cuMemHostAlloc((void **)&flags, 4096, CU_MEMHOSTALLOC_DEVICEMAP));
    CHECK(cuMemAlloc((CUdeviceptr *)&place_there, 4096));
    // The runtime loads the kernel at its first launch.
    flags[0] = 0, flags[1] = 1;
    int *there;
    CHECK(cuMemHostGetDevicePointer((CUdeviceptr *)&there, (void *)flags, 0));
    stay<<<1, 1, 0, (cudaStream_t)running>>>(there, there + 1);
    CHECK(cuStreamSynchronize(running));

    beside("nothing", [] {});
    for (int at = 1; at < count; at++) {
        std::string which = arguments[at];
        which = which.substr(which.rfind('/') + 1);
        std::vector<char> text = read_all(arguments[at]);
        bool is_text = which.size() > 4 && which.substr(which.size() - 4) == ".ptx";
        std::vector<char> code = text;
        CUmodule module;
        CUfunction function;
        if (is_text) {
            CUlinkState link;
            void *made;
            size_t size;
            beside(which + ": cuLinkCreate", [&] { CHECK(cuLinkCreate(0, nullptr, nullptr, &link)); });
            beside(which + ": cuLinkAddData", [&] { CHECK(cuLinkAddData(link, CU_JIT_INPUT_PTX, text.data(), text.size(), "a", 0, nullptr, nullptr)); });
            beside(which + ": cuLinkComplete", [&] { CHECK(cuLinkComplete(link, &made, &size)); });
            code.assign((char *)made, (char *)made + size);
            beside(which + ": cuLinkDestroy", [&] { CHECK(cuLinkDestroy(link)); });
            beside(which + ": cuModuleLoadData of the text", [&] { CHECK(cuModuleLoadData(&module, text.data())); });
            beside(which + ": cuModuleUnload", [&] { CHECK(cuModuleUnload(module)); });
        }
        beside(which + ": cuModuleLoadData of compiled code", [&] { CHECK(cuModuleLoadData(&module, code.data())); });
        unsigned functions = 0;
        CHECK(cuModuleGetFunctionCount(&functions, module));
        std::vector<CUfunction> all(functions);
        CHECK(cuModuleEnumerateFunctions(all.data(), functions, module));
        const char *kernel;
        CHECK(cuFuncGetName(&kernel, all[0]));
        beside(which + ": cuModuleGetFunction", [&] { CHECK(cuModuleGetFunction(&function, module, kernel)); });
        beside(which + ": cuFuncLoad", [&] { CHECK(cuFuncLoad(function)); });
        beside(which + ": cuFuncLoad again", [&] { CHECK(cuFuncLoad(function)); });
        beside(which + ": cuModuleUnload", [&] { CHECK(cuModuleUnload(module)); });
        CUlibrary library;
        CUkernel of_library;
        beside(which + ": cuLibraryLoadData of compiled code", [&] { CHECK(cuLibraryLoadData(&library, code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0)); });
        beside(which + ": cuLibraryGetKernel", [&] { CHECK(cuLibraryGetKernel(&of_library, library, kernel)); });
        beside(which + ": cuKernelGetFunction", [&] { CHECK(cuKernelGetFunction(&function, of_library)); });
        beside(which + ": cuLibraryUnload", [&] { CHECK(cuLibraryUnload(library)); });
    }

    CUstream stream;
    CUevent event;
    void *host;
    CUdeviceptr memory;
    beside("cuStreamCreate", [&] { CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING)); });
    beside("cuEventCreate", [&] { CHECK(cuEventCreate(&event, CU_EVENT_BLOCKING_SYNC)); });
    beside("cuEventRecord, cuEventSynchronize", [&] { CHECK(cuEventRecord(event, stream)); CHECK(cuEventSynchronize(event)); });
    beside("cuEventDestroy", [&] { CHECK(cuEventDestroy(event)); });
    beside("cuStreamDestroy", [&] { CHECK(cuStreamDestroy(stream)); });
    beside("cuMemHostAlloc, 4 KiB", [&] { CHECK(cuMemHostAlloc(&host, 4096, 0)); });
    beside("cuMemFreeHost, 4 KiB", [&] { CHECK(cuMemFreeHost(host)); });
    beside("cuMemHostAlloc, 256 MiB", [&] { CHECK(cuMemHostAlloc(&host, 256 * MIB, 0)); });
    beside("cuMemFreeHost, 256 MiB", [&] { CHECK(cuMemFreeHost(host)); });
    host = mmap(nullptr, 256 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    beside("cuMemHostRegister, 256 MiB", [&] { CHECK(cuMemHostRegister(host, 256 * MIB, 0)); });
    beside("cuMemHostUnregister, 256 MiB", [&] { CHECK(cuMemHostUnregister(host)); });
    beside("cuMemAlloc, 64 MiB", [&] { CHECK(cuMemAlloc(&memory, 64 * MIB)); });
    beside("cuMemFree, 64 MiB", [&] { CHECK(cuMemFree(memory)); });
    CUmemAllocationProp kind{};
    kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    kind.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUmemAccessDesc access{kind.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemGenericAllocationHandle handle, imported;
    int descriptor;
    beside("cuMemAddressReserve, 64 MiB", [&] { CHECK(cuMemAddressReserve(&memory, 64 * MIB, 0, 0, 0)); });
    beside("cuMemCreate, 64 MiB", [&] { CHECK(cuMemCreate(&handle, 64 * MIB, &kind, 0)); });
    beside("cuMemMap, 64 MiB", [&] { CHECK(cuMemMap(memory, 64 * MIB, 0, handle, 0)); });
    beside("cuMemSetAccess, 64 MiB", [&] { CHECK(cuMemSetAccess(memory, 64 * MIB, &access, 1)); });
    beside("cuMemExportToShareableHandle", [&] { CHECK(cuMemExportToShareableHandle(&descriptor, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0)); });
    beside("cuMemImportFromShareableHandle", [&] { CHECK(cuMemImportFromShareableHandle(&imported, (void *)(long)descriptor, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)); });
    beside("cuMemRelease of the imported", [&] { CHECK(cuMemRelease(imported)); });
    beside("cuMemUnmap, 64 MiB", [&] { CHECK(cuMemUnmap(memory, 64 * MIB)); });
    beside("cuMemRelease, 64 MiB", [&] { CHECK(cuMemRelease(handle)); });
    beside("cuMemAddressFree", [&] { CHECK(cuMemAddressFree(memory, 64 * MIB)); });
    size_t free_bytes, total;
    beside("cuMemGetInfo", [&] { CHECK(cuMemGetInfo(&free_bytes, &total)); });
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    beside("cuThreadExchangeStreamCaptureMode", [&] { CHECK(cuThreadExchangeStreamCaptureMode(&mode)); });
    beside("cuCtxGetCurrent, cuCtxSetCurrent", [&] { CHECK(cuCtxSetCurrent(context)); });
    return 0;
}
