"""Replicas: servers with the same weights take requests in turn in a pool that has room for one. What one has on the GPU is handed to
the next one, and does not come over the link (NVSHARE_REPLICAS).

    python3 tests/gpu/replicas.py [--bin target/release] [--servers 2] [--gib 12.65] [--capacity 16GiB] [--requests 24] [--only NAME ...]

Each server has --gib GiB of weights, the same in all. A request multiplies a vector by all of them, as the first token of an answer
does, and its result must be what it was the first time. The next server's request comes when the last one's is answered. Runs, one
after the other: `off`, without replicas; `on`, with them; `own`, which is `on` with servers that each add a number of their own to
every --every-th matrix, so that those differ. After its requests each server sums up all of its weights, word by word, in two ways, and
they must be what they were at the beginning. Prints one JSON object for each run, and a table: time to the first result, GiB over
the link and taken over from others for each request, and what all servers together have in host memory beyond what they had before they
were first evicted. The bar for p50 is 100 ms. Exit status 1 if anything was wrong, or if with replicas nothing was handed over.
"""

import argparse
import pathlib
import sys
import time

from harness import GIB, HERE, Arbiter, Job, percentile, program, report, say
from servers import MATRIX, model

BAR = 0.1
COUNTERS = ("bytes_in", "bytes_out", "bytes_handed_over", "bytes_taken_over")


def serve(torch, gib, number, differ):
    """A server whose every `differ`-th matrix is its own; none if 0. Answers "request" with the time that it took, s, and whether the result was right, and "check" with whether all weights are."""
    import json

    weights, request = model(torch, gib, 20261130)
    if differ:
        for matrix in weights[::differ]:
            matrix.add_(0.001 * (number + 1))
    places = torch.arange(MATRIX // 8, device="cuda") * 2 + 1

    def sums():
        """Of each matrix, the sum of its words, and the sum of each word times an odd number of its own; modulo 2^64."""
        words = [matrix.view(-1).view(torch.int64) for matrix in weights]
        return [(one.sum().item(), (one * places).sum().item()) for one in words]

    request()
    _, expected = request()
    all_words = sums()
    # Their room would be taken from the others for good.
    torch.cuda.empty_cache()
    alone = sorted(request()[0] for _ in range(5))[2]
    print(json.dumps({"ready": True, "alone_s": alone, "bytes": len(weights) * MATRIX}), flush=True)
    while wish := sys.stdin.readline().strip():
        if wish == "check":
            print(json.dumps({"right": sums() == all_words}), flush=True)
        else:
            took, first = request()
            print(json.dumps({"seconds": took, "right": first == expected}), flush=True)


def host_bytes(pid):
    """What a process has of the machine's memory; of what several have, its part."""
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/{pid}/smaps_rollup has no Pss")


def one_run(name, arguments, arbiter, environment):
    role = [*program("replicas.py"), "--role", "serve", f"--gib={arguments.gib}"]
    servers, before_host = [], 0
    for number in range(arguments.servers):
        # One after the other: each has all of its weights on the GPU when it says that it is ready.
        own = [f"--number={number}", f"--differ={arguments.every}"] if name == "own" else []
        servers.append(Job([*role, *own], environment, f"server {number + 1}"))
        setup = servers[-1].answer(300)
        before_host += host_bytes(servers[-1].process.pid)
    moved = lambda: [sum(one[what] for one in arbiter.clients()) for what in COUNTERS]
    times, right, before = [], True, moved()
    for number in range(arguments.requests):
        # In the first two rounds copies in host memory are made, and each meets the others.
        if number == 2 * len(servers):
            times, before = [], moved()
        server = servers[number % len(servers)]
        asked = time.monotonic()
        server.tell("request")
        answer = server.answer(120)
        times.append(time.monotonic() - asked)
        right &= answer["right"]
    after = moved()
    host = sum(host_bytes(server.process.pid) for server in servers) - before_host
    for server in servers:
        server.tell("check")
        right &= server.answer(120)["right"]
    complaints = []
    for server in servers:
        server.tell("")
        server.close()
        server.log.seek(0)
        said = server.log.read()
        complaints += [line for line in said.splitlines() if " ERROR " in line or "replica" in line]
        if arguments.log:
            print("\n".join([server.name, *said.splitlines()[-40:]]))
    right &= not any(" ERROR " in line for line in complaints)
    each = dict(zip(COUNTERS, [(one - other) / len(times) / GIB for one, other in zip(after, before)]))
    right &= name == "off" or each["bytes_taken_over"] > 0
    p50, p99 = percentile(times, 50), percentile(times, 99)
    figures = {f"gib_{what.removeprefix('bytes_')}": value for what, value in each.items()}
    say(name, right=right, p50_s=p50, p99_s=p99, bar_s=BAR, in_place_s=setup["alone_s"], host_gib=host / GIB,
        weights_gib=setup["bytes"] / GIB, times_s=[round(one, 4) for one in times], complaints=complaints[:10], **figures)
    line = f"{name:4} p50 {p50 * 1e3:6.1f} ms, p99 {p99 * 1e3:6.1f} ms (bar {BAR * 1e3:.0f}); each request {each['bytes_in']:.2f} GiB in, "
    line += f"{each['bytes_out']:.2f} out, {each['bytes_taken_over']:.2f} taken over; {host / GIB:.1f} GiB in host memory for all"
    return right, line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--gib", type=float, default=12.65, help="weights of each server")
    parser.add_argument("--capacity", default="16GiB")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--every", type=int, default=10, help="in the run `own`, which matrices differ")
    parser.add_argument("--log", action="store_true", help="print the end of each server's log")
    runs = ["off", "on", "own"]
    parser.add_argument("--only", nargs="*", choices=runs, default=runs)
    parser.add_argument("--role", choices=["serve"], help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--differ", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        import torch

        return serve(torch, arguments.gib, arguments.number, arguments.differ)
    binaries = arguments.bin.resolve()

    def row(name):
        with Arbiter(binaries, arguments.capacity) as arbiter:
            environment = arbiter.environment() | {"NVSHARE_LOG": "debug" if arguments.log else "info"}
            if name != "off":
                environment |= {"NVSHARE_REPLICAS": "weights"}
            return one_run(name, arguments, arbiter, environment)

    return report(map(row, arguments.only))


if __name__ == "__main__":
    sys.exit(main())
