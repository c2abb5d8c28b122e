// What the C++ programs of the matrix share: errors that end the program with a sentence, a digest, kernels on
// integers whose results the CPU knows, and rounds that must all give the same.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using Word = unsigned long long;

inline void fail(const char *file, int line, const std::string &what) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
    std::fflush(stderr);
    // Other threads may be waiting for the GPU: no destructors.
    std::_Exit(1);
}

#define CHECK(right, what)                                                                                             \
    do {                                                                                                               \
        if (!(right)) fail(__FILE__, __LINE__, what);                                                                  \
    } while (0)

#define CALL(call)                                                                                                     \
    do {                                                                                                               \
        cudaError_t said = (call);                                                                                     \
        CHECK(said == cudaSuccess, std::string(#call) + " said " + cudaGetErrorName(said));                            \
    } while (0)

// FNV-1a, of 64 bits.
struct Digest {
    Word value = 14695981039346656037ull;
    void add(Word word) {
        for (int byte = 0; byte < 8; byte++) value = (value ^ (word >> (8 * byte) & 255)) * 1099511628211ull;
    }
};

constexpr Word GOLDEN = 0x9E3779B97F4A7C15ull;

__host__ __device__ inline Word mixed(Word word, Word seed) {
    word = (word ^ (word >> 29)) * GOLDEN + seed;
    return word << 13 | word >> 51;
}

// words[i] = mixed(i, seed)
__global__ void write_words(Word *words, Word count, Word seed) {
    for (Word i = blockIdx.x * Word(blockDim.x) + threadIdx.x; i < count; i += Word(gridDim.x) * blockDim.x)
        words[i] = mixed(i, seed);
}

// words[i] = mixed(words[i], seed)
__global__ void mix(Word *words, Word count, Word seed) {
    for (Word i = blockIdx.x * Word(blockDim.x) + threadIdx.x; i < count; i += Word(gridDim.x) * blockDim.x)
        words[i] = mixed(words[i], seed);
}

// *wrong += how many words are not what write_words, and then one mix for each further seed, made of them
__global__ void compare(const Word *words, Word count, Word first, Word next, Word mixes, Word *wrong) {
    for (Word i = blockIdx.x * Word(blockDim.x) + threadIdx.x; i < count; i += Word(gridDim.x) * blockDim.x) {
        Word word = mixed(i, first);
        for (Word turn = 0; turn < mixes; turn++) word = mixed(word, next + turn);
        if (words[i] != word) atomicAdd(wrong, 1ull);
    }
}

// The sum of what `write_words` and the mixes make of so many words, on the CPU.
inline Word expected_sum(Word count, Word first, Word next, Word mixes) {
    Word sum = 0;
    for (Word i = 0; i < count; i++) {
        Word word = mixed(i, first);
        for (Word turn = 0; turn < mixes; turn++) word = mixed(word, next + turn);
        sum += word;
    }
    return sum;
}

// Plain memory that must keep what was written into it.
struct Ballast {
    Word *words = nullptr, *wrong = nullptr;
    Word count, seed = 1;
    cudaStream_t stream;

    explicit Ballast(size_t mib) : count((mib << 20) / 8) {
        CALL(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CALL(cudaMalloc(&words, count * 8));
        CALL(cudaMalloc(&wrong, 8));
        write_words<<<1024, 256, 0, stream>>>(words, count, seed);
        CALL(cudaGetLastError());
    }

    // Checks every word, then writes others.
    void turn() {
        Word found = 0;
        CALL(cudaMemsetAsync(wrong, 0, 8, stream));
        compare<<<1024, 256, 0, stream>>>(words, count, seed, 0, 0, wrong);
        CALL(cudaGetLastError());
        CALL(cudaMemcpyAsync(&found, wrong, 8, cudaMemcpyDeviceToHost, stream));
        CALL(cudaStreamSynchronize(stream));
        CHECK(found == 0, std::to_string(found) + " words of the ballast are wrong in turn " + std::to_string(seed));
        write_words<<<1024, 256, 0, stream>>>(words, count, ++seed);
        CALL(cudaGetLastError());
        CALL(cudaStreamSynchronize(stream));
    }
};

// Does `work` for --seconds; prints the line of JSON that tells its digest.
template <typename Work> int same_each_time(int count, char **arguments, const char *name, Work work) {
    double seconds = 8;
    for (int at = 1; at + 1 < count; at++)
        if (!std::strcmp(arguments[at], "--seconds")) seconds = std::atof(arguments[at + 1]);
    Ballast ballast(512);
    auto began = std::chrono::steady_clock::now();
    auto since = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(); };
    Word first = 0, rounds = 0;
    while (rounds < 2 || since() < seconds) {
        Digest digest;
        work(digest);
        ballast.turn();
        if (rounds == 0) first = digest.value;
        CHECK(digest.value == first, "round " + std::to_string(rounds) + " gave another digest than the first");
        rounds++;
    }
    int runtime = 0, driver = 0;
    CALL(cudaRuntimeGetVersion(&runtime));
    CALL(cudaDriverGetVersion(&driver));
    std::printf("{\"ok\": true, \"digest\": \"%016llx\", \"framework\": \"%s, CUDA runtime %d.%d, driver API %d.%d\", "
                "\"figures\": {\"rounds\": %llu}}\n",
                first, name, runtime / 1000, runtime % 1000 / 10, driver / 1000, driver % 1000 / 10, rounds);
    std::fflush(stdout);
    return 0;
}
