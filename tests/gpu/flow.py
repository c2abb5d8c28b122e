"""Flow control: how long a drain takes, and what it costs, with kernels of 5 us, 5 ms and 500 ms.

    python3 tests/gpu/flow.py [--bin target/release] [--seconds 12] [--lengths 5 5000 500000] [--only drains held streams alone]

Kernels spin for so long, and are launched up to a second ahead. Four kinds of runs:

*drains*: two processes of which neither fits beside the other take turns of 300 ms (960 ms where a kernel takes 500),
with flow control and without: how long the drains take, as the clients' debug logs say (bar: the target of 50 ms and one
kernel, in the 99th percentile).
*held*: of the same two, one works at a time, for a second or less, and the other could ask for the GPU at any moment, so
all that is submitted is held to the target. Kernels per second of one that has flow control and one that has not (bar:
99 %). No memory moves while they are counted.
*streams*: as *held*, with kernels of 5 ms and multiples of it in four blocking streams that overlap (bar: 99 %).
*alone*: kernels per second of a native process and one under nvshare, which work in turn as well, in the whole GPU (bar:
99.5 %). With kernels of 5 us, several pairs of processes.

Unmodified PyTorch; prints one JSON object for each run and a table.
"""

import argparse
import json
import pathlib
import select
import statistics
import sys
import time

from harness import HERE, Arbiter, Job, percentile, program, report, say, slices

LENGTHS_US = [5, 5_000, 500_000]
TARGET_S = 0.05
AHEAD_S = 1.0
MIB = 1_200
CAPACITY = "3GiB"
QUANTUM_MS = 300
PAIRS = 6


def answer(**what):
    print(json.dumps(what), flush=True)


def blocking_streams(torch, number):
    """Streams that the legacy stream waits for, as CuPy's, Numba's and cudaStreamCreate's are, and PyTorch's own are not."""
    import ctypes

    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    streams = []
    for _ in range(number):
        handle = ctypes.c_void_p()
        error = runtime.cudaStreamCreate(ctypes.byref(handle))
        if error:
            raise RuntimeError(f"cudaStreamCreate: error {error}")
        streams.append(torch.cuda.ExternalStream(handle.value))
    return streams


def launch(torch, cycles, count, streams):
    """So many kernels; with streams, in each in turn, and in the second one twice as long, and so on."""
    if not streams:
        for _ in range(count):
            torch.cuda._sleep(cycles)
        return
    for number in range(count):
        lane = number % len(streams)
        with torch.cuda.stream(streams[lane]):
            torch.cuda._sleep(cycles * (lane + 1))


def work(torch, cycles, length_us, over, streams=()):
    """Launches until it is over, and waits for all. How many, and how long it took, s."""
    # So many launches between two events, and so many events ahead of the GPU.
    batch = max(1, int(AHEAD_S / 4 * 1e6 / length_us))
    ahead = max(1, int(AHEAD_S * 1e6 / length_us / batch))
    check = max(1, len(streams), min(batch, int(1_000 / length_us)))
    events, launched, began = [], 0, time.monotonic()
    while not over():
        launch(torch, cycles, check, streams)
        launched += check
        if launched % batch < check:
            event = torch.cuda.Event()
            event.record(*streams[-1:])
            events.append(event)
            if len(events) > ahead:
                events.pop(0).synchronize()
    torch.cuda.synchronize()
    return launched, time.monotonic() - began


def cycles_per_us(torch):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(10_000_000)
    begin.record()
    torch.cuda._sleep(50_000_000)
    end.record()
    torch.cuda.synchronize()
    return 50_000_000 / (begin.elapsed_time(end) * 1e3)


def contender(torch, length_us):
    data = torch.full((MIB << 18,), 1.0, device="cuda")
    cycles = int(cycles_per_us(torch) * length_us)
    answer(ready=True, cycles=cycles)
    sys.stdin.readline()
    launched, _ = work(torch, cycles, length_us, lambda: bool(select.select([sys.stdin], [], [], 0)[0]))
    answer(launched=launched, right=bool((data == 1.0).all()))


def loner(torch, mib, streams):
    """Kernels per second, each time that it is told their length and for how long."""
    data = torch.full((mib << 18,), 1.0, device="cuda")
    streams = blocking_streams(torch, streams)
    answer(cycles_per_us=cycles_per_us(torch))
    for line in iter(lambda: sys.stdin.readline().split(), []):
        length_us, cycles, seconds = int(line[0]), int(line[1]), float(line[2])
        # Its memory comes in, if it was out.
        work(torch, cycles, length_us, lambda until=time.monotonic() + seconds / 5: time.monotonic() > until, streams)
        until = time.monotonic() + seconds
        launched, took = work(torch, cycles, length_us, lambda: time.monotonic() > until, streams)
        answer(per_second=launched / took)
    answer(right=bool((data == 1.0).all()))


def environment(arbiter, flow=True):
    return arbiter.environment() | {"NVSHARE_LOG": "debug", "NVSHARE_FLOW_CONTROL": "1" if flow else "0"}


def quantum_ms(length_us):
    """Two kernels have just less than the target left when the slice can end, so that a third is let go: the worst case."""
    length_ms = length_us // 1000
    return QUANTUM_MS if length_ms < QUANTUM_MS else 2 * length_ms - 40


def drains_of(binaries, length_us, seconds, flow):
    role = [*program("flow.py"), "--role", "contender", "--length-us", str(length_us)]
    with Arbiter(binaries, CAPACITY, ["--quantum", f"{quantum_ms(length_us)}ms"]) as arbiter:
        jobs = []
        for number in range(2):
            jobs.append(Job(role, environment(arbiter, flow), f"contender {number}"))
            jobs[-1].answer(120)
        for job in jobs:
            job.tell("go")
        began = time.monotonic()
        time.sleep(seconds * quantum_ms(length_us) / QUANTUM_MS if flow else seconds)
        ended = time.monotonic()
        for job in jobs:
            job.tell("")
        right = all([job.answer(180)["right"] for job in jobs])
        logs = []
        for job in jobs:
            job.close()
            job.log.seek(0)
            logs += job.log.read().splitlines()
    done = [one for one in slices(logs) if began <= one.began and one.ended <= ended]
    # The first slice of each finds out how long a kernel takes.
    first, drains = [one.drained for one in done[:2]], [one.drained for one in done[2:]]
    figures = {"length_us": length_us, "flow_control": flow, "drains": len(drains), "right": right, "first_s": first}
    figures |= {"drain_p50_s": percentile(drains, 50), "drain_p99_s": percentile(drains, 99), "drain_max_s": max(drains)}
    say("drains", **figures, slices_s=[[one.pid, *(round(time, 5) for time in (one.began - began, one.ran, one.drained))] for one in done])
    return figures


def drains(binaries, seconds, lengths):
    for length_us in lengths:
        without, held = (drains_of(binaries, length_us, seconds, flow) for flow in (False, True))
        bar = TARGET_S + length_us / 1e6
        yield without["right"] and held["right"], (
            f"kernels of {length_us:6} us: drain p50 {held['drain_p50_s'] * 1e3:6.1f}, p99 {held['drain_p99_s'] * 1e3:6.1f}, "
            f"max {held['drain_max_s'] * 1e3:6.1f} ms of {held['drains']}, the first two {', '.join(f'{one * 1e3:.1f}' for one in held['first_s'])} ms "
            f"(bar {bar * 1e3:.0f} ms; without flow control {without['drain_p99_s'] * 1e3:.0f} ms)"
        )


def rates(what, variables, seconds, lengths, mib, streams, swap):
    """Kernels per second of two processes that take turns to work, each alone: of each length, rounds of each process."""
    role = [*program("flow.py"), "--role", "loner", "--mib", str(mib), "--streams", str(streams)]
    jobs, speeds = {}, []
    for name in sorted(variables, reverse=swap):
        jobs[name] = Job(role, variables[name], name)
        speeds.append(jobs[name].answer(120)["cycles_per_us"])
    # The same kernels for both, however fast the clock was when each of them looked.
    speed, found = max(speeds), {}
    for length_us in lengths:
        # As many rounds as the time allows; those of the longest kernels are the longest, to be more than one kernel.
        each = max(seconds / 40, 3 * length_us / 1e6)
        found[length_us] = {name: [] for name in variables}
        for _ in range(max(3, int(seconds / each / 2))):
            for name, job in jobs.items():
                job.tell(f"{length_us} {int(speed * length_us)} {each}")
                found[length_us][name].append(job.answer(60)["per_second"])
        say(what, length_us=length_us, **{name: [round(one, 3) for one in those] for name, those in found[length_us].items()})
    for job in jobs.values():
        job.tell("")
    right = all([job.answer(60)["right"] for job in jobs.values()])
    for job in jobs.values():
        job.close()
    return right, found


def compare(what, bar, variables, seconds, lengths, mib, streams=0):
    """The second's kernels per second against the first's."""
    old, new = variables
    # With quick kernels one process is some per cent faster than the next, whatever it runs under, and stays so: several of each.
    quick = [length_us for length_us in lengths if length_us < 1_000]
    slow = [length_us for length_us in lengths if length_us >= 1_000]
    for lengths, pairs in [(quick, PAIRS), (slow, 1)]:
        runs = [rates(what, variables, seconds, lengths, mib, streams, number % 2) for number in range(pairs) if lengths]
        for length_us in lengths:
            parts = [statistics.median(found[length_us][new]) / statistics.median(found[length_us][old]) for _, found in runs]
            yield all(right for right, _ in runs), (
                f"kernels of {length_us:6} us, {what}: {statistics.median(parts) * 100:.2f} % of {old} (bar {bar} %; medians of "
                f"{len(runs[0][1][length_us][old])} rounds each, pairs of processes: {', '.join(f'{part * 100:.1f}' for part in parts)})"
            )


def held(binaries, seconds, lengths, what="held", streams=0):
    with Arbiter(binaries, CAPACITY, ["--quantum", f"{QUANTUM_MS}ms"]) as arbiter:
        variables = {"without flow control": environment(arbiter, False), "with": environment(arbiter)}
        yield from compare(what, 99, variables, seconds, lengths, MIB, streams)


def streams(binaries, seconds, lengths):
    # Launches through PyTorch's context manager take longer than the shortest kernels.
    lengths = [length_us for length_us in lengths if 1_000 <= length_us <= 50_000]
    yield from held(binaries, seconds, lengths, "four streams", 4)


def alone(binaries, seconds, lengths):
    with Arbiter(binaries) as arbiter:
        variables = {"native": {}, "nvshare": arbiter.environment()}
        yield from compare("alone", 99.5, variables, seconds, lengths, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--seconds", type=float, default=12, help="of each run")
    runs = [drains, held, streams, alone]
    names = [run.__name__ for run in runs]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS_US, help="of kernels, us")
    parser.add_argument("--mib", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=["contender", "loner"], help=argparse.SUPPRESS)
    parser.add_argument("--length-us", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        import torch

        if arguments.role == "loner":
            return loner(torch, arguments.mib, arguments.streams)
        return contender(torch, arguments.length_us)
    binaries = arguments.bin.resolve()
    chosen = [run for run in runs if run.__name__ in arguments.only]
    return report(row for run in chosen for row in run(binaries, arguments.seconds, arguments.lengths))


if __name__ == "__main__":
    sys.exit(main())
