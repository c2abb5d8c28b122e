"""Two JAX processes with the default preallocation (three quarters of the GPU each) on one GPU under nvshare: the
second starts without an out-of-memory error, and a switch moves what they really use, not what they reserved.

    python3 tests/gpu/prealloc.py --bin build [--capacity 24GiB] [--use-mib 1536] [--seconds 16]

What each uses is known: the arrays it made. What JAX itself says (peak_bytes_in_use) is shown beside it. Exit status 1
if a result is wrong, or a switch moves 1.2 x what its process uses, or more, in or out.

A switch moves out only as much as the other process lacks, zeros first: where that is less than what is reserved and
not used, it copies nothing at all. With `--use-mib 8192` the arrays must move too.
"""

import argparse
import json
import pathlib
import sys
import time

from harness import HERE, MIB, Arbiter, Job, Watch, program, say

BAR = 1.2
PIECE = 64 * MIB
FACTOR, ADDEND = 1664525, 1013904223


def job(options):
    """The process: arrays of 32-bit integers, stepped in place. A line on the standard input says for how long."""
    import jax
    import numpy

    pieces = options.use_mib * MIB // PIECE
    words = PIECE // 4

    def first(piece):
        return numpy.arange(words, dtype=numpy.uint32) * numpy.uint32(2 * piece + 1) + numpy.uint32(options.seed)

    def step(held):
        return [each * numpy.uint32(FACTOR) + numpy.uint32(ADDEND) for each in held]

    step = jax.jit(step, donate_argnums=0)
    device = jax.devices()[0]
    held = [jax.device_put(first(piece), device) for piece in range(pieces)]
    held = step(held)
    jax.block_until_ready(held)
    done = 1
    figures = device.memory_stats() or {}
    ready = {
        "ready": True,
        "platform": device.platform,
        "limit_bytes": figures.get("bytes_limit", 0),
        "used_bytes": sum(each.nbytes for each in held),
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        until = time.monotonic() + float(line)
        while time.monotonic() < until:
            for _ in range(8):
                held = step(held)
            done += 8
            jax.block_until_ready(held)
        # After so many steps a word is factor * word + addend, of 32 bits.
        factor, addend = 1, 0
        for _ in range(done):
            factor, addend = factor * FACTOR % 2**32, (addend * FACTOR + ADDEND) % 2**32
        right = all(
            bool((numpy.asarray(each) == first(piece) * numpy.uint32(factor) + numpy.uint32(addend)).all())
            for piece, each in enumerate(held)
        )
        figures = device.memory_stats() or {}
        answer = {"right": right, "steps": done, "peak_bytes": figures.get("peak_bytes_in_use", 0)}
        print(json.dumps(answer), flush=True)


def episodes(series, gap=0.3):
    """What a counter grew by, each time that it grew: [(time, count)] -> [growth]."""
    grown, last = [], None
    for (_, before), (now, after) in zip(series, series[1:]):
        if after > before:
            if last is not None and now - last <= gap:
                grown[-1] += after - before
            else:
                grown.append(after - before)
            last = now
    return grown


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--capacity", default="24GiB", help="the pool; 'whole' for the whole GPU")
    parser.add_argument("--use-mib", type=int, default=1536, help="what each process uses, in pieces of 64 MiB")
    parser.add_argument("--seconds", type=float, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job", action="store_true", help="be one of the two processes")
    options = parser.parse_args()
    if options.job:
        return job(options)
    capacity = None if options.capacity == "whole" else options.capacity
    names = ("first", "second")
    with Arbiter(options.bin.resolve(), capacity, ["--quantum", "1s"]) as arbiter:
        jobs, ready = [], {}
        for seed, name in enumerate(names):
            command = [*program("prealloc.py"), "--job", "--use-mib", options.use_mib, "--seed", seed + 1]
            jobs.append(Job(command, arbiter.environment() | {"CUDA_VISIBLE_DEVICES": "0"}, name))
            # The second begins when the first has reserved what it wants.
            ready[name] = jobs[-1].answer(180)
        say("ready", **ready)
        with Watch(arbiter, 0.05) as watch:
            for each in jobs:
                each.tell(str(options.seconds))
            time.sleep(options.seconds)
        answers = {each.name: each.answer(120) for each in jobs}
        for each in jobs:
            each.close()
            each.log.seek(0)
            sys.stderr.write(each.log.read())
    clients = {name: row for name in names for row in watch.last(name).values()}
    say("done", answers=answers, clients=clients)

    good = True
    for name in names:
        used, peak = ready[name]["used_bytes"], answers[name]["peak_bytes"]
        good &= answers[name]["right"]
        reserved = ready[name]["limit_bytes"]
        print(
            f"{name}: {'right' if answers[name]['right'] else 'WRONG RESULTS'}; reserved {reserved >> 20} MiB, "
            f"arrays {used >> 20}, peak {peak >> 20}, {clients[name]['yields']} yields",
            flush=True,
        )
        if reserved < 2 * used:
            print(f"{name}: JAX has not preallocated", flush=True)
            good = False
        for way in ("bytes_in", "bytes_out"):
            series = [
                (at, client[way])
                for at, gpus in watch.samples
                for gpu in gpus
                for client in gpu["clients"]
                if client["name"] == name
            ]
            moved = episodes(series)
            switches = clients[name]["yields"]
            if switches < 3:
                print(f"{name}: {way}: only {switches} switches", flush=True)
                good = False
                continue
            mean, most = clients[name][way] / switches / used, max(moved, default=0) / used
            good &= mean < BAR and most < BAR
            print(
                f"{name}: {way}: {clients[name][way] / switches / MIB:.0f} MiB a switch, {mean:.3f} x what it uses; "
                f"the most at once {most:.3f} x (bar {BAR})",
                flush=True,
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
