// Many threads that launch at once, each on a stream of another kind: blocking, non-blocking, with priority, the
// legacy default stream, the thread's own default stream, and one that two threads share. Their memory comes and goes
// meanwhile. Built with the runtime as a library and linked in, and with the per-thread default stream as `0`.

#include "common.cuh"

#include <atomic>
#include <mutex>
#include <thread>

constexpr int THREADS = 12;
constexpr Word WORDS = 1 << 20;
constexpr Word MIXES = 40;

// Two threads' launches on one stream: each has memory of its own, so any order gives the same.
static cudaStream_t shared_stream;

static cudaStream_t stream_of(int kind) {
    cudaStream_t stream = nullptr;
    int least = 0, greatest = 0;
    switch (kind % 6) {
    case 0: CALL(cudaStreamCreate(&stream)); return stream;
    case 1: CALL(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); return stream;
    case 2:
        CALL(cudaDeviceGetStreamPriorityRange(&least, &greatest));
        CALL(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
        return stream;
    case 3: return cudaStreamLegacy;
    case 4: return cudaStreamPerThread;
    default: return shared_stream;
    }
}

static void end_stream(int kind, cudaStream_t stream) {
    if (kind % 6 < 3) CALL(cudaStreamDestroy(stream));
}

static void CUDART_CB count_call(void *counter) { static_cast<std::atomic<int> *>(counter)->fetch_add(1); }

// Writes, mixes, and compares; a host function and an event in between. Returns the sum of the words.
static Word launch_all(int thread, std::atomic<int> &calls) {
    cudaStream_t stream = stream_of(thread);
    Word *words = nullptr, *wrong = nullptr, *host = nullptr;
    CALL(cudaMalloc(&words, WORDS * 8));
    CALL(cudaMalloc(&wrong, 8));
    CALL(cudaMallocHost(&host, WORDS * 8));
    Word seed = 1000 + thread;
    CALL(cudaMemsetAsync(wrong, 0, 8, stream));
    write_words<<<256, 256, 0, stream>>>(words, WORDS, seed);
    cudaEvent_t half;
    CALL(cudaEventCreateWithFlags(&half, cudaEventDisableTiming));
    for (Word turn = 0; turn < MIXES; turn++) {
        mix<<<256, 256, 0, stream>>>(words, WORDS, turn);
        if (turn == MIXES / 2) {
            CALL(cudaEventRecord(half, stream));
            CALL(cudaLaunchHostFunc(stream, count_call, &calls));
            // Memory that comes and goes while kernels run; freeing waits for the device.
            void *passing = nullptr;
            CALL(cudaMalloc(&passing, (4 + thread) << 20));
            CALL(cudaMemsetAsync(passing, thread, (4 + thread) << 20, stream));
            CALL(cudaFree(passing));
        }
    }
    CALL(cudaGetLastError());
    compare<<<256, 256, 0, stream>>>(words, WORDS, seed, 0, MIXES, wrong);
    CALL(cudaGetLastError());
    CALL(cudaMemcpyAsync(host, words, WORDS * 8, cudaMemcpyDeviceToHost, stream));
    Word found = 1;
    CALL(cudaMemcpyAsync(&found, wrong, 8, cudaMemcpyDeviceToHost, stream));
    CALL(cudaEventSynchronize(half));
    CALL(cudaStreamSynchronize(stream));
    CHECK(found == 0, "thread " + std::to_string(thread) + " has " + std::to_string(found) + " wrong words");
    Word sum = 0;
    for (Word i = 0; i < WORDS; i++) sum += host[i];
    CALL(cudaEventDestroy(half));
    CALL(cudaFreeHost(host));
    CALL(cudaFree(wrong));
    CALL(cudaFree(words));
    end_stream(thread, stream);
    return sum;
}

// A launch without a stream: the legacy default stream, or the thread's own, as the program was built.
static Word launch_on_default(int thread) {
    Word *words = nullptr, sum = 0;
    std::vector<Word> host(WORDS / 4);
    CALL(cudaMalloc(&words, host.size() * 8));
    write_words<<<256, 256>>>(words, host.size(), 7 + thread);
    mix<<<256, 256>>>(words, host.size(), 3);
    CALL(cudaGetLastError());
    CALL(cudaMemcpy(host.data(), words, host.size() * 8, cudaMemcpyDeviceToHost));
    for (Word word : host) sum += word;
    CALL(cudaFree(words));
    CHECK(sum == expected_sum(host.size(), 7 + thread, 3, 1), "the default stream of thread " + std::to_string(thread));
    return sum;
}

int main(int count, char **arguments) {
    CALL(cudaStreamCreateWithFlags(&shared_stream, cudaStreamNonBlocking));
    std::vector<Word> expected(THREADS);
    for (int thread = 0; thread < THREADS; thread++) expected[thread] = expected_sum(WORDS, 1000 + thread, 0, MIXES);
    return same_each_time(count, arguments, "12 threads", [&](Digest &digest) {
        std::vector<std::thread> threads;
        std::vector<Word> sums(THREADS), others(THREADS);
        std::atomic<int> calls{0};
        for (int thread = 0; thread < THREADS; thread++)
            threads.emplace_back([&, thread] {
                CALL(cudaSetDevice(0));
                sums[thread] = launch_all(thread, calls);
                others[thread] = launch_on_default(thread);
            });
        for (std::thread &thread : threads) thread.join();
        CHECK(calls == THREADS, std::to_string(calls) + " host functions were called");
        for (int thread = 0; thread < THREADS; thread++) {
            CHECK(sums[thread] == expected[thread], "thread " + std::to_string(thread) + " has a wrong sum");
            digest.add(sums[thread]);
            digest.add(others[thread]);
        }
        CALL(cudaDeviceSynchronize());
    });
}
