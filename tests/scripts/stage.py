"""What the scenarios stand on: the machine with its GPUs, an arbiter that can be killed and replaced, and jobs that are told what to
do and say how it goes. Nothing here sleeps for a guess: everything waits for something, for so long at most."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# For tests/gpu/harness.py, which has the simulated GPU, the reader of debug logs, and Jain's index.
sys.path.insert(0, str(HERE.parent / "gpu"))

from harness import GIB, MIB, jain, native_environment, simulated_gpu, slices  # noqa: E402, F401

INSTALL_LIBRARY = ROOT / "deploy/helm/nvshare/files/install-library"

# The simulated GPUs: small and quick, so that CI has them all through in a minute.
SIMULATED = {"MEMORY": "64MiB", "CONTEXT_BYTES": "2MiB", "LINK_BANDWIDTH": "1GiB", "DEVICE_BANDWIDTH": "8GiB", "UUIDS": "ascending"}
SIMULATED_POOL = 64 * MIB

# A job that fills most of the pool, so that no two fit: the field report's 11,968 of 14,914 MiB. And one of which four fit.
LARGE, SMALL = 0.8025, 0.19


def until(what, condition, patience=120):
    """Waits until `condition()` is true, and gives that back. `what` is for the message if it never is."""
    end = time.monotonic() + patience
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise RuntimeError(f"waited for {patience} s, and in vain: {what}")
        time.sleep(0.02)


def parse_size(text):
    """Bytes of a size such as 14.9GiB."""
    for unit, bytes_ in ("GiB", GIB), ("MiB", MIB), ("GB", 10**9), ("MB", 10**6):
        if text.endswith(unit):
            return int(float(text[: -len(unit)]) * bytes_)
    raise ValueError(f"{text}: a size such as 14.9GiB was expected")


def parse_seconds(text):
    """Seconds of a time such as 5s or 300ms."""
    found = re.fullmatch(r"([0-9.]+)(ms|s)", text)
    if not found:
        raise ValueError(f"{text}: a time such as 5s or 300ms was expected")
    return float(found[1]) / {"s": 1, "ms": 1000}[found[2]]


class Service:
    """An arbiter in a directory of its own, as the node's would be."""

    def __init__(self, machine, options=()):
        self.machine = machine
        self.directory = tempfile.mkdtemp(prefix="nvshare-field-")
        self.log = open(self.directory + "/arbiter.log", "w+")
        self.options = ["--runtime-dir", self.directory, "--capacity", str(machine.pool), "--listen", "none", *options]
        self.process = None
        self.start()

    def start(self, binaries=None):
        program = (binaries or self.machine.binaries) / "nvshare-arbiter"
        self.process = subprocess.Popen(
            [str(program), *self.options], stdin=subprocess.DEVNULL, stderr=self.log, env=native_environment() | self.machine.variables
        )
        until("the arbiter serves", self.answers, 60)

    def answers(self):
        if self.process.poll() is not None:
            self.log.seek(0)
            raise RuntimeError(f"the arbiter ended with status {self.process.returncode}:\n{self.log.read()}")
        return self.nvshare("wait", "--timeout", "1s", check=False).returncode == 0

    def end(self, number):
        """Ends it by a signal and waits for that."""
        self.process.send_signal(number)
        self.process.wait(30)

    def nvshare(self, *arguments, check=True):
        command = [str(self.machine.binaries / "nvshare"), arguments[0], *arguments[1:], "--runtime-dir", self.directory]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=native_environment())
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done

    def gpus(self):
        """What `nvshare status` says of the GPUs, in the order of their numbers."""
        return sorted(json.loads(self.nvshare("status", "--json").stdout)["gpus"], key=lambda gpu: gpu["index"] or 0)

    def gpu(self, index=0):
        return self.gpus()[index]

    def row(self, job, index=0):
        """The row of a job's process on a GPU, or nothing."""
        return next((client for client in self.gpu(index)["clients"] if client["pid"] == job.process.pid), None)

    def environment(self, library=None):
        """What makes a process a client of this arbiter."""
        return {
            "NVSHARE_RUNTIME_DIR": self.directory,
            "LD_PRELOAD": str(library or self.machine.binaries / "libnvshare.so"),
            "NVSHARE_LOG": "debug",
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class Job:
    """A process that computes on one GPU and says how it goes."""

    def __init__(self, machine, size, gpu=0, seed=1, iterations=None, environment=None):
        self.gpu, self.seed = gpu, seed
        command, variables = machine.job(size, gpu, seed, iterations)
        self.folder = tempfile.mkdtemp(prefix="nvshare-job-")
        # Appended to by the process and read by name here: the reader's place in the file is not the writer's.
        self.log_path = self.folder + "/log"
        with open(self.log_path, "a") as log:
            self.process = subprocess.Popen(
                command,
                env=native_environment() | machine.variables | variables | (environment or {}) | {"NVSHARE_CLIENT_NAME": f"job-{seed}"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.ready, self.done, self.outcome, self.started = False, 0, None, None
        # The end of the standard output is the end of what it has to say.
        self.silent = threading.Event()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue
            event = json.loads(line)
            if event["event"] == "ready":
                self.ready = True
            elif event["event"] == "progress":
                self.done = event["done"]
            else:
                self.outcome = event
        self.silent.set()

    def alive(self):
        """Raises if it has ended before its time."""
        if self.process.poll() is not None and self.outcome is None and self.silent.wait(5) and self.outcome is None:
            raise RuntimeError(f"job {self.seed} ended with status {self.process.returncode} before its work was done\n{self.said()}")
        return True

    def go(self):
        self.started = time.monotonic()
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def stop(self):
        """Lets it end before its iterations are done: it checks its data then."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self):
        self.process.kill()
        self.process.wait(30)

    def finish(self, patience):
        """Whether its data was right at its end."""
        until(f"job {self.seed} ends\n{self.said()}", lambda: self.process.poll() is not None, patience)
        self.silent.wait(10)
        return self.process.returncode == 0 and bool(self.outcome and self.outcome["right"])

    def slices(self):
        """Its slices that are over so far."""
        with open(self.log_path, errors="replace") as log:
            return slices(log)

    def said(self, lines=15):
        with open(self.log_path, errors="replace") as log:
            return "".join(log.readlines()[-lines:])

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


class Crew:
    """Jobs that begin together: `with Crew(machine) as crew: crew.add(...)`."""

    def __init__(self, machine):
        self.machine = machine
        self.jobs = []

    def add(self, size, gpu=0, iterations=None, environment=None):
        job = Job(self.machine, size, gpu, len(self.jobs) + 1, iterations, environment)
        self.jobs.append(job)
        return job

    def ready(self, jobs=None):
        """Waits until all have filled their memory."""
        for job in jobs or self.jobs:
            until(f"job {job.seed} has filled its memory\n{job.said()}", lambda job=job: job.alive() and job.ready, self.machine.patience)

    def go(self, jobs=None):
        self.ready(jobs)
        for job in jobs or self.jobs:
            job.go()

    def until(self, what, condition):
        """Waits for a condition while none of the jobs ends by surprise."""
        return until(what, lambda: all(job.alive() for job in self.jobs if job.process.returncode is None) and condition(), self.machine.patience)

    def everyone_gave_way(self, times, jobs=None):
        jobs = jobs or self.jobs
        self.until(f"each of {len(jobs)} jobs gives way {times} times", lambda: all(len(job.slices()) >= times for job in jobs))

    def everyone_iterated(self, times, jobs=None):
        jobs = jobs or self.jobs
        wanted = [job.done + times for job in jobs]
        self.until(f"each job does {times} iterations more", lambda: all(job.done >= some for job, some in zip(jobs, wanted)))

    def stop(self):
        for job in self.jobs:
            job.stop()

    def right(self, jobs=None):
        """Waits for the end of these jobs: how many had right data, and how many there are."""
        jobs = jobs or self.jobs
        return sum([job.finish(self.machine.patience) for job in jobs]), len(jobs)

    def seconds(self):
        """From the beginning of the first until all iterations were done, without the check of the data."""
        return max(job.started + job.outcome["seconds"] for job in self.jobs) - min(job.started for job in self.jobs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for job in self.jobs:
            job.close()


class Machine:
    """The GPUs, and how jobs are run on them."""

    def __init__(self, binaries, pool, gpus, program, simulated, seconds):
        self.binaries, self.pool, self.gpus = binaries, pool, gpus
        self.program, self.simulated, self.seconds = program, simulated, seconds
        # How long anything may take that is waited for: four jobs in turn, and as much again.
        self.patience = 120 if simulated else 120 + 10 * seconds
        self.variables = {} if simulated else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        self.large, self.small = (round(pool * part) // (8 * MIB) * (8 * MIB) for part in (LARGE, SMALL))

    def job(self, size, gpu, seed, iterations):
        """How a job is started: its command, and its variables."""
        how_many = [f"--iterations={iterations}"] if iterations else []
        if self.program == "torch":
            command = [sys.executable, str(HERE / "torch_job.py"), f"--size={size}", f"--seed={seed}", *how_many]
        else:
            command = [str(self.binaries / "nvshare"), "internal", "job", f"--size={size}", f"--seed={seed}", "--controlled", *how_many]
        if self.simulated:
            return [*command, f"--devices={gpu}"], {}
        return command, {"CUDA_VISIBLE_DEVICES": str(gpu)}

    def describe(self):
        what = "simulated GPUs" if self.simulated else "GPUs"
        return f"{self.gpus} {what}, pools of {self.pool / GIB:.2f} GiB, jobs of {self.large / GIB:.2f} and {self.small / GIB:.2f} GiB ({self.program})"


def real_gpus():
    """The GPUs that nvidia-smi lists: model and bytes of memory."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, stdout=subprocess.PIPE, text=True)
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    return [(name.strip(), int(memory) * MIB) for name, memory in rows]


@contextlib.contextmanager
def simulated(binaries, gpus):
    """Simulated GPUs for everything that is started within."""
    with simulated_gpu(binaries, GPUS=gpus, **SIMULATED):
        yield
