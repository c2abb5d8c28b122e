"""Two jobs that pause between their steps, as a training does that waits for its data: a pause is not an end.

    python3 tests/gpu/pauses.py [--bin target/release] [--seconds 120] [--pauses 0 3 8 20 100 1000] [--only pauses idle]

Each job has 12 GiB, of which both do not fit into the pool of 14.9 GiB. An iteration is a step and a pause. A step is
80 ms of kernels, so many as a process without nvshare needs for that, and a synchronisation; its kernels add 1 to one
twenty-fourth of the memory each, in turn, so all of the memory is used again and again. Unmodified PyTorch. Two kinds
of cases:

*pauses*: for each pause, ms, iterations of one job alone (for `--alone-seconds`), then of both together (for
`--seconds`). The figure is the iterations of both together as a multiple of one job alone, in the first 15 s and over
the whole run, counted from when both have their memory and begin; beside it switches and bytes moved. Bars: with pauses
of at most 100 ms 0.85 in 15 s and 0.90 in 120 s; with pauses of 1 s 1.7 in both.
*idle*: a job makes short pauses, first beside the other job, then without it, and then stops for good: it keeps its
memory and its process. 5 s later the other job asks for the GPU. The figure is the time from that request until the
first has given way (has drained, as its debug log says). Bar: 20 ms for each of three pauses.

"Alone" is the first of the two jobs under nvshare while the second is idle, its memory out of the way. With `--native`
it is a process without nvshare instead, which has ended before the two start.

The same two processes go through all cases, so what nvshare has learned of them in one case may show in the next; with
`--fresh`, each case has an arbiter and two processes of its own. After each case each word of the memory of both is
checked. Prints a JSON object and a line for each case, and all lines again at the end. Exit status 1 if any result was
wrong; a bar that is missed changes nothing. A pause takes `--seconds`, `--alone-seconds` and about 5 s, the start about
20 s, *idle* about 40 s.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import time

from harness import GIB, HERE, Arbiter, Job, percentile, program, report, say, slices

CAPACITY = "14.9GiB"
MIB_EACH = 12 << 10
STEP_S = 0.08
PAUSES_MS = [0, 3, 8, 20, 100, 1000]

# The first part of a run, which has a figure of its own, and the run that the bar of the whole is for, s.
FIRST_S, WHOLE_S = 15, 120
# (longest pause, ms; bar of the first part; bar of the whole), and the same for this pause and longer ones.
SHORT, LONG = (100, 0.85, 0.90), (1000, 1.7, 1.7)

# How long the jobs of *idle* compete, how long the first goes on without the other, and how long it has stopped
# when the other asks, s.
COMPETE_S, GO_ON_S, STOPPED_S = 3.0, 2.0, 5.0
IDLE_PAUSES_MS = [3, 20, 100]
IDLE_BAR_S = 0.02

BUFFERS = 24
# Words that are checked at once.
STRIP = 4 << 20


class Work:
    """The memory of a job, 32-bit words, and what its kernels have done to it."""

    def __init__(self, torch, mib, seed):
        self.torch, self.seed, self.launched = torch, seed, 0
        self.words = (mib << 18) // BUFFERS
        self.buffers = [self.words_from(self.first(number), self.words) for number in range(BUFFERS)]
        torch.cuda.synchronize()

    def words_from(self, first, count):
        """Words that count up from the first."""
        return self.torch.arange(first, first + count, dtype=self.torch.int32, device="cuda")

    def first(self, number):
        """What the first word of a buffer must be now. No word of one job is ever the same as one of the other."""
        kernels = (self.launched - number + BUFFERS - 1) // BUFFERS
        return self.seed * 500_000_000 + number * 1_000_003 + kernels

    def step(self, kernels):
        for _ in range(kernels):
            self.buffers[self.launched % BUFFERS].add_(1)
            self.launched += 1
        self.torch.cuda.synchronize()

    def calibrate(self):
        """How many kernels take as long as a step is to take, with the GPU alone."""

        def timed(kernels):
            began = time.monotonic()
            self.step(kernels)
            return time.monotonic() - began

        # The GPU's clock rises within the first second.
        until = time.monotonic() + 1
        while time.monotonic() < until:
            each = timed(BUFFERS) / BUFFERS
        some = max(1, round(STEP_S / each))
        return {"kernels": max(1, round(STEP_S / statistics.median(timed(some) for _ in range(9)) * some))}

    def run(self, kernels, pause_ms, begin, until):
        """Iterations from `begin` until `until`, s, on the clock of time.monotonic(); one at least. When each began, and
        when the last ended; and how long a step took, without its pause."""
        time.sleep(max(0.0, begin - time.monotonic()))
        times, steps = [time.monotonic()], []
        while not steps or times[-1] < until:
            self.step(int(kernels))
            steps.append(time.monotonic() - times[-1])
            if pause_ms:
                time.sleep(pause_ms / 1e3)
            times.append(time.monotonic())
        return {"times": times, "step_s": statistics.median(steps)}

    def check(self):
        """Whether all words are right."""
        wrong = 0
        for number, buffer in enumerate(self.buffers):
            for index, strip in enumerate(buffer.split(STRIP)):
                expected = self.words_from(self.first(number) + index * STRIP, len(strip))
                wrong += int((strip != expected).sum())
        # What the check needed is no part of the job's 12 GiB.
        strip = expected = None
        self.torch.cuda.empty_cache()
        return {"right": wrong == 0, "wrong_words": wrong, "kernels": self.launched}


def job(mib, seed):
    """The process: a command and its numbers on each line of the standard input, an answer for each."""
    import torch

    print(json.dumps({"imported": True}), flush=True)
    work = None
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "allocate":
            work = Work(torch, mib, seed)
            # The kernels of the check are loaded before anything is measured.
            answer = work.check()
        else:
            answer = getattr(work, command)(*map(float, numbers))
        print(json.dumps(answer), flush=True)
    return 0


def iterations(times, begin, end):
    """How many iterations lie between two moments; an iteration that lies there in part counts as that part. `times` are
    when each began, and when the last one ended."""
    return sum(
        max(0.0, min(end, after) - max(begin, before)) / (after - before) for before, after in zip(times, times[1:])
    )


def rate(times):
    """Iterations per second."""
    return (len(times) - 1) / (times[-1] - times[0])


def bars(pause_ms, seconds):
    """The bars of the first part and of the whole of a run of so many seconds; None where there is none."""
    first = whole = None
    if pause_ms <= SHORT[0]:
        _, first, whole = SHORT
    elif pause_ms >= LONG[0]:
        _, first, whole = LONG
    return first if seconds >= FIRST_S else None, whole if seconds >= WHOLE_S else None


def verdict(ratio, bar):
    return "no bar" if bar is None else f"bar {bar}: {'met' if ratio >= bar else 'MISSED'}"


def gave_way_after(done, pid, stopped, asked):
    """How long after `asked` a process that stopped at `stopped` had given way, s: 0 if it had before, None if it had
    not at all."""
    ends = [one.ended + one.drained for one in done if one.pid == pid and one.ended >= stopped]
    return max(0.0, min(ends) - asked) if ends else None


def sleep_until(moment):
    time.sleep(max(0.0, moment - time.monotonic()))


def log_of(a_job):
    """The lines of the log of a process that still writes it. Opened anew, because a seek in `log` would move the place
    at which the process writes."""
    with open(f"/proc/self/fd/{a_job.log.fileno()}", errors="replace") as log:
        return log.read().splitlines()


def start(mib, seed, name, environment):
    return Job([*program("pauses.py"), "--role", "job", "--mib", mib, "--seed", seed], environment, name)


def ask(a_job, *command, patience=180):
    a_job.tell(" ".join(map(str, command)))
    return a_job.answer(patience)


class Pair:
    """Two jobs under nvshare that have their memory: `with Pair(...) as pair`."""

    def __init__(self, options, kernels):
        self.options, self.kernels = options, kernels

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.arbiter = stack.enter_context(Arbiter(self.options.bin, self.options.capacity))
            environment = self.arbiter.environment() | {"NVSHARE_LOG": "debug"}
            self.jobs = []
            for seed, name in enumerate(("first", "second"), 1):
                self.jobs.append(start(self.options.mib, seed, name, environment))
                stack.callback(self.jobs[-1].close)
            for each in self.jobs:
                each.answer(180)
            ready = {each.name: ask(each, "allocate") for each in self.jobs}
            say("ready", clients=self.arbiter.clients(), **ready)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        try:
            if self.options.keep:
                for each in self.jobs:
                    path = self.options.keep / f"{each.name}-{each.process.pid}.log"
                    path.write_text("\n".join(log_of(each)) + "\n")
        finally:
            self.stack.close()

    def run(self, jobs, pause_ms, begin, until, between=()):
        """What each of `jobs` says of its iterations, and the books at `begin`, at the moments between, and at `until`."""
        for each in jobs:
            each.tell(f"run {self.kernels} {pause_ms} {begin} {until}")
        books = []
        for moment in (begin, *between, until):
            sleep_until(moment)
            books.append(self.books())
        return [each.answer(180) for each in jobs], books

    def books(self):
        """Switches and bytes moved of both until now."""
        clients = self.arbiter.clients()
        return {what: sum(client[what] for client in clients) for what in ("yields", "bytes_in", "bytes_out")}

    def right(self, case):
        """Whether the data of both are right; tells what is wrong."""
        answers = {each.name: ask(each, "check") for each in self.jobs}
        good = all(answer["right"] for answer in answers.values())
        if not good:
            say(f"{case}: WRONG", **answers)
        return good

    def keep(self, name, **what):
        """All moments, for whoever wants to look closer."""
        if self.options.keep:
            (self.options.keep / f"{name}.json").write_text(json.dumps(what) + "\n")


def soon():
    """A moment at which a job that is told now can begin."""
    return time.monotonic() + 0.1


def pauses(pair, pause_ms, native):
    """One job alone, unless that is known, and both together."""
    options, (first, second) = pair.options, pair.jobs
    if native is None:
        # Its memory comes in, and what is in the way goes out.
        begin = soon()
        pair.run([first], pause_ms, begin, begin + 1)
        begin = soon()
        ((alone,), books) = pair.run([first], pause_ms, begin, begin + options.alone_seconds)
        alone_moved = {what: books[1][what] - books[0][what] for what in books[0]}
    else:
        alone, alone_moved = native, None
    begin = soon()
    until, early = begin + options.seconds, min(float(FIRST_S), options.seconds)
    both, books = pair.run(pair.jobs, pause_ms, begin, until, [begin + early])
    right = pair.right(f"pause of {pause_ms} ms")
    done = [one for each in pair.jobs for one in slices(log_of(each)) if begin <= one.began and one.ended <= until]

    # The figures count from when the later of the two has begun.
    begin = max(each["times"][0] for each in both)
    windows = []
    for seconds, bar, book in zip((early, options.seconds), bars(pause_ms, options.seconds), books[1:]):
        each = [iterations(one["times"], begin, begin + seconds) / seconds / rate(alone["times"]) for one in both]
        moved = {what: book[what] - books[0][what] for what in book}
        windows.append({"seconds": seconds, "ratio": sum(each), "bar": bar, "each": each, **moved})
    if early == options.seconds:
        windows.pop()
    say(
        "pauses",
        pause_ms=pause_ms,
        right=right,
        alone="nvshare" if native is None else "native",
        alone_per_s=round(rate(alone["times"]), 4),
        alone_step_s=round(alone["step_s"], 5),
        alone_moved=alone_moved,
        step_s=[round(each["step_s"], 5) for each in both],
        windows=windows,
        slice_p50_s=round(percentile([one.ran for one in done], 50), 4) if done else None,
        slice_max_s=round(max((one.ran for one in done), default=0), 4),
        drain_p99_s=round(percentile([one.drained for one in done], 99), 5) if done else None,
    )
    pair.keep(
        f"pause-{pause_ms}",
        begin=begin,
        alone=alone,
        both=both,
        slices=[[one.pid, one.began, one.ran, one.drained] for one in done],
    )
    line = f"pause {pause_ms:4} ms: alone {rate(alone['times']):.3f} iterations/s; together"
    for one in windows:
        shares = "/".join(f"{part / max(one['ratio'], 1e-9) * 100:.0f}" for part in one["each"])
        line += (
            f" {one['ratio']:.3f} x in {one['seconds']:g} s ({verdict(one['ratio'], one['bar'])}; {shares} %, {one['yields']} switches, "
            f"{one['bytes_in'] / GIB:.1f} GiB in, {one['bytes_out'] / GIB:.1f} out),"
        )
    line = line.rstrip(",")
    return right, line


def idle(pair):
    """How soon a job gives way that has stopped for good, after each of some pauses."""
    first, second = pair.jobs
    delays, results = [], []
    for pause_ms in IDLE_PAUSES_MS:
        begin = soon()
        pair.run(pair.jobs, pause_ms, begin, begin + COMPETE_S)
        begin = soon()
        (last,), _ = pair.run([first], pause_ms, begin, begin + GO_ON_S)
        stopped = last["times"][-1]
        sleep_until(stopped + STOPPED_S)
        # One iteration: it asks when that begins.
        once = ask(second, "run", pair.kernels, 0, 0, 0)
        asked, ended = once["times"]
        delay = gave_way_after(slices(log_of(first)), first.process.pid, stopped, asked)
        delays.append(delay)
        results.append({"pause_ms": pause_ms, "gave_way_s": delay, "stopped_s": asked - stopped, "iteration_s": ended - asked})
    right = pair.right("idle")
    say("idle", right=right, rounds=results)
    told = ", ".join("unseen in the log" if delay is None else f"{delay * 1e3:.1f} ms" for delay in delays)
    met = all(delay is not None and delay <= IDLE_BAR_S for delay in delays)
    return right, (
        f"idle: gives way {told} after the request, after pauses of {', '.join(map(str, IDLE_PAUSES_MS))} ms "
        f"(bar {IDLE_BAR_S * 1e3:.0f} ms: {'met' if met else 'MISSED'})"
    )


def natively(options, wanted):
    """Kernels of a step, and what a job without nvshare says of its iterations with each of the pauses that are wanted."""
    a_job = start(options.mib, 1, "native", {})
    try:
        a_job.answer(180)
        ready = ask(a_job, "allocate")
        kernels = ask(a_job, "calibrate")["kernels"]
        alone = {}
        for pause_ms in wanted:
            begin = soon()
            alone[pause_ms] = ask(a_job, "run", kernels, pause_ms, begin, begin + options.alone_seconds, patience=options.alone_seconds + 180)
        # Whether a step of so many kernels takes as long as it is meant to.
        begin = soon()
        step = ask(a_job, "run", kernels, 0, begin, begin + 1)
        right = ready["right"] and ask(a_job, "check")["right"]
    finally:
        a_job.close()
    say("native", right=right, kernels=kernels, step_s=step["step_s"], per_s={str(pause): rate(one["times"]) for pause, one in alone.items()})
    return right, kernels, alone


def rows(options):
    wanted = options.pauses if "pauses" in options.only else []
    right, kernels, alone = natively(options, wanted if options.native else [])
    if not right:
        yield False, "the job without nvshare"
        return
    cases = [lambda pair, pause=pause: pauses(pair, pause, alone.get(pause)) for pause in wanted]
    cases += [idle] if "idle" in options.only else []
    for group in [[case] for case in cases] if options.fresh else [cases]:
        with Pair(options, kernels) as pair:
            for case in group:
                yield case(pair)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--seconds", type=float, default=WHOLE_S, help="of both together, for each pause")
    parser.add_argument("--alone-seconds", type=float, default=8, help="of one alone, for each pause")
    parser.add_argument("--pauses", nargs="*", type=int, default=PAUSES_MS, help="ms")
    parser.add_argument("--only", nargs="*", choices=["pauses", "idle"], default=["pauses", "idle"])
    parser.add_argument("--native", action="store_true", help="one alone is a process without nvshare")
    parser.add_argument("--fresh", action="store_true", help="new processes for each case")
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for the jobs' logs and all moments")
    parser.add_argument("--capacity", default=CAPACITY, help="of the pool")
    parser.add_argument("--mib", type=int, default=MIB_EACH, help=f"of each job; a multiple of {BUFFERS}")
    parser.add_argument("--role", choices=["job"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mib < BUFFERS or options.mib % BUFFERS:
        parser.error(f"--mib must be a multiple of {BUFFERS}")
    if options.role:
        return job(options.mib, options.seed)
    options.bin = options.bin.resolve()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    return report(rows(options))


if __name__ == "__main__":
    sys.exit(main())
