// Work on the GPU that goes on only when another thread, or a later call, lets it: a host function that takes the lock of
// a thread that launches; a kernel that stays until copies have brought it all; a stream that waits for a value which is
// written after other calls. None of them ends while its process stands still, so none can be waited for before memory
// moves.

#include "common.cuh"

#include <atomic>
#include <cuda.h>
#include <mutex>
#include <thread>

constexpr Word WORDS = 1 << 20;

static std::mutex book;
static std::atomic<Word> noted{0};

static void CUDART_CB note(void *) {
    std::lock_guard<std::mutex> hold(book);
    noted++;
}

// Adds what arrives in `box`, a word at a time: `turn` says which one is there, and `taken` that it was read.
__global__ void receive(volatile Word *box, volatile Word *turn, volatile Word *taken, Word count, Word *sum) {
    Word all = 0;
    for (Word at = 1; at <= count; at++) {
        while (*turn < at) {}
        __threadfence_system();
        all += *box;
        *taken = at;
    }
    *sum = all;
}

static cudaStream_t stream() {
    cudaStream_t made;
    CALL(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    return made;
}

// The launching thread holds the lock that the host function wants.
static Word by_lock(Word *words, cudaStream_t notes, cudaStream_t work) {
    Word before = noted;
    for (Word round = 0; round < 8; round++) {
        {
            std::lock_guard<std::mutex> hold(book);
            CALL(cudaLaunchHostFunc(notes, note, nullptr));
            for (Word at = 0; at < 20; at++) {
                mix<<<64, 256, 0, work>>>(words, WORDS, round * 20 + at);
                CALL(cudaGetLastError());
                std::this_thread::sleep_for(std::chrono::microseconds(500));
            }
        }
        CALL(cudaStreamSynchronize(work));
        CALL(cudaStreamSynchronize(notes));
    }
    return noted - before;
}

// A kernel stays on the GPU, and every copy that feeds it is a call of its own.
static Word by_copies(Word *places, Word *taken, cudaStream_t resident, cudaStream_t copies) {
    constexpr Word COUNT = 64;
    Word *box = places, *turn = places + 1, *sum = places + 2;
    CALL(cudaMemsetAsync(places, 0, 3 * 8, resident));
    CALL(cudaStreamSynchronize(resident));
    *(volatile Word *)taken = 0;
    Word *taken_there;
    CALL(cudaHostGetDevicePointer((void **)&taken_there, taken, 0));
    receive<<<1, 1, 0, resident>>>(box, turn, taken_there, COUNT, sum);
    CALL(cudaGetLastError());
    Word found = 0;
    for (Word at = 1; at <= COUNT; at++) {
        Word value = mixed(at, 5);
        CALL(cudaMemcpyAsync(box, &value, 8, cudaMemcpyHostToDevice, copies));
        CALL(cudaMemcpyAsync(turn, &at, 8, cudaMemcpyHostToDevice, copies));
        CALL(cudaStreamSynchronize(copies));
        while (*(volatile Word *)taken < at) std::this_thread::yield();
    }
    CALL(cudaStreamSynchronize(resident));
    CALL(cudaMemcpyAsync(&found, sum, 8, cudaMemcpyDeviceToHost, copies));
    CALL(cudaStreamSynchronize(copies));
    Word expected = 0;
    for (Word at = 1; at <= COUNT; at++) expected += mixed(at, 5);
    CHECK(found == expected, "the resident kernel has received other words than were sent");
    return found;
}

template <typename Function> static Function of_driver(const char *name) {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
    CALL(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
    CHECK(result == cudaDriverEntryPointSuccess && found, std::string("the driver has no ") + name);
    return (Function)found;
}

// A stream waits for a value; the call that writes it comes after others.
static Word by_value(Word *words, Word *place, cudaStream_t waiting, cudaStream_t work) {
    static auto wait = of_driver<CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned)>("cuStreamWaitValue32");
    static auto write = of_driver<CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned)>("cuStreamWriteValue32");
    CALL(cudaMemsetAsync(place, 0, 8, work));
    write_words<<<64, 256, 0, work>>>(words, WORDS, 3);
    CALL(cudaStreamSynchronize(work));
    for (unsigned at = 1; at <= 8; at++) {
        CHECK(wait(waiting, (CUdeviceptr)place, at, CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS, "cuStreamWaitValue32");
        mix<<<64, 256, 0, waiting>>>(words, WORDS, at);
        CALL(cudaGetLastError());
        // Between the wait and the write are calls of other kinds, and time.
        for (int call = 0; call < 20; call++) {
            cudaEvent_t event;
            CALL(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
            CALL(cudaEventRecord(event, work));
            CALL(cudaEventSynchronize(event));
            CALL(cudaEventDestroy(event));
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        CHECK(write(work, (CUdeviceptr)place, at, 0) == CUDA_SUCCESS, "cuStreamWriteValue32");
        CALL(cudaStreamSynchronize(waiting));
    }
    Word first = 0;
    CALL(cudaMemcpyAsync(&first, words, 8, cudaMemcpyDeviceToHost, work));
    CALL(cudaStreamSynchronize(work));
    return first;
}

int main(int count, char **arguments) {
    cudaStream_t one = stream(), other = stream();
    Word *words, *places, *taken;
    CALL(cudaMalloc(&words, WORDS * 8));
    CALL(cudaMalloc(&places, 4096));
    CALL(cudaHostAlloc((void **)&taken, 8, cudaHostAllocMapped));
    return same_each_time(count, arguments, "entangled work", [&](Digest &digest) {
        digest.add(by_lock(words, one, other));
        digest.add(by_copies(places, taken, one, other));
        digest.add(by_value(words, places + 64, one, other));
    });
}
