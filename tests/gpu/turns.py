"""How long the slices are of jobs that take turns, and how fair they are, without a GPU: real processes on the simulated one.

    python3 tests/gpu/turns.py [--bin target/release] [--jobs 4] [--seconds 60]

Jobs of 64 MiB (`nvshare internal job`, which checks its own data) in a pool of 90 MiB, with an automatic quantum and a link
of 256 MiB/s, so that a switch takes 0.2 s. Prints each slice, s, and Jain's index over any as many slices as there are jobs.
What depends on the policy is as on a GPU; what takes time is this machine's, and noisy. Exit status 1 if data was wrong.
"""

import argparse
import pathlib
import sys
import time

from harness import HERE, MIB, Arbiter, Job, Watch, fairness, report, say, simulated_gpu, slices

SIZE = 64 * MIB
CAPACITY = "90MiB"
# Kernels walk over all of a job's memory in 15 ms.
GPU = {"MEMORY": CAPACITY, "CONTEXT_BYTES": "2MiB", "LINK_BANDWIDTH": 256 * MIB, "DEVICE_BANDWIDTH": SIZE * 1000 // 15}


def take_turns(binaries, number, seconds):
    with Arbiter(binaries, CAPACITY) as arbiter, Watch(arbiter) as watch:
        environment = arbiter.environment() | {"NVSHARE_LOG": "debug"}
        command = [binaries / "nvshare", "internal", "job", "--controlled", f"--size={SIZE}"]
        jobs = [Job([*command, f"--seed={seed + 1}"], environment, f"job {seed + 1}") for seed in range(number)]
        for job in jobs:
            job.answer(60, lambda event: event["event"] == "ready")
        for job in jobs:
            job.tell("")
        began = time.monotonic()
        time.sleep(seconds)
        ended = time.monotonic()
        for job in jobs:
            job.process.stdin.close()
        right = all([job.answer(120, lambda event: event["event"] == "done")["right"] for job in jobs])
        logs = []
        for job in jobs:
            job.close()
            job.log.seek(0)
            logs += job.log.read().splitlines()
    done = [one for one in slices(logs) if one.began >= began and one.ended <= ended]
    index = fairness(done, [job.process.pid for job in jobs], number)
    say(
        "take_turns",
        right=right,
        slices_s=[[one.pid, round(one.began - began, 2), round(one.ran, 3), round(one.drained, 4)] for one in done],
        jain=[round(one, 4) for one in index],
        link_mib_per_s=[[round(at - began, 1), *(round(one / MIB) for one in link)] for at, link in watch.link()],
    )
    lengths = " ".join(f"{one.ran:.2f}" for one in done)
    return right, f"{number} jobs: slices of {lengths} s; Jain's index over any {number} at least {min(index, default=0):.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    binaries = arguments.bin.resolve()
    with simulated_gpu(binaries, **GPU):
        return report([take_turns(binaries, arguments.jobs, arguments.seconds)])


if __name__ == "__main__":
    sys.exit(main())
