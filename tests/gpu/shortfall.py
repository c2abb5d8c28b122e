"""The field report's situation on a real GPU: three processes share it, and their contexts leave 72 MiB too little for
what one of them needs (11,968 MiB), in its own slice too. How fast are iterations inside a slice, against native?

    python3 tests/gpu/shortfall.py --bin build [--seconds 24] [--short-mib 72]

Runs one process natively; then three under nvshare in a pool with room for all, which shows what contexts and data
take; then three in a pool that is --short-mib too small for one beside the three contexts. Two kinds of iteration: the
report's addition, bound by memory, and a matrix product. Exit status 1 if data is wrong or a bar (1.25) is missed.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import time

from harness import GIB, HERE, MIB, Arbiter, Job, Watch, program, say

KINDS = ("add", "mm")
BAR = 1.25
# No iteration takes so long that had the GPU all the while: longer ones are looked at more closely.
LONG = 0.2


def job(options):
    """The process that is measured. Each line on its standard input names a kind and how long."""
    import torch

    from add import checksum

    torch.backends.cuda.matmul.allow_tf32 = True
    n = options.n
    x = torch.empty((n, n), dtype=torch.float32, device="cuda")
    y = torch.empty((n, n), dtype=torch.float32, device="cuda")
    # Small integers: float32 adds them exactly, so the result is known.
    x.copy_(torch.arange(n, device="cuda", dtype=torch.float32).add_(options.seed)[None, :].expand(n, n))
    y.copy_(torch.arange(n, device="cuda", dtype=torch.float32).mul_(2)[:, None].expand(n, n))
    # An iteration writes one while the last result is still held by the other, so all four buffers are in use.
    results = [torch.empty((n, n), dtype=torch.float32, device="cuda") for _ in range(2)]
    work = {"add": lambda out: torch.add(x, y, out=out), "mm": lambda out: torch.mm(x, y, out=out)}
    sums = {"x": checksum(x), "y": checksum(y)}
    for kind in KINDS:
        for out in results:
            work[kind](out)
        sums[kind] = checksum(results[0])
    torch.cuda.synchronize()
    rows = torch.tensor([0, n // 2, n - 1])
    expected = (torch.arange(n, dtype=torch.float32) + options.seed)[None, :] + (rows.to(torch.float32) * 2)[:, None]
    print(json.dumps({"ready": True, "allocated_mib": torch.cuda.memory_allocated() >> 20}), flush=True)
    for line in sys.stdin:
        kind, seconds = line.split()
        times, ends, began = [], [], time.monotonic()
        until = began + float(seconds)
        while began < until:
            for out in results:
                work[kind](out)
            torch.cuda.synchronize()
            ended = time.monotonic()
            times.append((ended - began) / len(results))
            ends.append(ended)
            began = ended
        right = sums["x"] == checksum(x) and sums["y"] == checksum(y)
        right = right and all(sums[kind] == checksum(out) for out in results)
        if kind == "add":
            right = right and all(torch.equal(out[rows.cuda()].cpu(), expected) for out in results)
        print(json.dumps({"kind": kind, "right": right, "times": times, "ends": ends}), flush=True)


def start(options, environment, seed, name):
    command = [*program("shortfall.py"), "--job", "--n", options.n, "--seed", seed]
    return Job(command, environment, name)


def told(jobs, kind, seconds):
    """Lets all jobs do the same for so long. Returns their answers."""
    for each in jobs:
        each.tell(f"{kind} {seconds}")
    return [each.answer(seconds + 120) for each in jobs]


@contextlib.contextmanager
def crew(options, environment):
    """Three jobs that are ready."""
    jobs = [start(options, environment, seed + 1, f"job{seed + 1}") for seed in range(3)]
    try:
        for each in jobs:
            each.answer(180)
        yield jobs
    finally:
        for each in jobs:
            each.close(10)


def inside(answer, away=()):
    """Times of the iterations inside slices, and how many others there were. `away` are moments in which the process
    did not have the GPU: an iteration around one is not inside a slice, however short the wait was."""
    times, waits = [], 0
    for each, end in zip(answer["times"], answer["ends"]):
        begin = end - 2 * each
        if each >= LONG and any(begin < moment < end for moment in away):
            waits += 1
        else:
            times.append(each)
    return times, waits


def absences(watch, name):
    """The moments in which a look at the page found a client without the GPU."""
    return [
        at
        for at, gpus in watch.samples
        for gpu in gpus
        for client in gpu["clients"]
        if client["name"] == name and client["phase"] != "running"
    ]


def rows_of(watch):
    """The last row of each job."""
    return {name: row for name in ("job1", "job2", "job3") for row in watch.last(name).values()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--seconds", type=float, default=24, help="how long the three take turns, for each kind")
    parser.add_argument("--short-mib", type=int, default=72)
    parser.add_argument("--quantum", default="3s")
    parser.add_argument("--n", type=int, default=28_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job", action="store_true", help="be the process that is measured")
    options = parser.parse_args()
    if options.job:
        return job(options)
    binaries = options.bin.resolve()
    size = 4 * options.n * options.n * 4

    alone = start(options, {}, 1, "native")
    alone.answer(180)
    native = {kind: told([alone], kind, 3) for kind in KINDS}
    alone.close()

    with Arbiter(binaries, 3 * size + 6 * GIB) as arbiter, crew(options, arbiter.environment()) as jobs:
        for kind in KINDS:
            told(jobs, kind, 0.5)
        with Watch(arbiter, 0.25) as watch:
            time.sleep(4)  # The arbiter looks at the contexts once a second.
        rows = rows_of(watch)
    demand = max(row["demand_bytes"] for row in rows.values())
    contexts = sum(row["pinned_bytes"] for row in rows.values())
    capacity = contexts + demand - options.short_mib * MIB
    say("room_for_all", clients=list(rows.values()), demand_mib=demand >> 20, contexts_mib=contexts >> 20)

    # A client that is alone in its slice and has too little room goes on with the rest in host memory.
    environment = {"NVSHARE_ENABLE_SINGLE_OVERSUB": "1"}
    shared = {}
    # Nobody gives way before the end of a slice, so a wait is always longer than the slices of two others.
    turns = ["--quantum", options.quantum, "--idle-grace", "1s"]
    with Arbiter(binaries, capacity, turns) as arbiter:
        with crew(options, arbiter.environment() | environment) as jobs, Watch(arbiter, 0.05) as watch:
            for kind in KINDS:
                shared[kind] = told(jobs, kind, options.seconds)
    rows = rows_of(watch)
    contexts = sum(row["pinned_bytes"] for row in rows.values())
    short = {name: row["demand_bytes"] + contexts - capacity >> 20 for name, row in rows.items()}
    say("too_small", capacity_mib=capacity >> 20, short_mib=short, clients=list(rows.values()))

    good = True
    for kind in KINDS:
        right = all(answer["right"] for answer in native[kind] + shared[kind])
        before = inside(native[kind][0])[0]
        after = [
            inside(answer, absences(watch, f"job{index + 1}")) for index, answer in enumerate(shared[kind])
        ]
        times = [time for each, _ in after for time in each]
        if not before or not times:
            print(f"{kind}: no iteration inside a slice", flush=True)
            good = False
            continue
        ratios = {
            "median": statistics.median(times) / statistics.median(before),
            "mean": statistics.fmean(times) / statistics.fmean(before),
        }
        met = right and max(ratios.values()) <= BAR
        good &= met
        say(
            kind,
            right=right,
            native_ms=statistics.median(before) * 1000,
            each_ms=[statistics.median(each) * 1000 if each else None for each, _ in after],
            worst_ms=[max(each) * 1000 if each else None for each, _ in after],
            iterations=[2 * len(each) for each, _ in after],
            waits=[waits for _, waits in after],
        )
        print(
            f"{kind}: iterations inside a slice take {ratios['median']:.3f} x native in the median, "
            f"{ratios['mean']:.3f} x in the mean (bar {BAR}); {2 * len(times)} iterations, "
            f"{sum(row['yields'] for row in rows.values())} switches{'' if right else '; WRONG RESULTS'}",
            flush=True,
        )
    near = all(options.short_mib - 48 <= mib <= options.short_mib + 48 for mib in short.values())
    print(f"short of room by {short} MiB, meant were {options.short_mib}" + ("" if near else ": NOT THE SITUATION"))
    return 0 if good and near else 1


if __name__ == "__main__":
    sys.exit(main())
