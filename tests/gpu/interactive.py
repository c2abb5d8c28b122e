"""An interactive client beside a batch job: how long its bursts take, natively and under nvshare.

    python3 tests/gpu/interactive.py [--bin target/release] [--bursts 60] [--only NAME ...]

The batch job adds matrices of 12 GiB in all without a pause, and launches as far ahead as the driver lets it. The
interactive client has 4 GiB, and every 2 s a burst of kernels that take 50 ms alone. Three runs, with unmodified
PyTorch: side by side natively; under nvshare in the whole GPU, where both fit; under nvshare in a pool of 14.9 GiB,
where they do not. Prints one JSON object for each run, and a table. Exit status 1 if any result was wrong.

The bar where they do not fit is two switches and the batch job's minimum slice, in the 99th percentile. A switch is
what the log says: from when the batch job's gate shuts until the client's memory is in place. The minimum slice is
`--quantum`'s: five times the switch.
"""

import argparse
import json
import os
import pathlib
import re
import sys
import time

from harness import HERE, Arbiter, Job, percentile, program, report, say, slices

CAPACITY = "14.9GiB"
PERIOD_S = 2.0
BURST_S = 0.05
FILLED = re.compile(r"nvshare\[(\d+)\].* DEBUG filled .*at_ns=(\d+)")


def told():
    """The next line of the standard input, or nothing at its end."""
    return sys.stdin.readline()


def answer(**what):
    print(json.dumps(what), flush=True)


def batch(torch):
    """Adds until the standard input ends. Never waits for the GPU itself."""
    import select

    n = 28_000
    x = torch.full((n, n), 1.0, device="cuda")
    y = torch.full((n, n), 2.0, device="cuda")
    z = torch.add(x, y)
    torch.cuda.synchronize()
    answer(ready=True)
    told()
    began, iterations, over = time.monotonic(), 0, False
    while not over:
        for _ in range(10):
            z = torch.add(x, y)
        iterations += 10
        over = bool(select.select([sys.stdin], [], [], 0)[0])
    torch.cuda.synchronize()
    took = time.monotonic() - began
    right = bool((z == 3.0).all()) and bool((x == 1.0).all())
    answer(right=right, iterations_per_s=iterations / took, seconds=took)


def interactive(torch):
    """A burst, each time that it is told how many kernels; says how long it took, s."""
    elements = 512 << 20
    x = torch.full((elements,), 1.0, device="cuda")
    y = torch.full((elements,), 0.0, device="cuda")

    def burst(kernels):
        began = time.monotonic()
        y.zero_()
        for _ in range(kernels):
            y.add_(x)
        torch.cuda.synchronize()
        return time.monotonic() - began

    # Alone on the GPU: how many kernels take as long as a burst is to take.
    burst(20)
    each = sorted((burst(40) - burst(20)) / 20 for _ in range(5))[2]
    kernels = max(1, round(BURST_S / each))
    alone = sorted(burst(kernels) for _ in range(5))[2]
    answer(ready=True, kernels=kernels, alone_s=alone, pid=os.getpid())
    while told().strip():
        took = burst(kernels)
        answer(ended=time.monotonic(), seconds=took)
    answer(right=bool((y == float(kernels)).all()))


def side_by_side(environment, bursts):
    """So many bursts beside the batch job; what both said at their ends; their logs; and when it began."""
    role = [*program("interactive.py"), "--role"]
    client = Job([*role, "interactive"], environment, "interactive")
    setup = client.answer(120)
    job = Job([*role, "batch"], environment, "batch")
    job.answer(120)
    job.tell("go")
    began = time.monotonic()
    bursts_done, due = [], began + PERIOD_S
    for _ in range(bursts):
        time.sleep(max(0.0, due - time.monotonic()))
        client.tell("burst")
        bursts_done.append(client.answer(120))
        due += PERIOD_S
    client.tell("")
    ends = [client.answer(120)]
    job.tell("")
    ends.append(job.answer(120))
    client.close(), job.close()
    logs = []
    for log in (client.log, job.log):
        log.seek(0)
        logs += log.read().splitlines()
    return setup, bursts_done, ends, logs, began


def one_run(name, environment, bursts):
    setup, bursts_done, (client, job), log, began = side_by_side(environment, bursts)
    times = [one["seconds"] for one in bursts_done]
    done = [one for one in slices(log) if one.began > began]
    fills = [(int(found[2]) / 1e9, int(found[1])) for found in map(FILLED.search, log) if found]
    switches = []
    for one in done:
        after = [at for at, pid in fills if at > one.ended and pid != one.pid]
        if after:
            switches.append(min(after) - one.ended)
    figures = {
        "burst_alone_s": setup["alone_s"],
        "p50_s": percentile(times, 50),
        "p99_s": percentile(times, 99),
        "max_s": max(times),
        "batch_iterations_per_s": job["iterations_per_s"],
    }
    if switches:
        figures["switch_p50_s"] = percentile(switches, 50)
        figures["switch_p99_s"] = percentile(switches, 99)
        # From when it has its result to when it has given way.
        own = [one.ended for one in done if one.pid == setup["pid"]]
        after = [min((end for end in own if end >= one["ended"]), default=None) for one in bursts_done[:-1]]
        gives_way = [end - one["ended"] for end, one in zip(after, bursts_done) if end is not None]
        figures["gives_way_p50_s"], figures["gives_way_p99_s"] = percentile(gives_way, 50), percentile(gives_way, 99)
        figures["drain_p99_s"] = percentile([one.drained for one in done], 99)
    right = client["right"] and job["right"]
    say(name, right=right, bursts_s=[round(one, 4) for one in times], switches=len(switches), **figures)
    return right, figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--bursts", type=int, default=60)
    runs = ["native", "fits", "takes_turns"]
    parser.add_argument("--only", nargs="*", choices=runs, default=runs)
    parser.add_argument("--role", choices=["batch", "interactive"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        import torch

        return {"batch": batch, "interactive": interactive}[arguments.role](torch)
    binaries = arguments.bin.resolve()

    def row(name):
        if name == "native":
            right, figures = one_run(name, {}, arguments.bursts)
        else:
            with Arbiter(binaries, CAPACITY if name == "takes_turns" else None) as arbiter:
                right, figures = one_run(name, arbiter.environment() | {"NVSHARE_LOG": "debug"}, arguments.bursts)
        line = f"{name:12} p50 {figures['p50_s'] * 1e3:7.1f} ms, p99 {figures['p99_s'] * 1e3:7.1f} ms, batch {figures['batch_iterations_per_s']:6.1f} iterations/s"
        if "switch_p99_s" in figures:
            switch = figures["switch_p99_s"]
            line += f"; switch p99 {switch * 1e3:.0f} ms: bar {(2 + 5) * switch * 1e3 + figures['burst_alone_s'] * 1e3:.0f} ms; gives way {figures['gives_way_p99_s'] * 1e3:.1f} ms after a burst, p99 (bar 20 ms)"
        return right, line

    return report(map(row, arguments.only))


if __name__ == "__main__":
    sys.exit(main())
