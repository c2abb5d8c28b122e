"""Several processes share a real GPU: what issue 2 promises, measured with unmodified PyTorch.

    python3 tests/gpu/sharing.py [--bin target/release] [--iterations 4000] [--only NAME ...]

Runs, side by side on the same machine: one process native and under nvshare; four that fit; two of 12 GiB
that take turns in 14.9 GiB; four of 12 GiB against running them one after another, and with four times as many
iterations. Prints the raw figures
as it goes, one JSON object a line, and a table at the end. Exit status 1 if any result was wrong.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

from harness import GIB, HERE, Arbiter, Watch, fairness, last_object, program, report, say, slices

CAPACITY = "14.9GiB"

# What `nvshare status` calls the jobs.
NAME = "add"


def start(arguments, environment=None, log=None):
    return subprocess.Popen(
        [*program("add.py"), *map(str, arguments)],
        env=os.environ | {"CUDA_MODULE_LOADING": "LAZY"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )


def finish(process):
    output, _ = process.communicate()
    result = last_object(output) or {"right": False}
    result["status"] = process.returncode
    return result


def together(count, arguments, environment=None, log=None):
    """Runs `count` jobs at once, from the moment when all are set up. Their results."""
    with tempfile.TemporaryDirectory() as directory:
        gate = ["--barrier", directory + "/barrier", "--parties", count]
        jobs = [start([*arguments, "--seed", seed + 1, *gate], environment, log) for seed in range(count)]
        return [finish(job) for job in jobs]


def environment(arbiter):
    """Of a job under nvshare; its debug log tells when its slices were."""
    return arbiter.environment() | {"NVSHARE_CLIENT_NAME": NAME, "NVSHARE_LOG": "debug"}


def span(results):
    return max(result["end"] for result in results) - min(result["start"] for result in results)


def one_process(binaries, iterations):
    native, shared = [], []
    with Arbiter(binaries) as arbiter:
        for _ in range(3):
            native.append(finish(start(["--iterations", iterations])))
            shared.append(finish(start(["--iterations", iterations], arbiter.environment())))
    rate = {
        "native": statistics.median(result["iterations_per_s"] for result in native),
        "nvshare": statistics.median(result["iterations_per_s"] for result in shared),
    }
    slower = 1 - rate["nvshare"] / rate["native"]
    say("one_process", iterations_per_s=rate, native=native, nvshare=shared)
    return all(r["right"] for r in native + shared), f"one process: {slower * 100:+.2f} % slower than native (bar 0.5 %)"


def four_fit(binaries, iterations):
    size = ["--n", 14_000, "--iterations", iterations * 2]
    native, shared, yields = [], [], 0
    with Arbiter(binaries) as arbiter:
        for _ in range(2):
            native.append(together(4, size))
            with Watch(arbiter) as watch:
                shared.append(together(4, size, arbiter.environment() | {"NVSHARE_CLIENT_NAME": NAME}))
            yields += watch.yields(NAME)
    times = {"native": statistics.median(map(span, native)), "nvshare": statistics.median(map(span, shared))}
    say("four_fit", seconds=times, switches=yields, native=native, nvshare=shared)
    right = all(r["right"] for run in native + shared for r in run)
    return right, f"four that fit: {(times['nvshare'] / times['native'] - 1) * 100:+.2f} % slower than native, {yields} switches (bars 1 %, 0)"


def switches(log):
    """Bytes a second of each whole switch in a debug log: from the end of the drain to all in place."""
    line = re.compile(r"nvshare\[\d+\] +([\d.]+) +DEBUG (drained|filled)(?: ([\d.]+) GiB)?")
    events = sorted((float(found[1]), found[2], float(found[3] or 0)) for found in map(line.match, log) if found)
    rates, drained = [], None
    for time_s, what, gib in events:
        if what == "drained":
            drained = time_s
        elif drained is not None and gib >= 5:
            rates.append(gib * GIB / (time_s - drained))
            drained = None
    return rates


def two_take_turns(binaries, iterations):
    output = subprocess.run(program("bandwidth.py"), stdout=subprocess.PIPE, check=True).stdout
    link = json.loads(output)
    right, lines = True, []
    # With a full queue of launches, and with an application that waits for the GPU now and then.
    for name, more in [("queue full", ["--iterations", iterations]), ("waits every 10", ["--iterations", 1000, "--sync-every", 10])]:
        with Arbiter(binaries, CAPACITY, ["--quantum", "300ms"]) as arbiter, tempfile.TemporaryFile("w+") as log:
            results = together(2, more, environment(arbiter), log)
            log.seek(0)
            rates = switches(log)
        right &= all(r["right"] for r in results)
        # The first switches fill memory that is new and has no bytes to copy yet.
        rate = statistics.median(rates)
        say("two_take_turns", variant=name, link=link, switch_bytes_per_s=rates, results=results)
        lines.append(
            f"two of 12 GiB in {CAPACITY}, {name}: {len(rates)} switches at {rate / GIB:.1f} GiB/s, "
            f"{rate / link['in'] * 100:.0f} % of the pinned {link['in'] / GIB:.1f} GiB/s one way (bar 75 %), "
            f"{rate / link['both'] * 100:.0f} % of {link['both'] / GIB:.1f} with both ways busy"
        )
    return right, "\n".join(lines)


def four_take_turns(binaries, iterations, serial=4):
    """`serial` of the jobs are measured natively, one after another, and their mean stands for each of the four."""
    alone = [finish(start(["--iterations", iterations, "--seed", seed + 1])) for seed in range(serial)]
    with Arbiter(binaries, CAPACITY) as arbiter, tempfile.TemporaryFile("w+") as log:
        with Watch(arbiter) as watch:
            results = together(4, ["--iterations", iterations], environment(arbiter), log)
        log.seek(0)
        done = slices(log)
    in_turn = statistics.mean(result["loop_s"] for result in alone) * 4
    at_once = span(results)
    # From when all are ready until the first is through, all four want the GPU all the time.
    begun, ended = max(result["start"] for result in results), min(result["end"] for result in results)
    timed = [one for one in done if one.began >= begun]
    contended = [one for one in timed if one.ended < ended]
    index = fairness(contended, [result["pid"] for result in results], 4)
    say(
        "four_take_turns",
        iterations=iterations,
        one_after_another_s=in_turn,
        nvshare_s=at_once,
        alone=alone,
        results=results,
        clients=list(watch.last(NAME).values()),
        link_gib_per_s=[[round(at - begun, 1), *(round(one / GIB, 2) for one in link)] for at, link in watch.link()],
        slices=[{"pid": one.pid, "began": round(one.began - begun, 3), "ran": round(one.ran, 3), "drained": round(one.drained, 4)} for one in timed],
        jain_over_four_slices=[round(one, 4) for one in index],
    )
    right = all(r["right"] for r in alone + results)
    return right, (
        f"four of 12 GiB in {CAPACITY}, {iterations} iterations: {at_once / in_turn:.3f} x one after another ({in_turn:.1f} s), "
        f"{len(timed)} slices (bar 1.10 x); Jain's index over any four slices at least {min(index, default=0):.3f} (bar 0.98)"
    )


def four_take_long_turns(binaries, iterations):
    return four_take_turns(binaries, iterations * 4, serial=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--iterations", type=int, default=4_000)
    runs = [one_process, four_fit, two_take_turns, four_take_turns, four_take_long_turns]
    parser.add_argument("--only", nargs="*", choices=[run.__name__ for run in runs])
    arguments = parser.parse_args()
    binaries = arguments.bin.resolve()
    chosen = [run for run in runs if not arguments.only or run.__name__ in arguments.only]
    return report(run(binaries, arguments.iterations) for run in chosen)


if __name__ == "__main__":
    sys.exit(main())
