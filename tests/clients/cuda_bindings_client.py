"""A CUDA program on PyPI's cuda-bindings: it copies two buffers to the GPU, mixes them there in rounds, copies them
back and checks every word. It knows nothing of nvshare. src/main.rs does the same on the crate cudarc, and says why
it waits for lines and why the buffers change streams; here the events between the streams are in plain sight.
"""

import argparse
import array
import ctypes
import pathlib
import sys

from cuda.bindings import driver

BUFFERS = 2
# Iterations of a round.
ITERATIONS = 10
# Words of the pattern that a buffer begins with. Python would take seconds to mix each word of a buffer, so a pattern
# repeats; its length is prime, so no two pages of a buffer are alike.
PATTERN = 4099

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
KERNELS = pathlib.Path(__file__).resolve().parent.parent / "simcuda" / "kernels.ptx"


def call(outcome):
    """What a function of the driver returned, without the status; an error is raised."""
    status, *values = outcome
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(status.name)
    return values[0] if len(values) == 1 else values


def pattern(seed, buffer, iterations):
    """The pattern of a buffer after so many iterations."""
    words = array.array("Q")
    for at in range(PATTERN):
        word = ((seed << 40) + (buffer << 32) + at) * GOLDEN & MASK
        for iteration in range(iterations):
            word = ((word << 13 | word >> 51) * GOLDEN + iteration) & MASK
        words.append(word)
    return words


def fill(words, size):
    """So many bytes of the pattern, again and again."""
    data = words.tobytes()
    return (data * (size // len(data) + 1))[:size]


def wrong_word(found, expected):
    """Where two buffers differ first, in words."""
    found, expected = array.array("Q", found), array.array("Q", expected)
    return next(at for at, word in enumerate(expected) if found[at] != word)


def run(options):
    """Does the work, and tells what is wrong with the data."""
    size = options.mib << 20
    call(driver.cuInit(0))
    device = call(driver.cuDeviceGet(0))
    # cudarc's client uses the primary context.
    context = call(driver.cuCtxCreate(None, 0, device))
    module = call(driver.cuModuleLoadData(KERNELS.read_bytes() + b"\0"))
    mix = call(driver.cuModuleGetFunction(module, b"nvshare_mix_u64"))
    streams = [call(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)) for _ in range(BUFFERS)]
    # That the last work on a buffer is done.
    done = [call(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)) for _ in range(BUFFERS)]
    buffers = [call(driver.cuMemAlloc(size)) for _ in range(BUFFERS)]
    sources = [fill(pattern(options.seed, buffer, 0), size) for buffer in range(BUFFERS)]
    for buffer in range(BUFFERS):
        call(driver.cuMemcpyHtoDAsync(buffers[buffer], sources[buffer], size, streams[buffer]))
        call(driver.cuEventRecord(done[buffer], streams[buffer]))
    for event in done:
        call(driver.cuEventSynchronize(event))
    print("loaded", flush=True)

    types = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
    for turn in range(options.rounds):
        sys.stdin.readline()
        for iteration in range(turn * ITERATIONS, (turn + 1) * ITERATIONS):
            for buffer in range(BUFFERS):
                stream = streams[(iteration + buffer) % BUFFERS]
                values = (int(buffers[buffer]), size // 8, iteration)
                call(driver.cuStreamWaitEvent(stream, done[buffer], 0))
                call(driver.cuLaunchKernel(mix, size // 8 // 256, 1, 1, 256, 1, 1, 0, stream, (values, types), 0))
                call(driver.cuEventRecord(done[buffer], stream))
        for event in done:
            call(driver.cuEventSynchronize(event))
        print(f"round {turn + 1}", flush=True)

    wrong = None
    for buffer in range(BUFFERS):
        expected = fill(pattern(options.seed, buffer, options.rounds * ITERATIONS), size)
        pinned = call(driver.cuMemHostAlloc(size, 0))
        call(driver.cuMemcpyDtoHAsync(pinned, buffers[buffer], size, streams[buffer]))
        call(driver.cuStreamSynchronize(streams[buffer]))
        found = ctypes.string_at(int(pinned), size)
        if found != expected and wrong is None:
            wrong = f"wrong: word {wrong_word(found, expected)} of buffer {buffer}"
        call(driver.cuMemFreeHost(pinned))
        call(driver.cuMemFree(buffers[buffer]))
        call(driver.cuEventDestroy(done[buffer]))
        call(driver.cuStreamDestroy(streams[buffer]))
    call(driver.cuModuleUnload(module))
    call(driver.cuCtxDestroy(context))
    return wrong


def main():
    parser = argparse.ArgumentParser(description="Mixes two buffers on the GPU and checks them.")
    parser.add_argument("--mib", type=int, required=True, help="size of each buffer in MiB")
    parser.add_argument("--rounds", type=int, required=True, help="rounds of iterations")
    parser.add_argument("--seed", type=int, required=True, help="what the data begins with")
    options = parser.parse_args()
    wrong = run(options)
    print(f"cuda-bindings: {BUFFERS} x {options.mib} MiB, {options.rounds} rounds: {wrong or 'right'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
