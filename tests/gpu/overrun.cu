// One kernel that writes an array of ints to its end, or one int beyond: `overrun HOW BYTES SECONDS BEYOND`, where HOW is
// malloc, pitch or async. What compute-sanitizer is to find, or not. The last line says how it ended.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define MUST(call)                                                                             \
    do {                                                                                       \
        cudaError_t result_ = (call);                                                          \
        if (result_ != cudaSuccess) {                                                          \
            printf("{\"failed\": \"%s\", \"with\": \"%s\"}\n", #call, cudaGetErrorName(result_)); \
            exit(3);                                                                           \
        }                                                                                      \
    } while (0)

__global__ void write_ints(int *words, size_t count, int value) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (size_t)blockDim.x)
        words[i] = value;
}

int main(int count, char **arguments) {
    if (count != 5) return 2;
    const char *how = arguments[1];
    size_t bytes = strtoull(arguments[2], nullptr, 10), pitch;
    double seconds = atof(arguments[3]);
    size_t beyond = strtoull(arguments[4], nullptr, 10);
    int *words;
    if (!strcmp(how, "malloc")) MUST(cudaMalloc(&words, bytes));
    else if (!strcmp(how, "pitch")) MUST(cudaMallocPitch((void **)&words, &pitch, bytes, 1));
    else if (!strcmp(how, "async")) MUST(cudaMallocAsync(&words, bytes, cudaStreamPerThread));
    else return 2;
    if (!strcmp(how, "pitch")) bytes = pitch;
    MUST(cudaDeviceSynchronize());
    auto began = std::chrono::steady_clock::now();
    int rounds = 0;
    do {
        write_ints<<<64, 256>>>(words, bytes / sizeof(int), ++rounds);
        MUST(cudaGetLastError());
        MUST(cudaDeviceSynchronize());
        int last;
        MUST(cudaMemcpy(&last, words + bytes / sizeof(int) - 1, sizeof last, cudaMemcpyDeviceToHost));
        if (last != rounds) {
            printf("{\"failed\": \"round %d\", \"with\": \"%d\"}\n", rounds, last);
            return 3;
        }
    } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() < seconds);
    if (beyond) {
        write_ints<<<1, 1>>>(words + bytes / sizeof(int), beyond, 7);
        cudaError_t launched = cudaDeviceSynchronize();
        printf("{\"rounds\": %d, \"beyond\": \"%s\"}\n", rounds, cudaGetErrorName(launched));
        return 0;
    }
    if (!strcmp(how, "async")) MUST(cudaFreeAsync(words, cudaStreamPerThread));
    else MUST(cudaFree(words));
    MUST(cudaDeviceSynchronize());
    printf("{\"rounds\": %d}\n", rounds);
    return 0;
}
