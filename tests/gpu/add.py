"""The field report's job: adds two large matrices, again and again, with unmodified PyTorch.

Four buffers of N x N float32 (N = 28,000: 11,968 MiB in all). The inputs are filled with a pattern that
depends on --seed, and are checked at the end to the last bit, so data that was lost or mixed up between
processes is seen. Prints one JSON object.
"""

import argparse
import json
import os
import sys
import time

import torch


def checksum(tensor):
    """The sum of the bits, as 64-bit integers: exact. In strips, because each needs memory of its own."""
    strips = tensor.view(torch.int32).split(500)
    return sum(int(strip.sum(dtype=torch.int64)) for strip in strips)


def barrier(path, parties):
    """Waits until `parties` processes have come here."""
    if path is None:
        return
    with open(path, "ab", buffering=0) as file:
        file.write(b".")
    while os.path.getsize(path) < parties:
        time.sleep(0.001)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=28_000)
    parser.add_argument("--iterations", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sync-every", type=int, default=0, help="wait for the GPU after so many iterations")
    parser.add_argument("--barrier", help="a file: start when --parties processes have reached it, and check when all are through")
    parser.add_argument("--parties", type=int, default=1)
    arguments = parser.parse_args()
    n, seed = arguments.n, arguments.seed

    began = time.monotonic()
    x = torch.empty((n, n), dtype=torch.float32, device="cuda")
    y = torch.empty((n, n), dtype=torch.float32, device="cuda")
    # Small integers: float32 adds them exactly, so the result is known.
    x.copy_(torch.arange(n, device="cuda", dtype=torch.float32).add_(seed)[None, :].expand(n, n))
    y.copy_(torch.arange(n, device="cuda", dtype=torch.float32).mul_(2)[:, None].expand(n, n))
    for _ in range(5):
        z = torch.add(x, y)
    torch.cuda.synchronize()
    before = (checksum(x), checksum(y), checksum(z))
    ready = time.monotonic()
    barrier(arguments.barrier, arguments.parties)

    start = time.monotonic()
    for iteration in range(arguments.iterations):
        z = torch.add(x, y)
        if arguments.sync_every and iteration % arguments.sync_every == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    end = time.monotonic()
    # What is checked is no part of the job: it waits until nobody is measured any more.
    barrier(arguments.barrier and arguments.barrier + "-end", arguments.parties)

    after = (checksum(x), checksum(y), checksum(z))
    rows = torch.tensor([0, n // 2, n - 1])
    columns = torch.arange(n, dtype=torch.float32)
    expected = (columns + seed)[None, :] + (rows.to(torch.float32) * 2)[:, None]
    right = before == after and torch.equal(z[rows.cuda()].cpu(), expected)
    print(
        json.dumps(
            {
                "seed": seed,
                "pid": os.getpid(),
                "iterations": arguments.iterations,
                "right": right,
                "setup_s": ready - began,
                "start": start,
                "end": end,
                "loop_s": end - start,
                "iterations_per_s": arguments.iterations / (end - start),
                "allocated_mib": torch.cuda.max_memory_allocated() >> 20,
            }
        ),
        flush=True,
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
