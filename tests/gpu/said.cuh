// What the programs share that say what the driver does, a line "fact" each: an error ends the program with a last line
// "FAIL line N: why".
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>

[[noreturn]] inline void fail(int line, const std::string &why) {
    printf("FAIL line %d: %s\n", line, why.c_str());
    fflush(stdout);
    _Exit(1);
}

inline std::string name(CUresult result) {
    const char *text = nullptr;
    return cuGetErrorName(result, &text) == CUDA_SUCCESS ? text : std::to_string(int(result));
}

#define MUST(right, why)                                                                                               \
    do {                                                                                                               \
        if (!(right)) fail(__LINE__, why);                                                                             \
    } while (0)
#define DRIVER(call)                                                                                                   \
    do {                                                                                                               \
        CUresult said_ = (call);                                                                                       \
        MUST(said_ == CUDA_SUCCESS, std::string(#call) + " said " + name(said_));                                      \
    } while (0)
#define RUNTIME(call)                                                                                                  \
    do {                                                                                                               \
        cudaError_t said_ = (call);                                                                                    \
        MUST(said_ == cudaSuccess, std::string(#call) + " said " + cudaGetErrorName(said_));                           \
    } while (0)
#define FACT(call) (printf("fact: %s: %s\n", #call, name(call).c_str()), fflush(stdout))
