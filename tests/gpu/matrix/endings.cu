// Ends that come in the middle: threads whose thread-locals give memory back in their destructors, cudaDeviceReset with work
// in flight, and a second holder of the primary context that lets go of it after a reset.

#include "common.cuh"

#include <atomic>
#include <cuda.h>
#include <thread>

constexpr Word WORDS = 8 << 20;

static std::atomic<Word> given_back{0}, refused{0};

struct Scratch {
    Word *words = nullptr;
    ~Scratch() {
        if (!words) return;
        if (cudaFree(words) == cudaSuccess) given_back++;
        else refused++;
    }
};
// It comes into being before the thread's first CUDA call, and so it ends after what CUDA keeps for the thread.
static thread_local Scratch scratch;

static Word first_word(const Word *words) {
    Word word = 0;
    CALL(cudaMemcpy(&word, words, 8, cudaMemcpyDeviceToHost));
    return word;
}

static void use_scratch(Word seed, Word *found) {
    scratch.words = nullptr;
    CALL(cudaMalloc(&scratch.words, WORDS * 8));
    write_words<<<256, 256>>>(scratch.words, WORDS, seed);
    CALL(cudaGetLastError());
    *found = first_word(scratch.words);
}

static void threads(Digest &digest) {
    Word found[8] = {};
    std::vector<std::thread> all;
    for (Word at = 0; at < 8; at++) all.emplace_back(use_scratch, at, &found[at]);
    for (auto &thread : all) thread.join();
    CHECK(refused == 0, std::to_string(refused) + " cudaFree in destructors of thread-locals were refused");
    for (Word word : found) digest.add(word);
}

static Word holders(CUdevice device) {
    using State = CUresult (*)(CUdevice, unsigned *, int *);
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
    CALL(cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 12000, cudaEnableDefault, &result));
    unsigned flags = 0;
    int active = 0;
    CHECK(((State)found)(device, &flags, &active) == CUDA_SUCCESS, "cuDevicePrimaryCtxGetState");
    return active;
}

// Whatever a life has made goes with the reset: no call of it may be needed afterwards.
static void life(Digest &digest, bool held_by_another) {
    using Retain = CUresult (*)(CUcontext *, CUdevice);
    using Release = CUresult (*)(CUdevice);
    void *retain = nullptr, *release = nullptr;
    cudaDriverEntryPointQueryResult result;
    CALL(cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxRetain", &retain, 12000, cudaEnableDefault, &result));
    CALL(cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxRelease", &release, 12000, cudaEnableDefault, &result));
    CUcontext context;
    if (held_by_another) CHECK(((Retain)retain)(&context, 0) == CUDA_SUCCESS, "cuDevicePrimaryCtxRetain");
    {
        Ballast ballast(512);
        void *pinned;
        CALL(cudaMallocHost(&pinned, 16 << 20));
        // So long that a competitor has its turn within it.
        auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(2500);
        do ballast.turn();
        while (std::chrono::steady_clock::now() < until);
        // In flight at the reset.
        mix<<<1024, 256, 0, ballast.stream>>>(ballast.words, ballast.count, 1);
        CALL(cudaDeviceReset());
    }
    Ballast again(256);
    again.turn();
    if (held_by_another) {
        CHECK(((Release)release)(0) == CUDA_SUCCESS, "cuDevicePrimaryCtxRelease after a reset");
        digest.add(holders(0));
        again.turn();
    }
    threads(digest);
    again.turn();
    CALL(cudaDeviceReset());
}

int main(int count, char **arguments) {
    double seconds = 8;
    for (int at = 1; at + 1 < count; at++)
        if (!std::strcmp(arguments[at], "--seconds")) seconds = std::atof(arguments[at + 1]);
    auto began = std::chrono::steady_clock::now();
    auto since = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(); };
    Word first = 0, rounds = 0;
    for (; rounds < 2 || since() < seconds; rounds++) {
        Digest digest;
        life(digest, false);
        life(digest, true);
        if (rounds == 0) first = digest.value;
        CHECK(digest.value == first, "round " + std::to_string(rounds) + " gave another digest than the first");
    }
    std::printf("{\"ok\": true, \"digest\": \"%016llx\", \"framework\": \"resets and ends of threads\", \"figures\": {\"rounds\": %llu}}\n",
                first, rounds);
    std::fflush(stdout);
    return 0;
}
