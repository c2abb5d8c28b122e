"""Jobs of several ranks on all GPUs of a machine, PyTorch's DistributedDataParallel with NCCL, that do not fit together.

    python3 tests/gpu/gangs.py [--bin target/release] [--gpus N] [--iterations 400] [--only NAME ...] [--traces FOLDER]

Needs two GPUs or more; uses all of them, or the first N. A rank is a process with a GPU of its own, as torchrun starts them, and has
8 GiB of it; pools are of 12 GiB. Each job checks a digest of its parameters, which must be that of the job alone without
nvshare, to the last bit: one ring of NCCL and deterministic kernels add up in the same order every time.

- `two_jobs`: both progress in every ten seconds while both live, and take together at most 1.15 x one after another.
- `three_jobs`: the same with three.
- `beside_one_process`: a job of ranks, and one process that uses all GPUs and copies between them.
- `a_rank_dies`: one rank of a job is killed in the middle. The other job goes on and ends well; what is left of the first one
  is ended as torchrun would, and its memory is free then.

Prints the raw figures as it goes, one JSON object a line, and a table at the end: of each scenario also how long filling, evicting,
draining and filling ahead took on each GPU, s, the first ones apart from the others (`spans`). `--traces` keeps what `nvshare trace`
says, a file for each scenario. Exit status 1 if a result was wrong or a bar was missed. `--check-arguments` only reads the arguments, for machines without PyTorch.
"""

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

from harness import GIB, HERE, Arbiter, Watch, last_object, report, say, start

CAPACITY = "12GiB"

# Of each rank, with its parameters, gradients and momentum.
SIZE = 8 * GIB

# The bar for jobs together against one after another.
TOGETHER = 1.15

# Seconds in which each job must have done at least one iteration.
WINDOW = 10

NAME = "rank"


# --- A rank -----------------------------------------------------------------------------------------


def digest(torch, tensors):
    """Of all bits of these tensors."""
    sums = hashlib.sha256()
    for tensor in tensors:
        sums.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return sums.hexdigest()[:16]


def deterministic(torch):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(12)


def network(torch, width=4096, layers=4):
    return torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(layers)])


def ballast(torch, device):
    """Memory that each iteration uses, so that all of it must be in place: what SIZE leaves beside the network."""
    used = torch.cuda.memory_reserved(device)
    words = (SIZE - used - (1 << 29)) // 8
    tensor = torch.arange(words, dtype=torch.int64, device=device)
    return tensor, int(tensor.sum())


def rank_main(options):
    import torch
    import torch.distributed as distributed

    deterministic(torch)
    torch.cuda.set_device(options.rank)
    device = torch.device("cuda", options.rank)
    distributed.init_process_group(
        "nccl",
        init_method=f"file://{options.meet}",
        rank=options.rank,
        world_size=options.ranks,
        timeout=datetime.timedelta(seconds=600),
        device_id=device,
    )
    model = torch.nn.parallel.DistributedDataParallel(network(torch).to(device), device_ids=[options.rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator(device=device).manual_seed(100 + options.rank)
    batches = [torch.randn(512, 4096, device=device, generator=generator) for _ in range(4)]

    def step(iteration):
        optimizer.zero_grad(set_to_none=True)
        loss = model(batches[iteration % 4]).square().mean()
        loss.backward()
        optimizer.step()

    for iteration in range(3):
        step(iteration)
    weight, total = ballast(torch, device)
    torch.cuda.synchronize()
    print(json.dumps({"ready": True}), flush=True)
    # A line on standard input, once all jobs are ready.
    sys.stdin.readline()
    begin, times = time.monotonic(), []
    for iteration in range(options.iterations):
        step(iteration)
        weight.add_(1 if iteration % 2 == 0 else -1)
        if iteration % 5 == 4:
            torch.cuda.synchronize()
            times.append(time.monotonic())
    torch.cuda.synchronize()
    end = time.monotonic()
    # An even number of iterations has added as much as it has taken away.
    right = int(weight.sum()) == total + (options.iterations % 2) * weight.numel()
    said = {"rank": options.rank, "right": right, "start": begin, "end": end, "times": times}
    said["digest"] = digest(torch, model.parameters())
    distributed.destroy_process_group()
    print(json.dumps(said), flush=True)
    return 0


def alone_main(options):
    """One process with all GPUs: each has its part, and sums go round by way of peer copies."""
    import torch

    deterministic(torch)
    devices = [torch.device("cuda", number) for number in range(options.ranks)]
    parts = []
    for device in devices:
        with torch.cuda.device(device):
            parts.append(torch.full((SIZE // 16,), 1 + device.index, dtype=torch.int64, device=device))
    for device in devices:
        torch.cuda.synchronize(device)
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    begin, times = time.monotonic(), []
    for iteration in range(options.iterations):
        for number, device in enumerate(devices):
            neighbour = parts[(number + 1) % len(parts)][: 1 << 24].to(device)
            parts[number].add_(1)
            parts[number][: 1 << 24].add_(neighbour).sub_(neighbour)
        if iteration % 5 == 4:
            for device in devices:
                torch.cuda.synchronize(device)
            times.append(time.monotonic())
    for device in devices:
        torch.cuda.synchronize(device)
    end = time.monotonic()
    wanted = [1 + number + options.iterations for number in range(len(parts))]
    right = all(bool((part == value).all()) for part, value in zip(parts, wanted))
    said = {"rank": 0, "right": right, "start": begin, "end": end, "times": times, "digest": "alone"}
    print(json.dumps(said), flush=True)
    return 0


# --- Jobs -------------------------------------------------------------------------------------------


class Job:
    """The processes of one job, ready to begin."""

    def __init__(self, kind, ranks, iterations, environment, folder):
        self.folder = tempfile.mkdtemp(dir=folder)
        count = ranks if kind == "rank" else 1
        self.logs = [open(f"{self.folder}/{rank}.log", "w+", errors="replace") for rank in range(count)]
        self.processes = [
            start(
                [sys.executable, __file__, "--kind", kind, "--rank", rank, "--ranks", ranks]
                + ["--iterations", iterations, "--meet", f"{self.folder}/meet"],
                {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple", "NCCL_MAX_NCHANNELS": "1"}
                | environment
                | {"NVSHARE_CLIENT_NAME": NAME},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.logs[rank],
            )
            for rank in range(count)
        ]

    def wait_ready(self, timeout):
        """Waits until each rank has said a line. A rank that does not within `timeout` seconds is ended."""
        watch = threading.Timer(timeout, self.end)
        watch.start()
        try:
            for rank, process in enumerate(self.processes):
                if not any(line.startswith("{") for line in process.stdout):
                    raise RuntimeError(f"rank {rank} ended before it was ready, or was not ready after {timeout} s: {self.said(rank)}")
        finally:
            watch.cancel()

    def go(self):
        for process in self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()

    def finish(self, timeout):
        """The results of all ranks. A rank that takes longer has none."""
        until, results = time.monotonic() + timeout, []
        for rank, process in enumerate(self.processes):
            try:
                output, _ = process.communicate(timeout=max(1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.end()
                output, _ = process.communicate()
            results.append((last_object(output) or {"right": False, "said": self.said(rank)}) | {"status": process.returncode})
        return results

    def end(self):
        """Ends what is left of it, as torchrun does when a rank has failed."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def said(self, rank, characters=2000):
        self.logs[rank].flush()
        return pathlib.Path(self.logs[rank].name).read_text(errors="replace")[-characters:]


def at_once(jobs, timeout):
    """Runs jobs from the moment when all are ready. The results of each."""
    try:
        for job in jobs:
            job.wait_ready(timeout)
        for job in jobs:
            job.go()
        return [job.finish(timeout) for job in jobs]
    finally:
        for job in jobs:
            job.end()


def span(results):
    """Seconds from the first start to the last end of any rank of any job."""
    ranks = [rank for job in results for rank in job if "end" in rank]
    return max(rank["end"] for rank in ranks) - min(rank["start"] for rank in ranks) if ranks else float("nan")


def longest_pause(results):
    """The longest time, s, in which some job did nothing while all lived: between two of its reports, by any rank."""
    if any("end" not in rank for job in results for rank in job):
        return float("inf")
    begin = max(rank["start"] for job in results for rank in job)
    until = min(rank["end"] for job in results for rank in job)
    pauses = []
    for job in results:
        for rank in job:
            times = [begin, *(at for at in rank["times"] if begin < at < until), until]
            pauses.append(max(later - before for before, later in zip(times, times[1:])))
    return max(pauses)


def right(results, wanted):
    """All ranks of all jobs ended well, with the digest that they should have."""
    ranks = [rank for job in results for rank in job]
    return all(rank["right"] and rank["status"] == 0 and rank["digest"] in (wanted, "alone") for rank in ranks)


# What a switch is made of, in a trace.
SPANS = ["filling", "evicts", "draining", "prefetches", "running"]


def spans(trace, since, clients):
    """What the clients did after the time `since`, us on the clock of time.monotonic(): by kind and GPU, how often, the mean of the
    first round, s, in which each client has done it once, that of all later ones, and GiB."""
    found = {}
    for event in sorted((event for event in trace["traceEvents"] if event["ph"] == "X"), key=lambda event: event["ts"]):
        if event["name"] in SPANS and event["ts"] >= since:
            found.setdefault((event["name"], event["pid"]), []).append(event)
    rows = {}
    for (name, gpu), events in sorted(found.items()):
        took = [event["dur"] / 1e6 for event in events]
        mean = lambda some: round(sum(some) / len(some), 4) if some else None
        gib = sum(event["args"].get("bytes", 0) for event in events) / GIB
        rows[f"{name}, GPU {gpu}"] = {"times": len(took), "first_s": mean(took[:clients]), "later_s": mean(took[clients:]), "gib": round(gib, 2)}
    return rows


class Machine:
    """What the scenarios need: binaries, GPUs, iterations, and how long a job takes alone without nvshare."""

    def __init__(self, options, folder):
        self.binaries, self.gpus, self.iterations, self.folder = options.bin.resolve(), options.gpus, options.iterations, folder
        self.timeout, self.reference, self.traces = options.timeout, {}, options.traces

    def start(self, kind, environment):
        return Job(kind, self.gpus, self.iterations, environment, self.folder)

    def alone(self, kind):
        """Seconds and digest of one job without nvshare, measured once."""
        if kind not in self.reference:
            results = at_once([self.start(kind, {})], self.timeout)
            say("alone", kind=kind, results=results)
            seen = {rank.get("digest") for rank in results[0]}
            if not all(rank["right"] for rank in results[0]) or len(seen) != 1:
                raise RuntimeError(f"a job alone, without nvshare, is wrong: {results}")
            self.reference[kind] = span(results), seen.pop()
        return self.reference[kind]

    def trace(self, arbiter, name):
        """What the clients did, which the pages still have when they have ended."""
        command = [self.binaries / "nvshare", "trace", "--runtime-dir", arbiter.directory, "-"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        if self.traces:
            self.traces.mkdir(parents=True, exist_ok=True)
            (self.traces / f"{name}.json").write_text(said)
        return json.loads(said)

    def together(self, name, kinds):
        one_after_another = sum(self.alone(kind)[0] for kind in kinds)
        wanted = self.alone("rank")[1]
        with Arbiter(self.binaries, CAPACITY) as arbiter, Watch(arbiter) as watch:
            jobs = [self.start(kind, arbiter.environment()) for kind in kinds]
            try:
                results = at_once(jobs, self.timeout)
            except RuntimeError:
                # For whoever looks for the reason: how all stood at the end, and what each rank said.
                for at, gpus in watch.samples[-40::13]:
                    say("stood", at=at, clients=[client for gpu in gpus for client in gpu["clients"]])
                for job in jobs:
                    print("\n".join(job.said(rank, 20_000) for rank in range(len(job.processes))))
                raise
            trace = self.trace(arbiter, name)
        clients = list(watch.last(NAME).values())
        begin = max((rank["start"] for job in results for rank in job if "start" in rank), default=0)
        say(f"{name}_spans", spans=spans(trace, begin * 1e6, len(kinds)))
        factor, pause = span(results) / one_after_another, longest_pause(results)
        retries = sum(client["drain_retries"] for client in clients)
        turns = sum(client["slices"] for client in clients)
        say(name, gpus=self.gpus, one_after_another_s=one_after_another, nvshare_s=span(results), pause_s=pause, results=results, clients=clients)
        ok = right(results, wanted) and factor <= TOGETHER and pause <= WINDOW
        return ok, (
            f"{name}: {factor:.3f} x one after another ({one_after_another:.1f} s; bar {TOGETHER}), longest time without progress "
            f"{pause:.1f} s (bar {WINDOW} s), results {'right' if right(results, wanted) else 'WRONG'}, {turns} slices, {retries} drains tried again"
        )


def two_jobs(machine):
    return machine.together("two_jobs", ["rank", "rank"])


def three_jobs(machine):
    return machine.together("three_jobs", ["rank", "rank", "rank"])


def beside_one_process(machine):
    return machine.together("beside_one_process", ["rank", "alone"])


def a_rank_dies(machine):
    wanted = machine.alone("rank")[1]
    with Arbiter(machine.binaries, CAPACITY) as arbiter:
        first, second = (machine.start("rank", arbiter.environment()) for _ in range(2))
        try:
            for job in (first, second):
                job.wait_ready(machine.timeout)
            for job in (first, second):
                job.go()
            time.sleep(machine.alone("rank")[0] / 4)
            os.killpg(first.processes[-1].pid, signal.SIGKILL)
            # torchrun ends the others of a job as soon as it has noticed, which takes it some seconds.
            time.sleep(5)
            first.end()
            results = second.finish(machine.timeout)
            until = time.monotonic() + 30
            while arbiter.clients() and time.monotonic() < until:
                time.sleep(0.1)
            gpus = arbiter.status()["gpus"]
        finally:
            first.end()
            second.end()
    free = all(gpu["free_bytes"] == gpu["capacity_bytes"] and gpu["repaired"] == 0 for gpu in gpus)
    say("a_rank_dies", results=results, gpus=gpus)
    ok = right([results], wanted) and free
    return ok, (
        f"a_rank_dies: the other job {'ended well' if right([results], wanted) else 'is WRONG'}, "
        f"all memory is {'free' if free else 'NOT free'} at the end"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--gpus", type=int, default=0, help="use the first N [default: all]")
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--timeout", type=float, default=500, help="seconds for each scenario's jobs")
    parser.add_argument("--traces", type=pathlib.Path, help="a folder for what nvshare trace says")
    parser.add_argument("--check-arguments", action="store_true")
    scenarios = [two_jobs, three_jobs, beside_one_process, a_rank_dies]
    parser.add_argument("--only", nargs="*", choices=[scenario.__name__ for scenario in scenarios])
    # Of the processes that this program starts.
    parser.add_argument("--kind", choices=["rank", "alone"], help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        return rank_main(options) if options.kind == "rank" else alone_main(options)
    if options.iterations % 2:
        parser.error("--iterations must be even")
    chosen = [scenario for scenario in scenarios if not options.only or scenario.__name__ in options.only]
    if options.check_arguments:
        print("would run", *[scenario.__name__ for scenario in chosen])
        return 0
    if not options.gpus:
        listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True, check=True).stdout
        options.gpus = len([line for line in listed.splitlines() if line.startswith("GPU ")])
    if options.gpus < 2:
        parser.error(f"needs two GPUs or more, and there is {options.gpus}")
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(options, folder)
        return report(scenario(machine) for scenario in chosen)


if __name__ == "__main__":
    sys.exit(main())
