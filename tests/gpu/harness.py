"""What the programs for real GPUs share: a private arbiter, samples of its books, processes that may take only so
long, jobs that are told what to do, and a competitor that always wants the GPU."""

import atexit
import contextlib
import json
import os
import pathlib
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
MIB = 1 << 20
GIB = 1 << 30

# Processes that are stuck are ended with SIGABRT, for their stacks; nobody wants gigabytes of core with them.
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# Process groups that were started here and may still run.
started = set()


@atexit.register
def end_all_that_was_started():
    for group in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


# Whoever ends one of these programs ends with it what it has started: it would go on computing beside the next one.
def end_by_signal(*_):
    end_all_that_was_started()
    sys.exit(143)


signal.signal(signal.SIGTERM, end_by_signal)


def native_environment():
    """This process's environment without nvshare, and with what makes processes that are stuck tell where."""
    ours = ("NVSHARE_RUNTIME_DIR", "NVSHARE_CLIENT_NAME", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    # Several scenarios at once have an arbiter each, with a part of the GPU's memory.
    second = {"NVSHARE_ALLOW_SECOND_ARBITER": "1"}
    return kept | second | {"CUDA_MODULE_LOADING": "LAZY", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def simulated_gpu(binaries, **settings):
    """This process and those that it starts have a simulated GPU; its settings are those of NVSHARE_SIM_*."""
    libraries = {"libcuda.so.1": "simcuda", "libcuda.so": "simcuda", "libnvidia-ml.so.1": "simnvml"}
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="nvshare-gpu-") as folder:
        # With the folder's name: a process that was killed leaves its GPU, and its pid comes again.
        name = f"{os.getpid()}-{os.path.basename(folder)}"
        for link, library in libraries.items():
            os.symlink(binaries / f"lib{library}.so", f"{folder}/{link}")
        os.environ["LD_LIBRARY_PATH"] = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
        os.environ["NVSHARE_SIM_NAME"] = name
        os.environ |= {f"NVSHARE_SIM_{setting}": str(value) for setting, value in settings.items()}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before
            pathlib.Path("/dev/shm", name).unlink(missing_ok=True)


def start(command, environment, **more):
    """Starts a program in a process group of its own, which is ended with this process at the latest."""
    process = subprocess.Popen(
        [str(word) for word in command], env=native_environment() | environment, text=True, start_new_session=True, **more
    )
    started.add(process.pid)
    return process


def last_object(text):
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


SLICE = re.compile(r"nvshare\[(\d+)\].* DEBUG drained in .*at_ns=(\d+) ran_ns=(\d+) drained_ns=(\d+)")


class Slice:
    """A slice that is over, as the client's debug log tells: from `began` to `ended`, then drained in `drained`; s, on
    the clock of time.monotonic()."""

    def __init__(self, pid, at_ns, ran_ns, drained_ns):
        self.pid, self.ended, self.ran, self.drained = int(pid), int(at_ns) / 1e9, int(ran_ns) / 1e9, int(drained_ns) / 1e9
        self.began = self.ended - self.ran


def slices(log):
    """The slices in a debug log (NVSHARE_LOG=debug) of any number of clients, in order."""
    found = (SLICE.search(line) for line in log)
    return sorted((Slice(*line.groups()) for line in found if line), key=lambda one: one.ended)


def jain(shares):
    """Jain's index: 1 if all shares are equal, 1/n if one has everything (Jain, Chiu and Hawe, DEC-TR-301, 1984)."""
    squares = len(shares) * sum(share**2 for share in shares)
    return sum(shares) ** 2 / squares if squares else 1.0


def percentile(values, per_cent):
    """Of these values, the smallest that so many per cent are no larger than."""
    return sorted(values)[max(0, -(-len(values) * per_cent // 100) - 1)]


def fairness(done, clients, window):
    """Jain's index over the GPU time of `clients` in each window of so many slices."""
    return [
        jain([sum(one.ran for one in done[first : first + window] if one.pid == client) for client in clients])
        for first in range(len(done) - window + 1)
    ]


class Arbiter:
    """A private arbiter in a directory of its own. `capacity` is bytes, or text with a unit."""

    def __init__(self, binaries, capacity=None, options=(), log=None):
        self.binaries = binaries
        self.directory = tempfile.mkdtemp(prefix="nvshare-gpu-")
        command = [str(binaries / "nvshare-arbiter"), "--runtime-dir", self.directory, *options]
        if capacity:
            command += ["--capacity", str(capacity)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=native_environment())
        until = time.monotonic() + 30
        while not os.path.exists(self.directory + "/arbiter.sock"):
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                shutil.rmtree(self.directory, ignore_errors=True)
                said = " ".join(command)
                if log:
                    log.seek(0)
                    said = f"{log.read().strip()} ({said})"
                raise RuntimeError(f"the arbiter did not start: {said}")
            time.sleep(0.01)

    def environment(self):
        """What makes a process its client."""
        return {
            "NVSHARE_RUNTIME_DIR": self.directory,
            "LD_PRELOAD": str(self.binaries / "libnvshare.so"),
            "CUDA_MODULE_LOADING": "LAZY",
        }

    def status(self):
        command = [str(self.binaries / "nvshare"), "status", "--json", "--runtime-dir", self.directory]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        return json.loads(done.stdout)

    def clients(self):
        return [client for gpu in self.status()["gpus"] for client in gpu["clients"]]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class Watch(threading.Thread):
    """Samples an arbiter's books until it is stopped: `with Watch(arbiter) as watch: ...`."""

    def __init__(self, arbiter, every=0.2):
        super().__init__(daemon=True)
        self.arbiter, self.every = arbiter, every
        self.samples = []
        self.over = threading.Event()

    def run(self):
        while True:
            try:
                self.samples.append((time.monotonic(), self.arbiter.status()["gpus"]))
            except (subprocess.CalledProcessError, ValueError):
                pass  # A page that is just being made: the next sample tells.
            if self.over.wait(self.every):
                return

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()

    def last(self, name):
        """The last row of each client of this name, by GPU, slot and process."""
        rows = {}
        for _, gpus in list(self.samples):
            for gpu in gpus:
                for client in gpu["clients"]:
                    if client["name"] == name:
                        rows[gpu["uuid"], client["slot"], client["pid"]] = client
        return rows

    def yields(self, name):
        """How many times clients of this name gave way. The counter of a process begins anew when it has no context for a while."""
        total, before = 0, {}
        for _, gpus in list(self.samples):
            for gpu in gpus:
                for client in gpu["clients"]:
                    if client["name"] == name:
                        key = gpu["uuid"], client["slot"], client["pid"]
                        since = before.get(key, 0)
                        total += client["yields"] - (since if client["yields"] >= since else 0)
                        before[key] = client["yields"]
        return total

    def most(self, name, what):
        """The most, on any GPU at any moment, that `what(client)` adds up to over the clients of this name."""
        sums = [
            sum(what(client) for client in gpu["clients"] if client["name"] == name)
            for _, gpus in list(self.samples)
            for gpu in gpus
        ]
        return max(sums, default=0)

    def link(self):
        """When the first GPU's measured bandwidth changed, and to what: (s, (in, out)), bytes a second."""
        found = [(at, (gpus[0]["bandwidth_in"], gpus[0]["bandwidth_out"])) for at, gpus in list(self.samples) if gpus]
        return [now for before, now in zip([(0, None), *found], found) if before[1] != now[1]]

    def repaired(self):
        """How often the books did not balance."""
        return max((gpu["repaired"] for _, gpus in list(self.samples) for gpu in gpus), default=0)


class Ended:
    """How a process ended, and what it said."""

    def __init__(self, status, seconds, output, errors, stuck):
        self.status, self.seconds, self.output, self.errors, self.stuck = status, seconds, output, errors, stuck
        self.result = last_object(output) or {}

    def tail(self, lines=25):
        """The end of what it said, for a person."""
        said = self.errors.rstrip().splitlines()[-lines:]
        if not self.result:
            said += ["its standard output:", *self.output.rstrip().splitlines()[-5:]]
        return "\n".join(["stuck:", *self.stuck, *said] if self.stuck else said)


def threads_of(group):
    """What the threads of a process group are doing, a line each kind."""
    seen = {}
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or os.getpgid(int(entry.name)) != group:
                continue
            for task in (entry / "task").iterdir():
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                where = (task / "wchan").read_text() or "-"
                key = f"pid {entry.name} {(task / 'comm').read_text().strip()}: {state} in {where}"
                seen[key] = seen.get(key, 0) + 1
        except OSError:
            continue  # It has just ended, or is none of ours.
    return [f"{count} x {what}" for what, count in sorted(seen.items())]


def end_group(process, stuck):
    """Ends a process and all that it started; those that are stuck say first where they are."""
    started.discard(process.pid)
    signals = [(signal.SIGABRT, 3), (signal.SIGKILL, 10)] if stuck else [(signal.SIGKILL, 10)]
    for number, patience in signals:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def run(command, environment, timeout, cwd=None):
    """Runs a program to its end, or for so many seconds."""
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as log:
        began = time.monotonic()
        process = start(command, environment, stdin=subprocess.DEVNULL, stdout=out, stderr=log, cwd=cwd)
        stuck = []
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            stuck = [f"not ended after {timeout:.0f} s", *threads_of(process.pid)]
        seconds = time.monotonic() - began
        end_group(process, bool(stuck))
        out.seek(0)
        log.seek(0)
        return Ended(process.poll(), seconds, out.read(), log.read(), stuck)


class Job:
    """A process that is told what to do, a line each, and answers with lines of JSON."""

    def __init__(self, command, environment, name):
        self.name = name
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = start(command, environment | {"NVSHARE_CLIENT_NAME": name}, **pipes)
        self.answers = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                self.answers.put(json.loads(line))
        self.answers.put(None)

    def tell(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # It has ended; `answer` says how.

    def answer(self, timeout, wanted=lambda _: True):
        """The next answer that is wanted. An error with the process's own words if there is none."""
        until = time.monotonic() + timeout
        while True:
            try:
                answer = self.answers.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                stuck = threads_of(self.process.pid)
                end_group(self.process, True)
                raise RuntimeError("\n".join([f"{self.name} has not answered for {timeout:.0f} s", *stuck, self.said()])) from None
            if answer is None:
                self.answers.put(None)
                self.process.wait()
                raise RuntimeError(f"{self.name} ended with status {self.process.returncode}\n{self.said()}")
            if wanted(answer):
                return answer

    def said(self, lines=25):
        self.log.seek(0)
        return "\n".join(self.log.read().rstrip().splitlines()[-lines:])

    def close(self, patience=30):
        """No more to do: waits for its end."""
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(self.process, False)


class Competitor(Job):
    """A job that holds so many bytes, computes on them without pause, and knows what they must be at the end."""

    def __init__(self, binaries, environment, size):
        program = binaries / "nvshare"
        command = [program, "internal", "job", f"--size={size}", "--buffers=4", "--seed=99", "--controlled"]
        super().__init__(command, environment, "competitor")

    def begin(self, timeout=60):
        self.answer(timeout, lambda event: event["event"] == "ready")
        self.tell("")

    def finish(self, timeout=90):
        """Whether its data is right."""
        self.process.stdin.close()
        right = self.answer(timeout, lambda event: event["event"] == "done")["right"]
        return self.close() == 0 and right


def say(name, **figures):
    """A line of raw figures."""
    print(json.dumps({"name": name, **figures}), flush=True)


def report(rows):
    """Prints what each run says, (right, line), as it comes, and all lines at the end. The exit status."""
    table, good = [], True
    for right, line in rows:
        good &= right
        table.append(line + ("" if right else "  WRONG RESULTS"))
        print("#", table[-1], flush=True)
    print("\n".join(table))
    return 0 if good else 1


def program(name):
    """How a Python program beside this file is started."""
    return [sys.executable, str(HERE / name)]
