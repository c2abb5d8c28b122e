/*
 * nvshare's client API: a process takes part in sharing a GPU with a runtime of its own.
 *
 * docs/embedding.md in the repository tells how a client behaves. In short: nvshare_open() registers and starts a thread; that thread
 * calls the runtime's functions to move memory in and out; the program's threads call nvshare_enter() before they use the GPU and
 * nvshare_leave() when their work is done.
 *
 * Every function may be called from every thread, except where it says something else. Functions that can fail return NVSHARE_OK or an
 * error, and nvshare_message() has a sentence for the person who reads the log.
 *
 * This file is made by cbindgen from the crate nvshare-capi.
 */

#ifndef NVSHARE_CLIENT_H
#define NVSHARE_CLIENT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

// Bytes in a granule, the unit of GPU memory.
#define NVSHARE_GRANULE 2097152ull

// The version of this interface. It grows by one when functions or members are added; what there is stays.
#define NVSHARE_CLIENT_API 1

// The time that does not come, for `nvshare_enter`.
#define NVSHARE_FOREVER UINT64_MAX

// What `fill` returns when all memory is in place, and `nvshare_take` when it has the granules.
#define NVSHARE_FILL_COMPLETE 0

// What `nvshare_take` returns when the client stopped being admitted; `fill` then returns it, too.
#define NVSHARE_FILL_RECALLED 1

// How a call ended.
enum nvshare_code
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // Done.
    NVSHARE_OK = 0,
    // An argument makes no sense.
    NVSHARE_ERROR_INVALID_ARGUMENT = 1,
    // No arbiter answers.
    NVSHARE_ERROR_NO_ARBITER = 2,
    // The arbiter refused: it does not serve the GPU, all slots are taken, or its release does not fit.
    NVSHARE_ERROR_REFUSED = 3,
    // What answers is no arbiter that this process believes, or not of this release.
    NVSHARE_ERROR_STRANGER = 4,
    // One of the runtime's functions failed; the client has ended.
    NVSHARE_ERROR_RUNTIME = 5,
    // The client was closed.
    NVSHARE_ERROR_CLOSED = 6,
    // This process was forked from the one that has the client.
    NVSHARE_ERROR_FORKED = 7,
    // The GPU did not come in time.
    NVSHARE_ERROR_TIMED_OUT = 8,
    // The client could never have so much memory.
    NVSHARE_ERROR_TOO_LARGE = 9,
    // The system refused something, such as a thread.
    NVSHARE_ERROR_SYSTEM = 10,
    // A fault of the library's.
    NVSHARE_ERROR_PANIC = 11,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum nvshare_code nvshare_code;
#else
typedef int32_t nvshare_code;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What the client has: its granules.
typedef struct nvshare_books nvshare_books;

// A client: one process on one GPU.
typedef struct nvshare_client nvshare_client;

// The right to use the GPU: all of the client's memory is in place until it is given back.
typedef struct nvshare_pass nvshare_pass;

// How a process becomes a client. All zero but `size` and `gpu` is a good choice.
typedef struct nvshare_options {
    // sizeof(nvshare_options): a later version of this interface may have more members.
    size_t size;
    // The GPU's UUID, as cuDeviceGetUuid gives it.
    uint8_t gpu[16];
    // What `nvshare status` calls the client, in UTF-8, up to 48 bytes; NULL: the program's name.
    const char *name;
    // The arbiter's directory; NULL: where every client looks for it (NVSHARE_RUNTIME_DIR, /run/nvshare and so on).
    const char *runtime_dir;
    // How long an arbiter that is starting is waited for, ns; 0: 10 s.
    uint64_t connect_timeout_ns;
    // Its share of GPU time against others', 1 to 1000; 0: 100, the usual one.
    uint32_t weight;
    // How soon its turn comes: -1 low, 0 normal, 1 high.
    int32_t priority;
} nvshare_options;

// The program's functions that move its memory. They are called in one thread of the library's, one at a time, and never while
// somebody has a pass, but for `fill` after `nvshare_grow`. Each returns 0, or an error of the program's own below 0, which ends the
// client. They must not throw, and must not call `nvshare_enter`, `nvshare_grow` or `nvshare_close`.
typedef struct nvshare_runtime {
    // Given to each of them.
    void *context;
    // Brings in all memory that is not on the GPU. Takes granules with `nvshare_take` before it maps memory, chunk by chunk, and
    // returns NVSHARE_FILL_RECALLED as soon as that does; else NVSHARE_FILL_COMPLETE.
    int32_t (*fill)(void *context, const struct nvshare_books *books);
    // Moves out at least `granules`, and gives each chunk back with `nvshare_give` as soon as it is unmapped.
    int32_t (*evict)(void *context, const struct nvshare_books *books, uint32_t granules);
    // Brings in memory that fits into free granules while others run: takes granules with `nvshare_take_ahead`, and ends when that
    // returns false. May be NULL.
    int32_t (*prefetch)(void *context, const struct nvshare_books *books);
    // Frees all memory, before the client leaves. The last call, and the only one after an error. May be NULL.
    void (*release)(void *context);
} nvshare_runtime;

// How much memory there is for a client, in bytes. The total is the sum of the others.
typedef struct nvshare_memory {
    // The pool, or the client's memory limit if that is less.
    uint64_t total;
    // What the client can still have on the GPU.
    uint64_t free;
    // What its memory and its context have.
    uint64_t own;
    // What others have that cannot move.
    uint64_t others;
} nvshare_memory;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of this interface that the library has: NVSHARE_CLIENT_API when it was built.
uint32_t nvshare_client_api(void);

// Registers with the arbiter, and starts the thread that walks the client through its phases and calls the runtime. Make the CUDA
// context before: what the process has on the GPU when it registers counts as its context.
//
// # Safety
// `options` and `runtime` point to what they say, for the time of this call; `client` is where the client goes. What the runtime
// points to is there until `nvshare_close` has returned, and may be used by another thread.
nvshare_code nvshare_open(const struct nvshare_options *options,
                          const struct nvshare_runtime *runtime,
                          struct nvshare_client **client);

// Waits until the GPU is this client's and all its memory is in place, for at most `timeout_ns` (NVSHARE_FOREVER: however long).
// Several threads may have a pass at a time. Give it back with `nvshare_leave` after the work is done; do not wait for a thread that
// is about to enter while you have one.
//
// # Safety
// `client` comes from `nvshare_open` and is not closed; `pass` is where the pass goes.
nvshare_code nvshare_enter(struct nvshare_client *client,
                           uint64_t timeout_ns,
                           struct nvshare_pass **pass);

// Whether to give the pass back soon, because somebody else waits and this client's slice is over. Costs one load; ask between two
// pieces of work. True for NULL.
//
// # Safety
// `pass` is NULL, or comes from `nvshare_enter` and was not given back.
bool nvshare_should_yield(const struct nvshare_pass *pass);

// Gives a pass back. The caller has waited for the work that it has submitted: the memory may move as soon as this is called.
// Does nothing with NULL.
//
// # Safety
// `pass` is NULL, or comes from `nvshare_enter` and was not given back.
void nvshare_leave(struct nvshare_pass *pass);

// Raises the client's demand by `granules`. Then calls `add(argument)`, which puts the memory where the runtime's `fill` finds it and
// calls no function of this library; it is not called if the memory is refused. The memory is in place from the next pass on; passes
// that are out should be given back soon. `add` may be NULL for memory that `fill` knows of already.
//
// # Safety
// `client` comes from `nvshare_open` and is not closed; `add` is a function or NULL.
nvshare_code nvshare_grow(struct nvshare_client *client,
                          uint32_t granules,
                          void (*add)(void *argument),
                          void *argument);

// Lowers the client's demand by `granules`, which the caller has freed and, as far as they were on the GPU, given back
// (`nvshare_give`).
//
// # Safety
// `client` comes from `nvshare_open` and is not closed.
nvshare_code nvshare_shrink(struct nvshare_client *client,
                            uint32_t granules);

// How much memory there is for this client.
//
// # Safety
// `client` comes from `nvshare_open` and is not closed; `info` is where the figures go.
nvshare_code nvshare_memory_info(const struct nvshare_client *client, struct nvshare_memory *info);

// The client's books, as the runtime's functions get them: for `nvshare_give` when memory is freed. They end with the client. NULL for
// NULL.
//
// # Safety
// `client` is NULL, or comes from `nvshare_open` and is not closed.
const struct nvshare_books *nvshare_books_of(const struct nvshare_client *client);

// Ends the client: waits until the last pass is back, calls the runtime's `release` and leaves. NVSHARE_OK, or why the client had ended
// before. The handle is gone in any case, also in a forked child.
//
// # Safety
// `client` is NULL, or comes from `nvshare_open` and is not closed, and no other thread uses it any more. Not to be called from one of
// the runtime's functions.
nvshare_code nvshare_close(struct nvshare_client *client);

// Takes `granules`, waiting until the pool has them. NVSHARE_FILL_RECALLED if the client stopped being admitted; nothing was taken
// then. For `fill`.
//
// # Safety
// `books` is what `fill` was called with.
int32_t nvshare_take(const struct nvshare_books *books,
                     uint32_t granules);

// How many granules the client may bring in ahead of its turn at this moment.
//
// # Safety
// `books` is what `prefetch` was called with.
uint32_t nvshare_ahead(const struct nvshare_books *books);

// Takes `granules` if the client is the first waiter and nobody else needs them now; false if not. For `prefetch`.
//
// # Safety
// `books` is what `prefetch` was called with.
bool nvshare_take_ahead(const struct nvshare_books *books,
                        uint32_t granules);

// Gives `granules` back, whose memory was unmapped and released. From every thread.
//
// # Safety
// `books` comes from the library, and its client is not closed.
void nvshare_give(const struct nvshare_books *books, uint32_t granules);

// Counts `bytes` that were copied to the GPU, for `nvshare status` and for the measured bandwidth of the link. `took_ns` is how long the
// copy took by the GPU's clock, or 0 if that is not known. For `fill` and `prefetch`.
//
// # Safety
// `books` is what the runtime's function was called with.
void nvshare_copied_in(const struct nvshare_books *books,
                       uint64_t bytes,
                       uint64_t took_ns);

// As nvshare_copied_in, of bytes that were copied to the host. For `evict`.
//
// # Safety
// `books` is what the runtime's function was called with.
void nvshare_copied_out(const struct nvshare_books *books, uint64_t bytes, uint64_t took_ns);

// What this thread's last failed call said: a sentence for a person, in UTF-8. Empty if none has failed. It stays until the thread's
// next failed call, or its end.
const char *nvshare_message(void);

// The name of a code, such as "NVSHARE_OK"; of every number that is none, "NVSHARE_UNKNOWN". It stays for ever.
const char *nvshare_code_name(int32_t code);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* NVSHARE_CLIENT_H */
