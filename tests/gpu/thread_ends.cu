// What CUDA calls say where threads, processes and libraries begin and end: in destructors of thread-locals, of pthread keys
// and of static objects, in exit handlers, and in a constructor under dlopen. Each place is a process of its own, which runs
// as the program was started and once more without nvshare; both must say the same, and end.
//
//     nvcc -std=c++17 -cudart shared -Xcompiler -fPIC -shared -DLIBRARY -o libthread_ends.so tests/gpu/thread_ends.cu
//     nvcc -std=c++17 -cudart shared -Xcompiler -pthread -o thread_ends tests/gpu/thread_ends.cu -lcuda -ldl
//     nvshare run -- ./thread_ends [MiB that the loops use, 1024]
//
// Also with `-cudart static`, and beside a client that takes turns with it. The last line is OK, or FAIL and how many places
// differ.

#include <cuda_runtime.h>
#include <cstdio>
#include <cstdlib>

// Some memory is made, written, read and given back: what each call said.
static void calls(const char *where) {
    unsigned *words = nullptr, word = 0;
    cudaStream_t stream = nullptr;
    int made = cudaMalloc(&words, 8 << 20), streamed = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    int filled = cudaMemsetAsync(words, 7, 8 << 20, stream), waited = cudaStreamSynchronize(stream);
    int copied = cudaMemcpy(&word, words + 1000, 4, cudaMemcpyDeviceToHost);
    int destroyed = cudaStreamDestroy(stream), freed = cudaFree(words);
    std::printf("%s: malloc %d, stream %d, fill %d, wait %d, copy %d (%x), destroy %d, free %d\n", where, made, streamed,
                filled, waited, copied, word, destroyed, freed);
    std::fflush(stdout);
}

#ifdef LIBRARY

static struct Constructed {
    Constructed() { calls("constructor under dlopen"); }
} constructed;

#else

#include <atomic>
#include <chrono>
#include <cuda.h>
#include <cstring>
#include <dlfcn.h>
#include <pthread.h>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

static size_t loop_words = (size_t(1024) << 20) / 4;

// Gives its memory back when it ends, and makes more.
struct Scratch {
    const char *where = nullptr;
    unsigned *words = nullptr;
    ~Scratch() {
        if (!where) return;
        std::printf("%s: give back %d\n", where, cudaFree(words));
        calls(where);
    }
};

static Scratch static_object;
static thread_local Scratch thread_local_object;

static void make(Scratch &scratch, const char *where) {
    if (cudaMalloc(&scratch.words, 8 << 20) != cudaSuccess) std::printf("%s: no memory\n", where);
    scratch.where = where;
}

static void after_exit() { calls("exit handler from before cuInit"); }
static void before_exit() { calls("exit handler from after cuInit"); }

static pthread_key_t key;
static void at_key(void *round) {
    calls("key");
    if (size_t(round) < 4) pthread_setspecific(key, (void *)(size_t(round) + 1));
}

// Writes and checks memory for three seconds. Beside a client that takes turns with it, the memory moves meanwhile.
static void loop(const char *where) {
    unsigned *words = nullptr;
    int rounds = 0, wrong = 0, said = cudaMalloc(&words, loop_words * 4);
    std::vector<unsigned> copy(loop_words);
    auto end = std::chrono::steady_clock::now() + std::chrono::seconds(3);
    while (!said && std::chrono::steady_clock::now() < end) {
        rounds++;
        said = cudaMemset(words, rounds & 0x7f, loop_words * 4);
        if (!said) said = cudaMemcpy(copy.data(), words, loop_words * 4, cudaMemcpyDeviceToHost);
        for (unsigned word : copy) wrong += word != (rounds & 0x7fu) * 0x01010101u;
    }
    std::printf("%s: said %d, wrong %d, free %d\n", where, said, wrong, cudaFree(words));
}

struct LoopEnd {
    bool wanted = false;
    ~LoopEnd() {
        if (wanted) loop("loop in a thread-local's destructor");
    }
};
static thread_local LoopEnd loop_end;

static std::atomic<bool> launched{false};
static void launches() {
    unsigned *words;
    if (cudaMalloc(&words, 64 << 20)) return;
    while (cudaMemsetAsync(words, 1, 64 << 20) == cudaSuccess && cudaStreamSynchronize(nullptr) == cudaSuccess)
        launched = true;
}

static std::vector<std::thread> joined;
static void join() {
    for (auto &thread : joined) thread.join();
    std::printf("threads that launched have ended\n");
}

static void init() {
    if (cudaFree(nullptr) != cudaSuccess) std::printf("no CUDA\n");
}

static int place(const std::string &where) {
    if (where == "thread-local") {
        std::thread([] {
            thread_local_object.where = nullptr; // It comes into being here, before CUDA.
            make(thread_local_object, "thread-local");
        }).join();
        std::thread([] {
            init();
            make(thread_local_object, "thread-local from after CUDA");
        }).join();
    } else if (where == "first-thread-local") {
        thread_local_object.where = nullptr;
        make(thread_local_object, "thread-local of the first thread");
    } else if (where == "key") {
        init();
        pthread_key_create(&key, at_key);
        std::thread([] {
            init();
            pthread_setspecific(key, (void *)1);
        }).join();
    } else if (where == "static") {
        make(static_object, "static object");
    } else if (where == "exit") {
        atexit(after_exit);
        init();
        atexit(before_exit);
    } else if (where == "quick_exit") {
        init();
        at_quick_exit(before_exit);
        quick_exit(0);
    } else if (where == "pthread_exit") {
        init();
        pthread_t first = pthread_self();
        std::thread([first] {
            pthread_join(first, nullptr);
            calls("another thread");
            exit(0); // The driver's own threads would keep the process.
        }).detach();
        pthread_exit(nullptr);
    } else if (where == "loop") {
        std::thread([] {
            loop_end.wanted = true;
            init();
        }).join();
    } else if (where == "launching" || where == "joined") {
        if (where == "joined") atexit(join);
        init();
        for (int i = 0; i < 8; i++) {
            if (where == "joined") joined.emplace_back(launches);
            else std::thread(launches).detach();
        }
        while (!launched) std::this_thread::yield();
    } else if (where == "constructor") {
        std::string own(4096, 0);
        own.resize(readlink("/proc/self/exe", own.data(), own.size()));
        std::string library = own.substr(0, own.rfind('/')) + "/libthread_ends.so";
        void *opened = dlopen(library.c_str(), RTLD_NOW);
        std::printf("constructor: %s\n", opened ? "opened" : dlerror());
        calls("after the constructor");
    }
    return 0;
}

// What the program says in that place, within 60 s.
static std::string said(const char *program, const std::string &where, const std::string &size, bool natively) {
    std::string command = natively ? "env -u LD_PRELOAD " : "env ";
    command += "timeout 60 '" + std::string(program) + "' --place " + where + " " + size + " 2>&1; echo \"ends with $?\"";
    FILE *output = popen(command.c_str(), "r");
    std::string text;
    char line[512];
    while (output && fgets(line, sizeof line, output)) {
        // The log's lines are nvshare's.
        if (std::strncmp(line, "nvshare[", 8)) text += line;
    }
    if (output) pclose(output);
    return text;
}

int main(int argc, char **argv) {
    if (argc > 3 && !std::strcmp(argv[1], "--place")) {
        loop_words = (size_t(atol(argv[3])) << 20) / 4;
        return place(argv[2]);
    }
    std::string size = argc > 1 ? argv[1] : "1024";
    int differ = 0;
    for (const char *where : {"thread-local", "first-thread-local", "key", "static", "exit", "quick_exit", "pthread_exit", "loop",
                              "launching", "joined", "constructor"}) {
        std::string natively = said(argv[0], where, size, true), here = said(argv[0], where, size, false);
        std::printf("--- %s%s\n%s", where, natively == here ? "" : ", natively", natively.c_str());
        if (natively != here) {
            std::printf("--- %s, here\n%s", where, here.c_str());
            differ++;
        }
    }
    if (differ) std::printf("FAIL %d places differ\n", differ);
    else std::printf("OK\n");
    return differ != 0;
}

#endif
