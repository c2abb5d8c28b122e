"""Servers whose weights never change take requests in turn in a pool that has room for one: how long it takes from a request to
its first result, and how much moves, with and without copies that are kept.

    python3 tests/gpu/servers.py [--bin target/release] [--servers 2] [--gib 12.65] [--capacity 16GiB] [--requests 20] [--only NAME ...]

Each server has --gib GiB of random weights. A request multiplies a vector by all of them, as the first token of an answer
does, and its result must be what it was the first time. The next server's request comes when the last one's is answered. Runs, one after the other: `in`,
a server alone, whose weights are on the GPU; then, under nvshare, `off`, `on` and `verify` (NVSHARE_KEEP_COPIES); `written`, which
is `on` with a server that changes one number in each --every-th granule between its requests. Prints one JSON object for each
run, and a table. The bar for p50 is what a request takes when the weights are in, and what it takes to bring the weights in at
95 % of the link's bandwidth, which is measured before with pinned memory, and 15 ms. Exit status 1 if any result was wrong, or
if a fingerprint was found to lie.
"""

import argparse
import os
import pathlib
import sys
import time

from harness import GIB, HERE, MIB, Arbiter, Job, percentile, program, report, say

GRANULE = 2 * MIB
# Of a square matrix of 2 bytes each.
SIDE = 8192
MATRIX = SIDE * SIDE * 2


def model(torch, gib, seed):
    """Weights of `gib` GiB, and what a request needs all of them for, as the first token of an answer does. A request returns the time that it
    took, s, and its result."""
    torch.manual_seed(seed)
    count = round(gib * GIB / MATRIX)
    weights = [torch.randn(SIDE, SIDE, dtype=torch.float16, device="cuda") / SIDE**0.5 for _ in range(count)]
    vector = torch.randn(SIDE, 1, dtype=torch.float16, device="cuda")

    def request():
        began = time.monotonic()
        result = vector
        for matrix in weights:
            result = torch.tanh(matrix @ result)
        first = result.float().sum().item()
        return time.monotonic() - began, first

    return weights, request


def serve(torch, gib, every):
    """Answers a request for each line that it is told: the time that it took, s, and whether the result was right."""
    import json

    weights, request = model(torch, gib, os.getpid())
    changes = 0

    def change():
        """One number in each `every`-th granule, and back the next time."""
        nonlocal changes
        changes += 1
        for matrix in weights:
            matrix.view(-1)[:: every * GRANULE // 2].mul_(-1.0)

    request()
    expected = {}
    for parity in (0, 1):
        _, expected[parity] = request()
        if every:
            change()
        else:
            expected[1] = expected[0]
            break
    alone = sorted(request()[0] for _ in range(5))[2]
    print(json.dumps({"ready": True, "alone_s": alone, "pid": os.getpid(), "bytes": len(weights) * MATRIX}), flush=True)
    while sys.stdin.readline().strip():
        if every:
            change()
        took, first = request()
        print(json.dumps({"seconds": took, "right": first == expected[changes % 2]}), flush=True)


def bandwidth(torch):
    """Bytes a second of a copy of 4 GiB from pinned memory to the GPU, the best of five."""
    import json

    source = torch.empty(4 * GIB, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(4 * GIB, dtype=torch.uint8, device="cuda")

    def once():
        torch.cuda.synchronize()
        began = time.monotonic()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return time.monotonic() - began

    print(json.dumps({"bytes_per_s": 4 * GIB / min(once() for _ in range(5))}), flush=True)


def one_run(name, arguments, arbiter, environment, link):
    role = [*program("servers.py"), "--role", "serve", f"--gib={arguments.gib}"]
    if name == "written":
        role.append(f"--every={arguments.every}")
    if arguments.log and environment:
        environment |= {"NVSHARE_LOG": "debug"}
    servers = []
    for number in range(1 if name == "in" else arguments.servers):
        servers.append(Job(role, environment, f"server {number + 1}"))
        setup = servers[-1].answer(300)
    moved = lambda: [sum(one[what] for one in arbiter.clients()) for what in ("bytes_in", "bytes_out", "bytes_unchanged")]
    # Each has had its turn, and its first eviction, which makes host memory.
    times, right = [], True
    before = moved() if arbiter else [0] * 3
    # To verify is to compare every byte on the host: a second for each request.
    requests = arguments.requests // 3 if name == "verify" else arguments.requests
    for number in range(requests):
        if number == 2 * len(servers):
            times, before = [], moved() if arbiter else [0] * 3
        server = servers[number % len(servers)]
        asked = time.monotonic()
        server.tell("request")
        answer = server.answer(120)
        times.append(time.monotonic() - asked)
        right &= answer["right"]
        if arguments.log:
            say("request", server=number % len(servers) + 1, asked_ns=round(asked * 1e9), answered_ns=round((asked + times[-1]) * 1e9))
    after = moved() if arbiter else [0] * 3
    for server in servers:
        server.tell("")
        server.close()
        server.log.seek(0)
        said = server.log.read()
        right &= "fingerprints" not in said
        if arguments.log:
            print("\n".join([server.name, *said.splitlines()[-40:]]))
    each = [(one - other) / len(times) / GIB for one, other in zip(after, before)]
    figures = dict(zip(("gib_in", "gib_out", "gib_unchanged"), each))
    figures |= {"p50_s": percentile(times, 50), "p99_s": percentile(times, 99), "in_place_s": setup["alone_s"]}
    bar = setup["alone_s"] + setup["bytes"] / (0.95 * link) + 0.015
    say(name, right=right, bar_s=bar, link_gib_per_s=link / GIB, times_s=[round(one, 4) for one in times], **figures)
    line = f"{name:8} p50 {figures['p50_s'] * 1e3:6.1f} ms (bar {bar * 1e3:.0f}), p99 {figures['p99_s'] * 1e3:6.1f} ms; each request "
    return right, line + f"{each[0]:.2f} GiB in, {each[1]:.2f} out, {each[2]:.2f} unchanged"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--gib", type=float, default=12.65, help="weights of each server")
    parser.add_argument("--capacity", default="16GiB")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--log", action="store_true", help="print when requests came, and the end of each server's log: what a request's time goes to")
    parser.add_argument("--every", type=int, default=0, help=argparse.SUPPRESS)
    runs = ["in", "off", "on", "verify", "written"]
    parser.add_argument("--only", nargs="*", choices=runs, default=runs)
    parser.add_argument("--role", choices=["serve", "bandwidth"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        import torch

        return serve(torch, arguments.gib, arguments.every) if arguments.role == "serve" else bandwidth(torch)
    binaries = arguments.bin.resolve()
    arguments.every = arguments.every or 7
    measure = Job([*program("servers.py"), "--role", "bandwidth"], {}, "bandwidth")
    link = measure.answer(120)["bytes_per_s"]
    measure.close()

    def row(name):
        if name == "in":
            return one_run(name, arguments, None, {}, link)
        with Arbiter(binaries, arguments.capacity) as arbiter:
            keep = "on" if name == "written" else name
            return one_run(name, arguments, arbiter, arbiter.environment() | {"NVSHARE_KEEP_COPIES": keep}, link)

    return report(map(row, arguments.only))


if __name__ == "__main__":
    sys.exit(main())
