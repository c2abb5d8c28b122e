/*
 * Random driver calls from a seed: `random_calls SEED STEPS`. Each step says which call it made, how that ended and what
 * it read, without an address or a time, so natively and under nvshare the lines must be the same.
 *
 * Three threads take steps, always one at a time, as the seed says. A step depends on the seed and its number alone, and
 * on what is there when its turn comes: FUZZ_ONLY=3,17 leaves all other steps out and these as they are, so that a long failure
 * can be made a short one.
 *
 * Memory that one side refuses and the other gives would be a difference that means nothing. Under nvshare (FUZZ_POOL says
 * how large the pool is) the refused allocations are written to FUZZ_REFUSED, and the native run, with FUZZ_REPLAY, takes
 * them as refused. A refusal of what certainly has room is a failure.
 */
#include "more_driver.h"
#include <stdarg.h>

#define MIB ((size_t)1 << 20)
#define GRANULE (2 * MIB)
#define THREADS 3
#define CONTEXTS 3
#define STREAMS (4 + THREADS) /* of a context: the null stream, three made ones, and each thread's own */
#define BUFFERS 12
#define OBJECTS 5
#define RANGES 3
#define SLOTS 4
#define GRAPHS 3
#define EVENTS 4
#define STAGING (6 * MIB)

enum { PLAIN, ORDERED, POOLED, PITCH, UNIFIED, MAPPED, KINDS };
static const char *const KIND[KINDS] = {"plain", "ordered", "pooled", "pitched", "managed", "mapped"};

typedef struct {
    CUcontext context;
    int number;
} Place;

typedef struct {
    int alive, blocking, capturing, mode;
    CUstream handle;
} Stream;

typedef struct {
    int alive, defined, kind, context, stream, graphs;
    int owner;    /* the context that it was made in, and goes with; `context` and `stream` are those of its last use */
    int recorded; /* a node of a graph allocates it, when the graph is launched */
    CUdeviceptr address;
    size_t bytes;
} Buffer;

typedef struct {
    int alive, context;
    CUmodule module;
    CUcontext handle;
    CUfunction fill, iota, mix, spin, checksum;
    CUmemoryPool pool;
    Stream streams[STREAMS];
    CUevent events[EVENTS];
    int recorded[EVENTS];
} Context;

typedef struct {
    int alive, references, mappings, defined;
    CUmemGenericAllocationHandle handle;
    size_t bytes;
} Object;

typedef struct {
    CUdeviceptr address;
    int object[SLOTS], first[SLOTS], rights[SLOTS]; /* object: -1 is none; first: whether its mapping begins here */
} Range;

typedef struct {
    int alive, context, buffers[2];
    CUgraphExec executable;
} Graph;

static Context contexts[CONTEXTS];
static Buffer buffers[BUFFERS];
static Object objects[OBJECTS];
static Range ranges[RANGES];
static Graph graphs[GRAPHS];
static int mapped_stream = -1; /* who last used mapped memory: context * STREAMS + stream */
static CUgraph open_graph_buffers;
static int current[THREADS];
static Dice dice;
static int step, thread, allocations;
/* The main thread gives everything back: no thread's own stream is its own. */
static int finishing;
static size_t demand, limit = 40 * MIB, pool;
static unsigned char *pageable, *pinned;
/* What host functions were given, by the stream that they were in: context * STREAMS + stream. */
static int host_calls[CONTEXTS * STREAMS];
static FILE *refused_file;
static int replay_count, replay[4096];
static const char *without = "";

/* ---- lines ---- */

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("%4d.%d ", step, thread);
    vprintf(format, arguments);
    putchar('\n');
    va_end(arguments);
}

static int choose(int count) { return (int)below(&dice, count); }

static uint64_t digest(const void *data, size_t bytes) {
    uint64_t sum = bytes;
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        uint64_t word;
        memcpy(&word, (const char *)data + i, 8);
        sum = (sum ^ word) * GOLDEN;
        sum ^= sum >> 29;
    }
    for (size_t i = bytes & ~(size_t)7; i < bytes; i++) sum = (sum ^ ((const unsigned char *)data)[i]) * GOLDEN;
    return sum;
}

/* ---- memory that is refused ---- */

static size_t rounded(size_t bytes) { return (bytes + GRANULE - 1) / GRANULE * GRANULE; }

/* Whether the native run takes the next allocation as refused. */
static int is_replayed(void) {
    for (int i = 0; i < replay_count; i++)
        if (replay[i] == step * 8 + allocations) return 1;
    return 0;
}

static CUresult allocated(CUresult result, size_t bytes) {
    if (result == CUDA_ERROR_OUT_OF_MEMORY && refused_file) {
        /* Contexts of this program and of the competitor; each pool of stream-ordered memory grows by 32 MiB. */
        size_t slack = 16 * MIB + 32 * MIB * (1 + (contexts[0].pool != NULL) + (contexts[1].pool != NULL) + (contexts[2].pool != NULL));
        if (pool && demand + rounded(bytes) + slack <= pool) {
            say("REFUSED though %zu bytes of %zu are in use and %zu are asked for", demand, pool, bytes);
            fflush(stdout);
            _exit(4);
        }
        fprintf(refused_file, "%d\n", step * 8 + allocations);
        fflush(refused_file);
    }
    allocations++;
    return result;
}
#define TAKE(bytes, call) allocated(is_replayed() ? CUDA_ERROR_OUT_OF_MEMORY : (call), bytes)

/* ---- streams and what uses them ---- */

static Context *here(void) { return &contexts[current[thread]]; }

static int captures(void) {
    int count = 0;
    for (int c = 0; c < CONTEXTS; c++)
        for (int s = 0; s < STREAMS; s++) count += contexts[c].alive && contexts[c].streams[s].capturing;
    return count;
}

/* A stream of the current context, and this thread's own among the threads' own. */
static int some_stream(void) {
    int s = choose(5);
    if (s == 4) return 4 + thread;
    return here()->streams[s].alive ? s : 0;
}

static CUstream handle(int s) { return here()->streams[s].handle; }

/* Waits for all that was submitted to a stream. 0 if that cannot be done while somebody captures, who may be one that this
   program takes for ended: a capture can only be ended by the thread that began it. */
static int wait_for(int context, int s) {
    if (captures()) return 0;
    if (context != current[thread]) cuCtxSetCurrent(contexts[context].handle);
    int is_reachable = s < 4 || (s == 4 + thread && !finishing);
    CUresult result = is_reachable ? cuStreamSynchronize(contexts[context].streams[s].handle) : cuCtxSynchronize();
    if (context != current[thread]) cuCtxSetCurrent(here()->handle);
    if (result) say("wait for stream %d of %d -> %d", s, context, result);
    return result < CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED || result > CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
}

/* Has the next use of a buffer be on this stream. 0 if it cannot be. */
static int use(Buffer *b, int s) {
    if (b->kind == MAPPED) {
        int wanted = current[thread] * STREAMS + s;
        if (mapped_stream >= 0 && mapped_stream != wanted && !wait_for(mapped_stream / STREAMS, mapped_stream % STREAMS)) return 0;
        mapped_stream = wanted;
        return 1;
    }
    if (b->context == current[thread] && b->stream == s) return 1;
    if (!wait_for(b->context, b->stream)) return 0;
    b->context = current[thread];
    b->stream = s;
    return 1;
}

/* Has nobody use it any more. */
static int settle(Buffer *b) {
    if (b->kind != MAPPED) return wait_for(b->context, b->stream);
    int done = mapped_stream < 0 || wait_for(mapped_stream / STREAMS, mapped_stream % STREAMS);
    if (done) mapped_stream = -1;
    return done;
}

static Buffer mapped_buffer[4];
static int next_mapped;

/* Mapped memory, as if it were a buffer: some whole objects that lie beside each other. */
static Buffer *some_mapped(int rights) {
    Range *r = &ranges[choose(RANGES)];
    int from = choose(SLOTS), to = from;
    if (!r->address) return NULL;
    while (to < SLOTS && r->object[to] >= 0 && r->rights[to] >= rights && objects[r->object[to]].defined) to++;
    if (to == from) return NULL;
    Buffer *b = &mapped_buffer[next_mapped++ % 4];
    memset(b, 0, sizeof *b);
    b->alive = b->defined = 1;
    b->kind = MAPPED;
    b->address = r->address + from * GRANULE;
    b->bytes = (to - from) * GRANULE;
    return b;
}

static Buffer *some_buffer(int rights) {
    if (choose(5) == 0) return some_mapped(rights);
    Buffer *b = &buffers[choose(BUFFERS)];
    return b->alive && b->defined ? b : NULL;
}

static int number_of(const Buffer *b) { return b->kind == MAPPED ? 100 : (int)(b - buffers); }

/* Reads it whole, and says what is in it. */
static void show(Buffer *b, const char *when) {
    if (!b->alive || !b->defined || !settle(b)) return;
    size_t bytes = b->bytes < STAGING ? b->bytes : STAGING;
    CUresult result = cuMemcpyDtoH_v2(pageable, b->address, bytes);
    say("%s: %s %d holds %016llx -> %d", when, KIND[b->kind], number_of(b), result ? 0 : (unsigned long long)digest(pageable, bytes), result);
}

/* ---- allocations ---- */

static size_t some_size(void) {
    switch (choose(6)) {
    case 0: return 1 + choose(600);
    case 1: return 4096 + choose(100000);
    case 2: return GRANULE;
    case 3: return GRANULE + 1 + choose(5000);
    case 4: return 3 * MIB + choose(1 << 20);
    default: return 8 * (1 + (size_t)choose(600000));
    }
}

static void allocate(void) {
    int i = choose(BUFFERS), s = some_stream();
    Buffer *b = &buffers[i];
    if (b->alive) return;
    b->kind = choose(MAPPED);
    b->bytes = some_size();
    if (b->kind == UNIFIED && choose(3)) b->kind = PLAIN;
    if (b->kind == POOLED && !here()->pool) b->kind = ORDERED;
    if (demand + rounded(b->bytes) > limit) return;
    size_t pitch = 0, height = 1 + choose(5);
    unsigned element = 4 << choose(3);
    CUresult result = 0;
    switch (b->kind) {
    case ORDERED: result = TAKE(b->bytes, cuMemAllocAsync(&b->address, b->bytes, handle(s))); break;
    case POOLED: result = TAKE(b->bytes, cuMemAllocFromPoolAsync(&b->address, b->bytes, here()->pool, handle(s))); break;
    case PITCH:
        result = TAKE(b->bytes, cuMemAllocPitch_v2(&b->address, &pitch, b->bytes / height + 1, height, element));
        /* What is refused for want of memory has a pitch too, but the native run may not have made the call. */
        if (result) pitch = 0;
        b->bytes = pitch * height;
        break;
    case UNIFIED: result = TAKE(b->bytes, cuMemAllocManaged(&b->address, b->bytes, 1)); break;
    default: result = TAKE(b->bytes, cuMemAlloc_v2(&b->address, b->bytes));
    }
    say("allocate %s %d, %zu bytes, stream %d of %d -> %d, pitch %zu", KIND[b->kind], i, b->bytes, s, current[thread], result, pitch);
    if (result) return;
    b->alive = 1;
    b->graphs = 0;
    b->owner = b->context = current[thread];
    b->stream = s;
    b->recorded = (b->kind == ORDERED || b->kind == POOLED) && here()->streams[s].capturing;
    b->defined = !here()->streams[s].capturing && cuMemsetD8Async(b->address, i, b->bytes, handle(s)) == 0;
    demand += rounded(b->bytes);
}

static int in_a_capture(const Buffer *b) { return captures() && contexts[b->context].streams[b->stream].capturing; }

static void free_buffer(Buffer *b, int how) {
    if (!b->alive || b->graphs || in_a_capture(b)) return;
    if (choose(2)) show(b, "before free");
    CUresult result;
    int s = b->context == current[thread] && (b->stream < 4 || b->stream == 4 + thread) ? b->stream : -1;
    int ordered = b->kind == ORDERED || b->kind == POOLED;
    if (how == 0 && ordered && s >= 0) {
        result = cuMemFreeAsync(b->address, handle(s));
    } else {
        if (!wait_for(b->context, b->stream)) return;
        result = cuMemFree_v2(b->address);
    }
    say("free %s %d, stream %d -> %d", KIND[b->kind], number_of(b), s, result);
    if (result) return;
    b->alive = 0;
    demand -= rounded(b->bytes);
}

/* ---- what writes and reads ---- */

static void set(void) {
    Buffer *b = some_buffer(3);
    int s = some_stream(), way = choose(8);
    if (!b || !use(b, s)) return;
    size_t from = b->bytes > 64 ? (size_t)choose((int)(b->bytes / 2)) & ~(size_t)7 : 0, bytes = b->bytes - from;
    if (choose(2)) bytes = 1 + choose((int)bytes);
    CUdeviceptr at = b->address + from;
    CUstream stream = handle(s);
    unsigned value = (unsigned)roll(&dice);
    if (way < 3 && !settle(b)) return;
    CUresult result = 0;
    switch (way) {
    case 0: result = cuMemsetD8_v2(at, (unsigned char)value, bytes); break;
    case 1: result = cuMemsetD16_v2(at, (unsigned short)value, bytes / 2); break;
    case 2: result = cuMemsetD32_v2(at, value, bytes / 4); break;
    case 3: result = cuMemsetD8Async(at, (unsigned char)value, bytes, stream); break;
    case 4: result = cuMemsetD16Async(at, (unsigned short)value, bytes / 2, stream); break;
    case 5: result = cuMemsetD2D32Async(at, bytes / 2 / 4 * 4, value, bytes / 4 / 4, 2, stream); break;
    default: result = cuMemsetD32Async(at, value, bytes / 4, stream);
    }
    if (way < 3) cuCtxSynchronize();
    say("set %s %d, way %d, from %zu, %zu bytes, stream %d -> %d", KIND[b->kind], number_of(b), way, from, bytes, s, result);
    if (choose(3) == 0) show(b, "after set");
}

static void copy_in(void) {
    Buffer *b = some_buffer(3);
    int s = some_stream(), way = choose(4);
    if (!b || captures() || !use(b, s)) return;
    size_t bytes = b->bytes < STAGING ? b->bytes : STAGING;
    if (choose(2)) bytes = 1 + choose((int)bytes);
    unsigned char *from = way & 1 ? pinned : pageable;
    uint64_t seed = roll(&dice);
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        uint64_t word = iota_word(i, seed);
        memcpy(from + i, &word, 8);
    }
    CUresult result;
    if (way < 2) {
        result = cuMemcpyHtoDAsync_v2(b->address, from, bytes, handle(s));
        cuStreamSynchronize(handle(s));
    } else {
        settle(b);
        result = way == 2 ? cuMemcpyHtoD_v2(b->address, from, bytes) : cuMemcpy(b->address, (CUdeviceptr)from, bytes);
    }
    say("copy in to %s %d, way %d, %zu bytes, stream %d -> %d", KIND[b->kind], number_of(b), way, bytes, s, result);
}

static void copy_out(void) {
    Buffer *b = some_buffer(1);
    int s = some_stream(), way = choose(4);
    if (!b || captures() || !use(b, s)) return;
    size_t bytes = 1 + choose((int)(b->bytes < STAGING ? b->bytes : STAGING)), from = choose((int)(b->bytes - bytes + 1));
    unsigned char *to = way & 1 ? pinned : pageable;
    CUresult result;
    if (way < 2) {
        result = cuMemcpyDtoHAsync_v2(to, b->address + from, bytes, handle(s));
        result = result ? result : cuStreamSynchronize(handle(s));
    } else {
        settle(b);
        result = way == 2 ? cuMemcpyDtoH_v2(to, b->address + from, bytes) : cuMemcpy((CUdeviceptr)to, b->address + from, bytes);
    }
    say("copy out of %s %d, way %d, %zu bytes from %zu: %016llx -> %d", KIND[b->kind], number_of(b), way, bytes, from,
        result ? 0 : (unsigned long long)digest(to, bytes), result);
}

static int overlap(const Buffer *a, const Buffer *b) { return a->kind == MAPPED && b->kind == MAPPED ? 1 : a == b; }

static void copy_inside(void) {
    Buffer *from = some_buffer(1), *to = some_buffer(3);
    int s = some_stream(), way = choose(5);
    if (!from || !to || overlap(from, to) || !use(from, s) || !use(to, s)) return;
    size_t most = from->bytes < to->bytes ? from->bytes : to->bytes, bytes = 1 + choose((int)most);
    if (way < 2 && (!settle(from) || !settle(to))) return;
    CUDA_MEMCPY2D shape = {.src_type = 2, .src_device = from->address, .dst_type = 2, .dst_device = to->address,
                           .src_pitch = bytes / 2 + 1, .dst_pitch = bytes / 2 + 1, .width = bytes / 2, .height = 1 + (bytes > 4)};
    if (shape.src_pitch * 2 > most) shape.height = 1;
    CUresult result;
    switch (way) {
    case 0: result = cuMemcpyDtoD_v2(to->address, from->address, bytes); cuCtxSynchronize(); break;
    case 1: result = cuMemcpy(to->address, from->address, bytes); cuCtxSynchronize(); break;
    case 2: result = cuMemcpyAsync(to->address, from->address, bytes, handle(s)); break;
    case 3: result = cuMemcpy2DAsync_v2(&shape, handle(s)); break;
    default: result = cuMemcpyDtoDAsync_v2(to->address, from->address, bytes, handle(s));
    }
    say("copy %s %d to %s %d, way %d, %zu bytes, stream %d -> %d", KIND[from->kind], number_of(from), KIND[to->kind], number_of(to), way,
        bytes, s, result);
    if (choose(3) == 0) show(to, "after copy");
}

static void compute(void) {
    Buffer *b = some_buffer(3);
    int s = some_stream(), which = choose(3);
    if (!b || b->bytes < 8 || b->address % 8 || !use(b, s)) return;
    Context *c = here();
    uint64_t words = b->bytes / 8, first = choose((int)words), count = 1 + choose((int)(words - first)), seed = roll(&dice);
    CUfunction function = which == 0 ? c->fill : which == 1 ? c->iota : c->mix;
    if (which == 0) seed = (uint32_t)seed;
    CUresult result = launch(function, handle(s), b->address + first * 8, count, seed);
    say("kernel %d on %s %d, %llu words from %llu, stream %d -> %d", which, KIND[b->kind], number_of(b), (unsigned long long)count,
        (unsigned long long)first, s, result);
    if (choose(4) == 0) show(b, "after kernel");
}

static void array(void) {
    CUDA_ARRAY_DESCRIPTOR description = {16 + choose(3000), choose(4) ? 0 : 4, 0x20, 1};
    size_t bytes = description.width * 4 * (description.height ? 1 : 1);
    CUarray made = NULL;
    if (captures() || demand + GRANULE > limit) return;
    CUresult result = TAKE(bytes * 4, cuArrayCreate_v2(&made, &description));
    say("array of %zu x %zu -> %d", description.width, description.height, result);
    if (result) return;
    if (!description.height) {
        for (size_t i = 0; i < bytes; i++) pageable[i] = (unsigned char)(i * 7 + step);
        CUresult in = cuMemcpyHtoA_v2(made, 0, pageable, bytes);
        memset(pageable, 0, bytes);
        CUresult out = cuMemcpyAtoH_v2(pageable, made, 0, bytes);
        say("array holds %016llx -> %d, %d", (unsigned long long)digest(pageable, bytes), in, out);
        Buffer *b = some_buffer(3);
        if (b && b->bytes >= bytes && settle(b)) {
            in = cuMemcpyAtoD_v2(b->address, made, 0, bytes);
            out = cuMemcpyDtoA_v2(made, 0, b->address, bytes / 2);
            cuCtxSynchronize();
            say("array to %s %d and back -> %d, %d", KIND[b->kind], number_of(b), in, out);
        }
    }
    say("array destroyed -> %d", cuArrayDestroy(made));
}

static void unified(void) {
    Buffer *b = &buffers[choose(BUFFERS)];
    if (!b->alive || !b->defined || b->kind != UNIFIED || !settle(b)) return;
    int way = choose(4);
    CUresult result = 0;
    if (way == 0) result = cuMemPrefetchAsync(b->address, b->bytes, choose(2) ? 0 : -1, NULL);
    if (way == 1) result = cuMemAdvise(b->address, b->bytes, 1 + choose(6), 0);
    cuCtxSynchronize();
    if (way == 3) memset((void *)b->address, step, b->bytes / 2 + 1);
    say("managed %d, way %d: %016llx -> %d", number_of(b), way, way == 2 ? (unsigned long long)digest((void *)b->address, b->bytes) : 0, result);
}

/* ---- memory that the program maps itself ---- */

static void make_object(void) {
    int i = choose(OBJECTS);
    Object *o = &objects[i];
    size_t bytes = GRANULE * (1 + choose(2));
    if (o->alive || demand + bytes > limit) return;
    CUmemAllocationProp properties = {1, choose(4) ? 0 : 1, {1, 0}, NULL, {0}};
    CUresult result = TAKE(bytes, cuMemCreate(&o->handle, bytes, &properties, 0));
    say("object %d, %zu bytes, handle types %u -> %d", i, bytes, properties.handle_types, result);
    if (result) return;
    *o = (Object){1, 1, 0, 0, o->handle, bytes};
    demand += bytes;
}

static void let_go(Object *o) {
    if (o->references || o->mappings || !o->alive) return;
    o->alive = 0;
    demand -= o->bytes;
}

static void release_object(Object *o) {
    if (!o->alive || !o->references) return;
    CUresult result = cuMemRelease(o->handle);
    say("release object %d -> %d", (int)(o - objects), result);
    if (result) return;
    o->references--;
    let_go(o);
}

static int settle_mapped(void) {
    Buffer any = {.kind = MAPPED};
    return settle(&any);
}

static void map_object(void) {
    int i = choose(OBJECTS), r = choose(RANGES), at = choose(SLOTS);
    Object *o = &objects[i];
    Range *range = &ranges[r];
    int slots = (int)(o->bytes / GRANULE);
    if (!o->alive || !o->references || !range->address || at + slots > SLOTS) return;
    CUresult result = cuMemMap(range->address + at * GRANULE, o->bytes, 0, o->handle, 0);
    say("map object %d to %d.%d -> %d", i, r, at, result);
    if (result) return;
    o->mappings++;
    for (int k = 0; k < slots; k++) {
        range->object[at + k] = i;
        range->first[at + k] = k == 0;
        range->rights[at + k] = 0;
    }
}

static void give_access(void) {
    int r = choose(RANGES), at = choose(SLOTS), count = 1 + choose(SLOTS), rights = choose(4) ? 3 : choose(2) ? 1 : 0;
    Range *range = &ranges[r];
    if (!range->address || at + count > SLOTS || !settle_mapped()) return;
    CUmemAccessDesc description = {{1, 0}, (unsigned)rights};
    CUresult result = cuMemSetAccess(range->address + at * GRANULE, count * GRANULE, &description, 1);
    say("access to %d.%d, %d granules, %d -> %d", r, at, count, rights, result);
    if (result) return;
    for (int k = at; k < at + count; k++) {
        range->rights[k] = rights;
        Object *o = &objects[range->object[k]];
        if (o->defined || rights != 3 || !range->first[k]) continue;
        CUdeviceptr address = range->address + k * GRANULE;
        if (k + (int)(o->bytes / GRANULE) > at + count) continue;
        o->defined = cuMemsetD8_v2(address, (unsigned char)step, o->bytes) == 0;
        cuCtxSynchronize();
    }
}

static void unmap(void) {
    int r = choose(RANGES), at = choose(SLOTS), count = 1 + choose(SLOTS);
    Range *range = &ranges[r];
    if (!range->address || at + count > SLOTS || !settle_mapped()) return;
    CUresult result = cuMemUnmap(range->address + at * GRANULE, count * GRANULE);
    say("unmap %d.%d, %d granules -> %d", r, at, count, result);
    if (result) return;
    for (int k = at; k < at + count; k++) {
        int object = range->object[k];
        range->object[k] = -1;
        if (object < 0 || !range->first[k]) continue;
        objects[object].mappings--;
        let_go(&objects[object]);
    }
}

static void reserve(void) {
    int r = choose(RANGES);
    Range *range = &ranges[r];
    CUresult result;
    if (!range->address) {
        result = cuMemAddressReserve(&range->address, SLOTS * GRANULE, 0, 0, 0);
        say("reserve %d -> %d", r, result);
        for (int k = 0; k < SLOTS; k++) range->object[k] = -1;
        return;
    }
    for (int k = 0; k < SLOTS; k++)
        if (range->object[k] >= 0) return;
    result = cuMemAddressFree(range->address, SLOTS * GRANULE);
    say("give back %d -> %d", r, result);
    if (!result) range->address = 0;
}

static void ask_mapped(void) {
    int r = choose(RANGES), at = choose(SLOTS);
    Range *range = &ranges[r];
    if (!range->address) return;
    CUdeviceptr address = range->address + at * GRANULE + choose((int)GRANULE);
    CUmemLocation place = {1, 0};
    unsigned long long flags = 99;
    CUresult result = cuMemGetAccess(&flags, &place, address);
    say("access of %d.%d: %llu -> %d", r, at, result ? 0 : flags, result);
    CUmemGenericAllocationHandle object = 0;
    result = cuMemRetainAllocationHandle(&object, (void *)address);
    int known = -1;
    for (int i = 0; i < OBJECTS; i++)
        if (!result && objects[i].alive && range->object[at] == i) known = i;
    say("handle at %d.%d: object %d -> %d", r, at, known, result);
    if (result) return;
    CUmemAllocationProp properties = {0};
    result = cuMemGetAllocationPropertiesFromHandle(&properties, object);
    say("its properties: %u, %u, %u, %d -> %d", properties.type, properties.handle_types, properties.location.type, properties.location.id, result);
    say("let go of again -> %d", cuMemRelease(object));
}

static void map_memory(void) {
    switch (choose(10)) {
    case 0: case 1: make_object(); break;
    case 2: case 3: map_object(); break;
    case 4: case 5: give_access(); break;
    case 6: if (choose(2)) unmap(); break;
    case 7: reserve(); break;
    case 8: if (choose(3) == 0) release_object(&objects[choose(OBJECTS)]); break;
    default: ask_mapped();
    }
}

/* ---- streams, events, graphs, host functions ---- */

static void stream_life(void) {
    int s = 1 + choose(3);
    Stream *it = &here()->streams[s];
    if (it->alive) {
        for (int i = 0; i < BUFFERS; i++) {
            Buffer *b = &buffers[i];
            if (b->alive && b->context == current[thread] && b->stream == s) {
                if (captures() || b->graphs) return;
                b->stream = 0;
            }
        }
        if (it->capturing) return;
        if (mapped_stream == current[thread] * STREAMS + s && !settle_mapped()) return;
        CUresult waited = cuStreamSynchronize(it->handle), result = cuStreamDestroy_v2(it->handle);
        say("destroy stream %d -> %d, %d", s, waited, result);
        it->alive = 0;
        return;
    }
    it->blocking = choose(2);
    int priority = -choose(3);
    CUresult result = choose(2) ? cuStreamCreate(&it->handle, !it->blocking) : cuStreamCreateWithPriority(&it->handle, !it->blocking, priority);
    say("make stream %d -> %d", s, result);
    it->alive = !result;
}

static void ask_stream(void) {
    int s = some_stream(), priority = 99, status = 9;
    unsigned flags = 99;
    CUcontext context = NULL;
    CUresult a = cuStreamGetFlags(handle(s), &flags), b = cuStreamGetPriority(handle(s), &priority), c = cuStreamGetCtx(handle(s), &context);
    CUresult d = cuStreamIsCapturing(handle(s), &status);
    say("stream %d: flags %u, priority %d, own context %d, capturing %d -> %d %d %d %d", s, flags, priority, context == here()->handle, status, a, b, c, d);
    if (captures()) return;
    a = cuStreamSynchronize(handle(s));
    b = cuStreamQuery(handle(s));
    say("stream %d done -> %d, %d", s, a, b == CUDA_ERROR_NOT_READY && s == 0 ? 0 : b);
}

static void event(void) {
    int e = choose(EVENTS), s = some_stream(), other = some_stream();
    Context *c = here();
    CUresult result;
    if (!c->events[e]) {
        result = cuEventCreate(&c->events[e], 2 * choose(2));
        say("make event %d -> %d", e, result);
        c->recorded[e] = 0;
        return;
    }
    if (captures()) return;
    switch (choose(5)) {
    case 0:
        say("destroy event %d -> %d", e, cuEventDestroy_v2(c->events[e]));
        c->events[e] = NULL;
        break;
    case 1: case 2:
        result = cuEventRecord(c->events[e], handle(s));
        c->recorded[e] = 1;
        say("record event %d on %d -> %d", e, s, result);
        break;
    case 3: say("stream %d waits for event %d -> %d", other, e, cuStreamWaitEvent(handle(other), c->events[e], 0)); break;
    default: {
        float time;
        result = cuEventSynchronize(c->events[e]);
        say("event %d done -> %d, %d, elapsed %d", e, result, cuEventQuery(c->events[e]), cuEventElapsedTime(&time, c->events[e], c->events[e]));
    }
    }
}

static void on_host(void *data) { host_calls[(size_t)data >> 8] += (size_t)data & 255; }

static void on_callback(CUstream stream, CUresult status, void *data) {
    (void)stream;
    host_calls[(size_t)data >> 8] += ((size_t)data & 255) + status;
}

static void host_function(void) {
    int s = some_stream(), amount = 1 + choose(100);
    CUresult result;
    size_t place = (size_t)(current[thread] * STREAMS + s), data = place << 8 | (size_t)amount;
    if (here()->streams[s].capturing) return;
    if (choose(3)) result = cuLaunchHostFunc(handle(s), on_host, (void *)data);
    else result = cuStreamAddCallback(handle(s), on_callback, (void *)data, 0);
    CUresult waited = captures() ? 0 : cuStreamSynchronize(handle(s));
    say("host function on %d -> %d, %d", s, result, waited);
    /* Those of other streams may still have to run, and these too if nobody has waited for them. */
    if (!captures() && !waited) say("host functions in it were given %d", host_calls[place]);
}

/* A capture of a stream has ended. What it was to allocate is there if its graph was launched; else the addresses are nobody's. */
static void recorded(int context, int stream, int launched) {
    for (int i = 0; i < BUFFERS; i++) {
        Buffer *b = &buffers[i];
        if (!b->alive || !b->recorded || b->context != context || b->stream != stream) continue;
        b->recorded = 0;
        if (launched) continue;
        b->alive = 0;
        demand -= rounded(b->bytes);
    }
}

static void begin_capture(void) {
    int s = choose(4) ? 1 + choose(3) : 4 + thread, mode = strstr(without, "global-captures") ? 1 + choose(2) : choose(3);
    Stream *it = &here()->streams[s];
    if (!it->alive || it->capturing || captures() > 1) return;
    cuStreamSynchronize(it->handle);
    CUresult result = cuStreamBeginCapture_v2(it->handle, mode);
    say("begin capture on %d, mode %d -> %d", s, mode, result);
    it->capturing = !result;
    it->mode = mode;
}

/* What was captured is thrown away, or kept to be launched. Buffers that it used are not freed before it is destroyed. */
static void end_capture(int keep) {
    for (int s = 1; s < STREAMS; s++) {
        Stream *it = &here()->streams[s];
        if (!it->capturing || (s >= 4 && s != 4 + thread)) continue;
        CUgraph graph = NULL;
        CUresult result = cuStreamEndCapture(it->handle, &graph);
        it->capturing = 0;
        size_t nodes = 0;
        if (!result && graph) cuGraphGetNodes(graph, NULL, &nodes);
        say("end capture on %d, %zu nodes -> %d", s, nodes, result);
        int ran = 0;
        if (result || !graph) {
            recorded(current[thread], s, ran);
            return;
        }
        CUgraphExec executable = NULL;
        result = cuGraphInstantiateWithFlags(&executable, graph, 0);
        say("instantiate -> %d", result);
        /* Launched here and now: the buffers that it uses are all there. */
        for (int times = keep && !result && !captures() ? choose(4) : 0; times; times--) {
            CUresult launched = cuGraphLaunch(executable, it->handle);
            say("launch -> %d, %d", launched, cuStreamSynchronize(it->handle));
            ran |= !launched;
        }
        recorded(current[thread], s, ran);
        if (!result) say("destroy -> %d", cuGraphExecDestroy(executable));
        say("destroy graph -> %d", cuGraphDestroy(graph));
        return;
    }
}

static void graph(void) {
    if (captures() && choose(3)) end_capture(1);
    else if (choose(2)) begin_capture();
}

/* ---- contexts ---- */

static int enter_context(int c) {
    Context *it = &contexts[c];
    CUresult result = 0;
    if ((result = cuModuleLoadData(&it->module, MODULE))) say("module -> %d", result);
    cuModuleGetFunction(&it->fill, it->module, "nvshare_fill_u32");
    cuModuleGetFunction(&it->iota, it->module, "nvshare_iota_u64");
    cuModuleGetFunction(&it->mix, it->module, "nvshare_mix_u64");
    cuModuleGetFunction(&it->spin, it->module, "nvshare_spin");
    memset(it->streams, 0, sizeof it->streams);
    memset(it->events, 0, sizeof it->events);
    it->streams[0] = (Stream){1, 1, 0, 0, NULL};
    for (int s = 4; s < STREAMS; s++) it->streams[s] = (Stream){1, 1, 0, 0, CU_STREAM_PER_THREAD};
    return result == 0;
}

static void make_context(int c) {
    CUresult result = TAKE(GRANULE, cuCtxCreate_v2(&contexts[c].handle, 0, 0));
    say("create context %d -> %d", c, result);
    if (result) return;
    contexts[c].alive = 1;
    contexts[c].pool = NULL;
    current[thread] = c;
    enter_context(c);
    CUcontext popped;
    /* On the stack below is what was current before; a thread has one context here. */
    cuCtxPopCurrent_v2(&popped);
    cuCtxSetCurrent(contexts[c].handle);
}

/* All of a context's memory goes with it, but for stream-ordered and mapped memory, which is no context's. */
static void destroy_context(int c) {
    if (captures()) return;
    for (int i = 0; i < BUFFERS; i++) {
        Buffer *b = &buffers[i];
        if (!b->alive) continue;
        if (b->context == c && (b->kind == ORDERED || b->kind == POOLED)) return;
        if (!wait_for(b->context, b->stream)) return;
    }
    if (!settle_mapped() || (contexts[c].pool && c)) return;
    CUresult result = cuCtxDestroy_v2(contexts[c].handle);
    say("destroy context %d -> %d", c, result);
    if (result) return;
    contexts[c].alive = 0;
    for (int t = 0; t < THREADS; t++)
        if (current[t] == c) current[t] = 0;
    cuCtxSetCurrent(contexts[0].handle);
}

static void context(void) {
    int c = choose(CONTEXTS);
    CUcontext now = NULL;
    switch (choose(6)) {
    case 0: if (c && !contexts[c].alive) make_context(c); break;
    case 1:
        /* Memory that was made in it and is used from another context would go, too: none must be left. */
        if (!c || !contexts[c].alive || choose(2)) break;
        for (int i = 0; i < BUFFERS; i++)
            if (buffers[i].alive && buffers[i].owner == c) free_buffer(&buffers[i], 1);
        for (int i = 0; i < BUFFERS; i++)
            if (buffers[i].alive && buffers[i].owner == c) return;
        destroy_context(c);
        break;
    case 2: case 3:
        if (!contexts[c].alive) break;
        say("set context %d -> %d", c, cuCtxSetCurrent(contexts[c].handle));
        current[thread] = c;
        break;
    case 4: {
        unsigned flags = 99, version = 0;
        CUdevice device = 99;
        CUresult a = cuCtxGetCurrent(&now), b = cuCtxGetFlags(&flags), d = cuCtxGetDevice(&device), e = cuCtxGetApiVersion(now, &version);
        say("current is own %d, flags %u, device %d -> %d %d %d %d", now == here()->handle, flags, device, a, b, d, e);
        break;
    }
    default: {
        CUcontext popped = NULL;
        CUresult a = cuCtxPushCurrent_v2(contexts[0].handle), b = cuCtxPopCurrent_v2(&popped);
        say("push and pop: %d -> %d %d", popped == contexts[0].handle, a, b);
        unsigned flags = 99;
        int active = 99;
        a = cuDevicePrimaryCtxGetState(0, &flags, &active);
        say("primary: %u, %d -> %d", flags, active, a);
        if (choose(2)) {
            b = cuDevicePrimaryCtxRetain(&popped, 0);
            say("retain and release: %d -> %d %d", popped == contexts[0].handle, b, cuDevicePrimaryCtxRelease_v2(0));
        }
    }
    }
}

/* ---- pools, queries, what is wrong ---- */

static void pools(void) {
    Context *c = here();
    if (captures()) return;
    if (!c->pool) {
        CUmemPoolProps properties = {1, 0, {1, 0}, NULL, 0, 0, {0}};
        CUresult result = cuMemPoolCreate(&c->pool, &properties);
        say("make pool -> %d", result);
        return;
    }
    uint64_t value = choose(2) ? 0 : ~0ull;
    CUmemoryPool first = NULL;
    switch (choose(4)) {
    case 0: say("threshold of the pool -> %d", cuMemPoolSetAttribute(c->pool, 4, &value)); break;
    case 1: {
        CUresult a = cuMemPoolGetAttribute(c->pool, 4, &value);
        say("threshold of the pool is %llu -> %d", (unsigned long long)value, a);
        break;
    }
    case 2: say("trim -> %d, %d", cuDeviceGetDefaultMemPool(&first, 0), cuMemPoolTrimTo(choose(2) ? first : c->pool, choose(2) ? 0 : MIB)); break;
    default:
        for (int i = 0; i < BUFFERS; i++)
            if (buffers[i].alive && buffers[i].kind == POOLED) return;
        say("destroy pool -> %d", cuMemPoolDestroy(c->pool));
        c->pool = NULL;
    }
}

static void ask_memory(void) {
    Buffer *b = some_buffer(1);
    if (!b) return;
    size_t offset = choose((int)b->bytes), bytes = 0;
    CUdeviceptr base = 0;
    CUresult result = cuMemGetAddressRange_v2(choose(6) ? &base : NULL, choose(6) ? &bytes : NULL, b->address + offset);
    say("range of %s %d at %zu: %lld, %zu -> %d", KIND[b->kind], number_of(b), offset, base ? (long long)(b->address - base) : 0, rounded(bytes), result);
    /* Not 15, IS_GPU_DIRECT_RDMA_CAPABLE: memory that moves is not, on purpose (docs/compatibility.md). */
    static const int ATTRIBUTES[] = {2, 8, 9, 10, 13, 14, 16};
    for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++) {
        uint64_t value = 0;
        char name[24];
        snprintf(name, sizeof name, "attribute-%d,", ATTRIBUTES[i]);
        if (strstr(without, name)) continue;
        result = cuPointerGetAttribute(&value, ATTRIBUTES[i], b->address + offset);
        say("  attribute %d: %llu -> %d", ATTRIBUTES[i], (unsigned long long)value, result);
    }
    CUcontext context = NULL;
    result = cuPointerGetAttribute(&context, 1, b->address + offset);
    int known = -1;
    for (int c = 0; c < CONTEXTS; c++)
        if (contexts[c].alive && contexts[c].handle == context) known = c;
    say("  context: %d, null %d -> %d", known, !context, result);
    CUdeviceptr start = 0;
    result = cuPointerGetAttribute(&start, 11, b->address + offset);
    say("  start: %lld -> %d", result ? 0 : (long long)(b->address - start), result);
    uint64_t size = 0;
    result = cuPointerGetAttribute(&size, 12, b->address + offset);
    /* The driver rounds to units of its own, which are not ours. */
    say("  size: %zu -> %d", rounded(size), result);
    unsigned sync = 1;
    if (choose(4) == 0) say("  sync memops -> %d", cuPointerSetAttribute(&sync, 6, b->address));
    size_t free = 0, total = 0;
    result = cuMemGetInfo_v2(&free, &total);
    say("info -> %d, %d", result, free <= total);
    if (!strstr(without, "half-info")) say("half an info -> %d", cuMemGetInfo_v2(NULL, &total));
}

static void wrong(void) {
    CUdeviceptr address = 0;
    Buffer *b = some_buffer(1);
    CUmemGenericAllocationHandle object = 0;
    CUmemAllocationProp properties = {1, 0, {1, 0}, NULL, {0}};
    if (captures()) return;
    switch (choose(12)) {
    case 0: say("free nowhere -> %d", cuMemFree_v2(0x12345000)); break;
    case 1: say("free null -> %d", cuMemFree_v2(0)); break;
    case 2: if (b && b->bytes > 5000) say("free inside %s %d -> %d", KIND[b->kind], number_of(b), cuMemFree_v2(b->address + 4096)); break;
    case 3: say("free nowhere in order -> %d", cuMemFreeAsync(0x12345000, handle(0))); break;
    case 4: say("nothing -> %d", cuMemAlloc_v2(&address, 0)); break;
    case 5: say("too much -> %d", cuMemAlloc_v2(&address, (size_t)1 << 50)); break;
    case 6: say("nothing in order -> %d", cuMemAllocAsync(&address, 0, handle(0))); break;
    case 7: say("to null -> %d, %d", cuMemAlloc_v2(NULL, 4096), cuMemAllocAsync(NULL, 4096, handle(0))); break;
    case 8: say("odd object -> %d", cuMemCreate(&object, GRANULE + 1, &properties, 0)); break;
    case 9: if (b && b->kind == MAPPED) say("free mapped -> %d", cuMemFree_v2(b->address)); break;
    case 10: if (b && b->kind != MAPPED && b->kind != UNIFIED) say("unmap %s -> %d", KIND[b->kind], cuMemUnmap(b->address & ~(GRANULE - 1), GRANULE)); break;
    default: if (strstr(without, "primary")) break;
        say("destroy the primary context -> %d", cuCtxDestroy_v2(contexts[0].handle));
        cuCtxSetCurrent(here()->handle);
    }
}

/* ---- steps ---- */

static int is_without(int what) {
    const char *name = what < 57 ? "memory" : what < 60 ? "managed" : what < 74 ? "mapped" : what < 84 ? "streams"
                     : what < 88 ? "captures" : what < 91 ? "contexts" : what < 93 ? "pools" : what < 97 ? "queries" : "wrong";
    return strstr(without, name) != NULL;
}

static void one_step(void) {
    if (!contexts[current[thread]].alive) current[thread] = 0;
    cuCtxSetCurrent(here()->handle);
    allocations = 0;
    int what = choose(100);
    if (is_without(what)) return;
    if (what < 14) allocate();
    else if (what < 20) free_buffer(&buffers[choose(BUFFERS)], choose(3) == 0);
    else if (what < 29) set();
    else if (what < 34) copy_in();
    else if (what < 40) copy_out();
    else if (what < 47) copy_inside();
    else if (what < 54) compute();
    else if (what < 57) array();
    else if (what < 60) unified();
    else if (what < 74) map_memory();
    else if (what < 77) stream_life();
    else if (what < 79) ask_stream();
    else if (what < 82) event();
    else if (what < 84) host_function();
    else if (what < 88) graph();
    else if (what < 91) context();
    else if (what < 93) pools();
    else if (what < 97) ask_memory();
    else wrong();
    /* A capture that lasts would hold up everybody else. */
    if (captures() && step % 8 == 0) graph();
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t handed_over = PTHREAD_COND_INITIALIZER;
static int turn = -1;
static int nap_us;

static void *take_steps(void *number) {
    int me = (int)(size_t)number;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (turn != me && turn != THREADS) pthread_cond_wait(&handed_over, &lock);
        if (turn == THREADS) break;
        one_step();
        fflush(stdout);
        turn = -1;
        pthread_cond_broadcast(&handed_over);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void hand_over(int to) {
    pthread_mutex_lock(&lock);
    turn = to;
    pthread_cond_broadcast(&handed_over);
    while (turn >= 0 && to < THREADS) pthread_cond_wait(&handed_over, &lock);
    pthread_mutex_unlock(&lock);
}

static int is_in(const char *list, int number) {
    for (const char *at = list; at && *at;) {
        char *end;
        if (strtol(at, &end, 10) == number) return 1;
        at = *end ? end + 1 : end;
    }
    return 0;
}

/* What is there is shown and given back. */
static void finish(void) {
    thread = 0;
    finishing = 1;
    for (int c = 0; c < CONTEXTS; c++) {
        if (!contexts[c].alive) continue;
        cuCtxSetCurrent(contexts[c].handle);
        current[0] = c;
        for (int s = 1; s < 4; s++) {
            Stream *it = &contexts[c].streams[s];
            CUgraph graph = NULL;
            if (!it->alive || !it->capturing) continue;
            say("end capture -> %d", cuStreamEndCapture(it->handle, &graph));
            it->capturing = 0;
            if (graph) cuGraphDestroy(graph);
            recorded(c, s, 0);
        }
    }
    /* A capture on another thread's own stream can only be ended there: it ends with its context. */
    for (int c = 0; c < CONTEXTS; c++)
        for (int s = 4; s < STREAMS; s++) {
            contexts[c].streams[s].capturing = 0;
            recorded(c, s, 0);
        }
    current[0] = 0;
    cuCtxSetCurrent(contexts[0].handle);
    for (int i = 0; i < BUFFERS; i++) {
        show(&buffers[i], "end");
        buffers[i].graphs = 0;
        free_buffer(&buffers[i], 1);
    }
    for (int r = 0; r < RANGES; r++)
        for (int k = 0; k < SLOTS; k++) {
            Range *range = &ranges[r];
            if (!range->address || range->object[k] < 0 || !range->first[k]) continue;
            Object *o = &objects[range->object[k]];
            say("unmap -> %d", cuMemUnmap(range->address + k * GRANULE, o->bytes));
        }
    for (int r = 0; r < RANGES; r++)
        if (ranges[r].address) say("give back -> %d", cuMemAddressFree(ranges[r].address, SLOTS * GRANULE));
    for (int i = 0; i < OBJECTS; i++)
        while (objects[i].alive && objects[i].references-- > 0) say("release -> %d", cuMemRelease(objects[i].handle));
    say("all done -> %d", cuCtxSynchronize());
}

static void read_settings(void) {
    const char *bytes = getenv("FUZZ_POOL"), *most = getenv("FUZZ_LIMIT"), *path = getenv("FUZZ_REFUSED"), *nap = getenv("FUZZ_NAP_US");
    if (getenv("FUZZ_WITHOUT")) without = getenv("FUZZ_WITHOUT");
    if (bytes) pool = strtoull(bytes, NULL, 10);
    if (most) limit = strtoull(most, NULL, 10);
    if (nap) nap_us = atoi(nap);
    if (path) refused_file = fopen(path, "w");
    path = getenv("FUZZ_REPLAY");
    FILE *file = path ? fopen(path, "r") : NULL;
    while (file && replay_count < 4096 && fscanf(file, "%d", &replay[replay_count]) == 1) replay_count++;
    if (file) fclose(file);
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    int steps = argc > 2 ? atoi(argv[2]) : 100;
    const char *only = getenv("FUZZ_ONLY");
    read_settings();
    (void)open_graph_buffers;
    (void)graphs;
    CHECK(cuInit(0));
    CHECK(cuDevicePrimaryCtxRetain(&contexts[0].handle, 0));
    CHECK(cuCtxSetCurrent(contexts[0].handle));
    contexts[0].alive = 1;
    enter_context(0);
    pageable = calloc(1, STAGING);
    CHECK(cuMemAllocHost_v2((void **)&pinned, STAGING));
    memset(pinned, 0, STAGING);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, take_steps, (void *)(size_t)i);
    for (step = 0; step < steps; step++) {
        if (only && !is_in(only, step)) continue;
        dice.state = seed * GOLDEN + (uint64_t)step * 0x2545F4914F6CDD1Dull;
        roll(&dice);
        thread = choose(THREADS);
        hand_over(thread);
        if (nap_us) usleep(below(&dice, nap_us));
    }
    hand_over(THREADS);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    step = steps;
    dice.state = seed;
    finish();
    return 0;
}
