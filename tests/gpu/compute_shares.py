"""Compute shares on a real GPU: priority, weights and limits of clients whose memory fits.

    python3 tests/gpu/compute_shares.py [--bin target/release] [--seconds 8] [--only ROW ...]

The programs are `nvshare internal compute`: kernels of one length that take GPU time (and not time), so the kernels that are done
say how much of the GPU a program had. Each row runs natively and under nvshare. Rows:

*priority*: bursts of 2.65 ms, 20 a second, with high priority, beside a job of 1.65 ms kernels with low priority. Bars: p50 at most
alone + one kernel of the job, p99 at most alone + two; the job keeps 90 % of what the bursts leave.
*long_bursts*: bursts of 50 ms, twice a second, beside kernels of 3 ms. Bar: p99 at most 1.12 x alone.
*weights*: two busy programs of weights 300 and 100, with kernels of 5 us, 1.6 ms and 100 ms, and with graphs of twenty kernels of
50 us. Bars: 3:1 within 5 %, and at most 3 % of what both do natively side by side is lost.
*limits*: limits of 10, 30 and 50 %, alone and beside an unlimited program, with kernels of 500 us and graphs of twenty of 50 us. Bar:
within 2 points, or one kernel, over any two seconds.
*unset*: two programs of usual shares, natively and under nvshare (they take no turns).

Prints a JSON object for each run, and a table. It takes five minutes. --simulated runs it on the simulated GPU, to try the program.
"""

import argparse
import bisect
import contextlib
import pathlib
import statistics
import sys
import time

from harness import HERE, Arbiter, Job, percentile, report, say, simulated_gpu

WINDOW_S = 2.0
# Until programs that begin together are in step.
SETTLE_S = 1.0


class Bench:
    def __init__(self, binaries, seconds):
        self.binaries, self.seconds = binaries, seconds
        self.lengths = {}

    def program(self, arguments, environment, name):
        command = [self.binaries / "nvshare", "internal", "compute", *map(str, arguments)]
        return Job(command, environment, name)

    def kernel(self, kernel_us):
        """The arguments that give kernels of this length, and how long one takes alone, s."""
        if kernel_us not in self.lengths:
            job = self.program(["--kernel-us", kernel_us], {}, "alone")
            iterations = job.answer(60)["iterations"]
            job.tell("go")
            time.sleep(max(1.5, 10 * kernel_us / 1e6))
            done = ended(job)
            alone = done["samples"]
            middle = alone[len(alone) // 4], alone[-2]
            each = (middle[1][0] - middle[0][0]) / max(1, middle[1][1] - middle[0][1])
            self.lengths[kernel_us] = (["--kernel-us", kernel_us, "--iterations", iterations], each)
            say("alone", kernel_us=kernel_us, iterations=iterations, each_us=each * 1e6)
        return self.lengths[kernel_us]

    def together(self, programs, environment, seconds, arbiter=None):
        """Runs programs, (name, arguments, shares), at once. What each said at its end, and what status said of it before."""
        jobs = {}
        for name, arguments, shares in programs:
            jobs[name] = self.program(arguments, environment | shares, name)
        for job in jobs.values():
            job.answer(60)
        for job in jobs.values():
            job.tell("go")
        time.sleep(seconds)
        clients = {client["name"]: client for client in arbiter.clients()} if arbiter else {}
        for job in jobs.values():
            job.process.stdin.close()
        return {name: ended(job, close=False) for name, job in jobs.items()}, clients


def ended(job, close=True):
    if close:
        job.process.stdin.close()
    done = job.answer(30, lambda event: event["event"] == "done")
    job.process.wait(60)
    return done


def at(samples, moment):
    """How many kernels were done at a moment, s, as far as the samples tell."""
    index = bisect.bisect_right(samples, [moment, float("inf")])
    if index == 0 or index == len(samples):
        return samples[max(0, index - 1)][1]
    (t0, n0), (t1, n1) = samples[index - 1], samples[index]
    return n0 + (n1 - n0) * (moment - t0) / max(1e-9, t1 - t0)


def span(results):
    """When all of them computed, s."""
    begun = max(done["samples"][0][0] for done in results) + SETTLE_S
    return begun, min(done["samples"][-1][0] for done in results)


def windows(samples, begun, over, each):
    """The part of the GPU's time that a program had in each window of two seconds."""
    moments = [moment for moment, _ in samples if begun <= moment <= over - WINDOW_S]
    return [(at(samples, moment + WINDOW_S) - at(samples, moment)) * each / WINDOW_S for moment in moments]


HIGH, LOW = {"NVSHARE_PRIORITY": "high"}, {"NVSHARE_PRIORITY": "low"}


def bursts_beside(bench, name, kernel_us, burst, burst_us, period_ms, bars):
    """Bursts beside a busy job: alone, natively, and under nvshare with priorities."""
    batch, each = bench.kernel(kernel_us)
    quick, _ = bench.kernel(burst_us)
    bursts = [*quick, "--burst", burst, "--period-ms", period_ms]
    seconds = bench.seconds * (2 if period_ms > 100 else 1)
    alone, _ = bench.together([("bursts", bursts, {})], {}, seconds)
    native, _ = bench.together([("bursts", bursts, {}), ("batch", batch, {})], {}, seconds)
    with Arbiter(bench.binaries) as arbiter:
        environment = arbiter.environment()
        shared, clients = bench.together([("bursts", bursts, HIGH), ("batch", batch, LOW)], environment, seconds, arbiter)

    def figures(results):
        times = results["bursts"]["bursts"][3:]
        found = {"bursts": len(times), "p50_ms": percentile(times, 50) * 1e3, "p99_ms": percentile(times, 99) * 1e3, "max_ms": max(times) * 1e3}
        if "batch" in results:
            samples = results["batch"]["samples"]
            found["batch_share"] = (samples[-1][1] - samples[0][1]) * each / (samples[-1][0] - samples[0][0])
        return found

    alone, native, shared = figures(alone), figures(native), figures(shared)
    takes = burst * burst_us / 1e3 / period_ms
    kept = shared["batch_share"] / (1 - takes)
    say(name, kernel_ms=each * 1e3, alone=alone, native=native, nvshare=shared, batch_keeps=kept, clients=clients)
    return True, (
        f"{name}: bursts p50 {shared['p50_ms']:.2f}, p99 {shared['p99_ms']:.2f}, max {shared['max_ms']:.2f} ms under nvshare; alone {alone['p50_ms']:.2f}, "
        f"{alone['p99_ms']:.2f}; natively beside {native['p50_ms']:.2f}, {native['p99_ms']:.2f} ({bars(alone, each * 1e3)}); "
        f"the batch job keeps {kept * 100:.1f} % of what the bursts leave (bar 90 %; natively {native['batch_share'] / (1 - takes) * 100:.1f} %)"
    )


def priority(bench):
    bars = lambda alone, kernel: f"bars p50 {alone['p50_ms'] + kernel:.2f}, p99 {alone['p99_ms'] + 2 * kernel:.2f}"
    yield bursts_beside(bench, "priority", 1_650, 5, 530, 50, bars)


def long_bursts(bench):
    bars = lambda alone, kernel: f"bar p99 {alone['p99_ms'] * 1.12:.2f}"
    yield bursts_beside(bench, "long_bursts", 3_000, 16, 3_125, 500, bars)


def side_by_side(bench, arguments, each, shares, seconds):
    programs = [("heavy", arguments, shares[0]), ("light", arguments, shares[1])]
    native, _ = bench.together(programs, {}, seconds)
    with Arbiter(bench.binaries) as arbiter:
        shared, clients = bench.together(programs, arbiter.environment(), seconds, arbiter)

    def parts(results):
        begun, over = span(results.values())
        return {name: (at(done["samples"], over) - at(done["samples"], begun)) * each / (over - begun) for name, done in results.items()}

    return parts(native), parts(shared), clients


GRAPH = ["--graph", 20]


def weights(bench):
    for kernel_us, graph in [(5, []), (1_600, []), (100_000, []), (50, GRAPH)]:
        arguments, each = bench.kernel(kernel_us)
        shares = {"NVSHARE_WEIGHT": "300"}, {"NVSHARE_WEIGHT": "100"}
        seconds = bench.seconds * (2 if kernel_us > 10_000 else 1)
        native, shared, clients = side_by_side(bench, [*arguments, *graph], each, shares, seconds)
        ratio = shared["heavy"] / max(1e-9, shared["light"])
        total, before = sum(shared.values()), sum(native.values())
        say("weights", kernel_us=kernel_us, graph=bool(graph), each_us=each * 1e6, native=native, nvshare=shared, ratio=ratio, clients=clients)
        yield True, (
            f"weights 300:100, {'graphs of 20 ' if graph else ''}kernels of {kernel_us} us: {ratio:.3f}:1 (bar 3 within 5 %), both had {total * 100:.1f} % of the GPU, "
            f"natively {before * 100:.1f} %: {(1 - total / before) * 100:+.2f} % lost (bar 3 %)"
        )


def limits(bench):
    for kernel_us, graph in [(500, []), (50, GRAPH)]:
        arguments, each = bench.kernel(kernel_us)
        for beside in (False, True):
            for limit in (10, 30, 50):
                programs = [("limited", [*arguments, *graph], {"NVSHARE_COMPUTE_LIMIT": f"{limit}%"})]
                if beside:
                    programs.append(("other", arguments, {}))
                with Arbiter(bench.binaries) as arbiter:
                    results, clients = bench.together(programs, arbiter.environment(), bench.seconds * 0.75, arbiter)
                begun, over = span(results.values())
                found = windows(results["limited"]["samples"], begun, over, each) or [0.0]
                say("limits", kernel_us=kernel_us, graph=bool(graph), beside=beside, limit=limit, least=min(found), most=max(found), clients=clients)
                yield True, (
                    f"limit {limit} %, {'beside another' if beside else 'alone'}, {'graphs of 20 ' if graph else ''}kernels of {kernel_us} us: any two seconds "
                    f"{min(found) * 100:.2f} to {max(found) * 100:.2f} %, mean {statistics.mean(found) * 100:.2f} % (bar {limit} +- 2); "
                    f"status says {clients['limited']['gpu_share'] * 100:.1f} %"
                )


def unset(bench):
    arguments, each = bench.kernel(5)
    native, shared, clients = side_by_side(bench, arguments, each, ({}, {}), bench.seconds)
    say("unset", native=native, nvshare=shared, clients=clients)
    turns = sum(client["turns"] for client in clients.values())
    total, before = sum(shared.values()), sum(native.values())
    yield turns == 0, f"no shares set, kernels of 5 us: {(total / before - 1) * 100:+.2f} % of native, {turns} compute turns (bar 0)"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--seconds", type=float, default=8, help="of each run")
    runs = [priority, long_bursts, weights, limits, unset]
    names = [run.__name__ for run in runs]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--simulated", action="store_true", help="on the simulated GPU")
    arguments = parser.parse_args()
    binaries = arguments.bin.resolve()
    bench = Bench(binaries, arguments.seconds)
    with simulated_gpu(binaries, MEMORY="6GiB", CONTEXT_BYTES="16MiB") if arguments.simulated else contextlib.nullcontext():
        return report(row for run in runs if run.__name__ in arguments.only for row in run(bench))


if __name__ == "__main__":
    sys.exit(main())
