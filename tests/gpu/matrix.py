"""What real frameworks call, under nvshare: each program of tests/gpu/matrix/ natively, under nvshare alone, and
under nvshare beside a competitor that always wants the GPU, in a pool too small for both, with a switch each second.

    python3 tests/gpu/matrix.py --bin build [--only NAME ...] [--seconds S] [--gpus 1|2] [--jobs N]
        [--out docs/compatibility.md] [--json FILE] [--merge FILE ...] [--render]

A program checks its own numbers and reports a digest of them; all three runs must give the same. Every scenario has an
arbiter of its own, so several share one large GPU. --json keeps the rows; --merge adds rows of earlier runs, such as
those of another machine, and --render runs nothing and only writes the table. Exit status 1 if anything is not right.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import sections
from harness import GIB, HERE, MIB, Arbiter, Competitor, Watch, run

PROGRAMS_IN = HERE / "matrix"
SCENARIOS = ("native", "alone", "switched")


@dataclasses.dataclass(frozen=True)
class Program:
    """A row of the table. `source` is a file in tests/gpu/matrix/, built by nvcc with `flags` if it is C++."""

    name: str
    source: str
    gpus: int = 1
    # Processes that have a context at a time.
    processes: int = 1
    environment: dict = dataclasses.field(default_factory=dict)
    # For the native run alone: other programs run beside it on the same GPU.
    native: dict = dataclasses.field(default_factory=dict)
    # More arguments under nvshare.
    shared: tuple = ()
    flags: tuple = ()
    # The pool when it runs alone, and what the competitor holds, in GiB.
    pool: float = 12
    competitor: float = 2
    remark: str = ""


# The slowest first: others fill the time beside them.
PROGRAMS = [
    Program("compile", "compile.py"),
    Program("generate", "generate.py"),
    Program("ipc", "ipc.py", processes=2),
    Program("train", "train.py"),
    Program("graphs", "graphs.py"),
    Program(
        "jax_prealloc",
        "jax_prealloc.py",
        native={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.10"},
        competitor=4,
        remark="natively with a tenth of the GPU preallocated, as others ran beside it; under nvshare with the default",
    ),
    Program("expandable", "expandable.py"),
    Program("async_alloc", "async_alloc.py"),
    Program("oom", "oom.py", shared=("--fill",), pool=8),
    Program("nvml", "nvml.py"),
    Program("cupy_pools", "cupy_pools.py"),
    # Its processes come and go, so at most times some of their contexts' room in the pool is free. Both sides hold more than that.
    Program("fork_exec", "fork_exec.py", processes=6, competitor=4),
    Program("bindings", "bindings.py", processes=2),
    Program("runtime_forms", "runtime_forms.cu", flags=("-cudart", "static")),
    Program("threads", "threads.cu", flags=("-cudart", "shared")),
    Program("threads_static", "threads.cu", flags=("-cudart", "static", "--default-stream", "per-thread")),
    Program("entangled", "entangled.cu", flags=("-cudart", "static")),
    Program("endings", "endings.cu", flags=("-cudart", "static")),
    Program("green", "green.py"),
    Program("nccl", "nccl.py", gpus=2, processes=1),
    Program("nccl_ipc", "nccl.py", gpus=2, processes=1, environment={"NCCL_CUMEM_ENABLE": "0"}),
    Program("peer", "peer.py", gpus=2),
]


class Failed(Exception):
    """A scenario that could not be run, with the reason."""


def nvcc():
    """The compiler and where its runtime library is."""
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.path.exists(found):
        return None, None
    root = pathlib.Path(found).resolve().parents[1]
    places = [root / "lib64", root / "lib", root / "targets/x86_64-linux/lib"]
    return found, next((place for place in places if list(place.glob("libcudart.so*"))), None)


def build(program, directory, architecture):
    """Builds a C++ program. Returns its path."""
    compiler, library = nvcc()
    if compiler is None:
        raise Failed("there is no nvcc")
    target = directory / program.name
    command = [compiler, "-std=c++17", "-O2", f"-arch={architecture}", "-Xcompiler", "-pthread", *program.flags]
    if library and "shared" in program.flags:
        command += ["-L", library, "-Xlinker", f"-rpath,{library}"]
        if not (library / "libcudart.so").exists():
            # Only the runtime's own name is there, and the linker asks for the plain one.
            links = directory / "links"
            links.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                (links / "libcudart.so").symlink_to(sorted(library.glob("libcudart.so*"))[0])
            command += ["-L", links]
    command += ["-o", target, PROGRAMS_IN / program.source]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Failed(f"it does not build: {done.stdout[-2000:]}")
    return target


def query(what):
    """What nvidia-smi says of each GPU."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


class Matrix:
    def __init__(self, options):
        self.options = options
        self.binaries = options.bin.resolve()
        self.until = time.monotonic() + options.budget
        self.print_lock = threading.Lock()
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="nvshare-matrix-"))
        self.machine = "; ".join(query("name,memory.total,driver_version")) or "no nvidia-smi"
        self.gpus = max(1, len(query("uuid")))
        self.context = 0
        self.builds = {}
        # Compilers' caches last from the native run to the others, which then use the same kernels.
        self.environment = {
            "OMP_NUM_THREADS": "4",
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            "TRITON_CACHE_DIR": str(self.scratch / "triton"),
            "CUPY_CACHE_DIR": str(self.scratch / "cupy"),
        }

    def say(self, text):
        with self.print_lock:
            print(text, flush=True)

    def command(self, program, scenario):
        if program.source.endswith(".cu"):
            head = [self.builds[program.name].result()]
        else:
            head = [sys.executable, PROGRAMS_IN / program.source]
        # What lasts is the run with switches; without them a few rounds tell all.
        seconds = self.options.seconds if scenario == "switched" else min(3, self.options.seconds)
        return [*head, "--seconds", seconds, *(program.shared if scenario != "native" else ())]

    def start_environment(self, program, device):
        visible = {} if program.gpus >= self.gpus else {"CUDA_VISIBLE_DEVICES": str(device)}
        return self.environment | program.environment | visible

    def left(self):
        """Seconds that a run may take."""
        left = min(self.options.timeout, self.until - time.monotonic())
        if left < 10:
            raise Failed(f"not run: the time of {self.options.budget} s was over")
        return left

    def measure_context(self):
        """What the competitor's context takes: a pool must have room for it, and nobody knows before."""
        with tempfile.TemporaryFile("w+") as log, Arbiter(self.binaries, 4 * GIB, log=log) as arbiter:
            competitor = Competitor(self.binaries, arbiter.environment(), 64 * MIB)
            competitor.begin()
            with Watch(arbiter) as watch:
                until = time.monotonic() + 5
                while not self.context and time.monotonic() < until:
                    time.sleep(0.2)
                    self.context = watch.most("competitor", lambda client: client["pinned_bytes"])
            if not competitor.finish():
                raise Failed("the competitor found wrong data although it was alone")

    def under_nvshare(self, program, scenario, device, capacity, competitors):
        """Runs a program as a client, beside so many competitors of so many bytes each (one a GPU)."""
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            arbiter = stack.enter_context(Arbiter(self.binaries, capacity, ["--quantum", "1s"], log))
            watch = stack.enter_context(Watch(arbiter))
            rivals = []
            for gpu, size in enumerate(competitors):
                visible = {"CUDA_VISIBLE_DEVICES": str(gpu if program.gpus > 1 else device)} if self.gpus > 1 else {}
                rivals.append(Competitor(self.binaries, arbiter.environment() | visible, size))
                stack.callback(rivals[-1].close, 1)
            for rival in rivals:
                rival.begin()
            environment = self.start_environment(program, device) | arbiter.environment()
            ended = run(
                self.command(program, scenario), environment | {"NVSHARE_CLIENT_NAME": "program"}, self.left()
            )
            found = self.judge(ended)
            for rival in rivals:
                if not rival.finish():
                    found["ok"] = False
                    found["remark"] = "the competitor's data is wrong; " + found["remark"]
            if watch.repaired():
                found["ok"] = False
                found["remark"] = "the books did not balance; " + found["remark"]
            found["switches"] = watch.yields("program")
            if not found["ok"] and not found.get("skip"):
                log.seek(0)
                found["log"] += "\nthe arbiter:\n" + "\n".join(log.read().splitlines()[-8:])
                found["log"] += "\nits clients at last: " + json.dumps(list(watch.last("program").values()))
        return found, watch

    def judge(self, ended):
        """What a run came to."""
        result = ended.result
        right = ended.status == 0 and result.get("ok") is True and not ended.stuck
        found = {
            "ok": right,
            "seconds": round(ended.seconds, 1),
            "digest": result.get("digest", ""),
            "framework": result.get("framework", ""),
            "figures": result.get("figures", {}),
            "remark": "",
            "log": "",
        }
        if "skip" in result:
            found["skip"] = result["skip"]
        elif not right:
            last = (ended.errors.strip().splitlines() or ["it said nothing"])[-1]
            found["remark"] = ended.stuck[0] if ended.stuck else f"status {ended.status}: {last[:300]}"
            found["log"] = ended.tail()
        return found

    def pool(self, program, watch):
        """A pool with room for the program, or for the competitor, and not for both."""
        rival = int(program.competitor * GIB)
        demand = watch.most("program", lambda client: client["demand_bytes"])
        pinned = max(
            watch.most("program", lambda client: client["pinned_bytes"]), program.processes * self.context
        )
        both = watch.most("program", lambda client: client["demand_bytes"] + client["pinned_bytes"])
        need = max(both, pinned + max(demand, rival))
        return need + self.context + min(128 * MIB, demand // 4, rival // 4), {
            "demand_mib": demand >> 20,
            "pinned_mib": pinned >> 20,
        }

    def examine(self, program, device):
        """All scenarios of a program: a row."""
        row = {
            "name": program.name,
            "gpus": program.gpus,
            "machine": self.machine,
            "date": time.strftime("%Y-%m-%d"),
            "command": "python3 tests/gpu/matrix.py " + shlex.join(sys.argv[1:]),
            "remark": program.remark,
        }
        try:
            for scenario in SCENARIOS:
                if scenario == "native":
                    environment = self.start_environment(program, device) | program.native
                    row[scenario] = self.judge(run(self.command(program, scenario), environment, self.left()))
                elif scenario == "alone":
                    row[scenario], watch = self.under_nvshare(program, scenario, device, int(program.pool * GIB), [])
                else:
                    capacity, row["need"] = self.pool(program, watch)
                    rivals = [int(program.competitor * GIB)] * program.gpus
                    row["capacity_mib"] = capacity >> 20
                    row[scenario], _ = self.under_nvshare(program, scenario, device, capacity, rivals)
                    if row[scenario]["ok"] and row[scenario]["switches"] < self.options.least_switches:
                        row[scenario]["ok"] = False
                        row[scenario]["remark"] = f"only {row[scenario]['switches']} switches were forced"
                found = row[scenario]
                if found["digest"] != row["native"]["digest"] and found["ok"]:
                    found["remark"] = "another result than natively"
                self.tell(program, scenario, found)
                if "skip" in found or not found["digest"]:
                    # Without a native run there is nothing to compare, and who fails alone says nothing in company.
                    break
        except (Failed, RuntimeError, OSError, subprocess.SubprocessError) as error:
            lines = str(error).splitlines() or [repr(error)]
            row.setdefault(scenario, {"ok": False, "seconds": 0, "digest": "", "remark": lines[0], "log": str(error)})
            self.tell(program, scenario, row[scenario])
        return row

    def tell(self, program, scenario, found):
        """A line as a scenario ends, and what a failed one said."""
        other = found["ok"] and bool(found["remark"])
        verdict = "skip" if "skip" in found else "OTHER" if other else "ok" if found["ok"] else "FAILED"
        switches = f" {found['switches']} switches" if scenario == "switched" and "switches" in found else ""
        why = found.get("skip") or found["remark"]
        text = f"{program.name:14} {scenario:9} {verdict:7} {found['seconds']:6.1f} s {found['digest'][:12]:12}{switches} {why}"
        if verdict == "FAILED" and found.get("log"):
            text += "\n" + "\n".join("    | " + line for line in found["log"].splitlines())
        self.say(text.rstrip())

    def run(self, programs):
        """All rows."""
        capability = (query("compute_cap") or ["9.0"])[0].replace(".", "")
        with concurrent.futures.ThreadPoolExecutor(2) as builders, concurrent.futures.ThreadPoolExecutor(
            self.options.jobs
        ) as workers:
            for program in programs:
                if program.source.endswith(".cu"):
                    future = builders.submit(build, program, self.scratch, f"sm_{capability}")
                    self.builds[program.name] = future
            self.measure_context()
            self.say(f"{self.machine}; the competitor's context takes {self.context >> 20} MiB")
            rows = [
                workers.submit(self.examine, program, index % self.gpus) for index, program in enumerate(programs)
            ]
            rows = [row.result() for row in rows]
        shutil.rmtree(self.scratch, ignore_errors=True)
        return rows


def settled(row):
    """Whether a row is all right, and its cells."""
    runs = [row.get(scenario, {}) for scenario in SCENARIOS]
    skip = next((found["skip"] for found in runs if "skip" in found), None)
    same = len({found.get("digest", "") for found in runs}) == 1 and bool(runs[0].get("digest"))
    good = same and all(found.get("ok") for found in runs)
    cells = [f"`{row['name']}`", next((found["framework"] for found in runs if found.get("framework")), "")]
    for scenario, found in zip(SCENARIOS, runs):
        cell = "-" if not found or "skip" in found else "ok" if found["ok"] else "**no**"
        if scenario == "switched" and "switches" in found:
            cell += f", {found['switches']} switches"
        cells.append(cell)
    cells.append("-" if skip else "yes" if same else "**no**")
    cells.append(" / ".join(f"{found['seconds']:.0f}" if found else "-" for found in runs))
    remarks = [row.get("remark", ""), f"not run: {skip}" if skip else ""]
    remarks += [found.get("remark", "") for found in runs]
    cells.append("; ".join(remark.replace("|", "\\|").replace("\n", " ") for remark in remarks if remark))
    return good or bool(skip), cells


def table(rows):
    """Its part of docs/compatibility.md."""
    heads = ["program", "framework", "native", "under nvshare, alone", "with switches", "same result", "seconds", "remark"]
    lines = [
        "## Frameworks and programs",
        "",
        "Written by `tests/gpu/matrix.py`; see [testing.md](testing.md). Each program of `tests/gpu/matrix/` checks its own",
        "numbers and ran three times: natively; under nvshare alone; and under nvshare in a pool too small for it and a",
        "competitor that always wants the GPU and checks its own data, with a fixed quantum of 1 s. \"Same result\": the",
        "digest of all its numbers is the same in the three runs, bit by bit. A switch is counted each time that the",
        "program's memory had to make way.",
        "",
    ]
    for machine in dict.fromkeys((row["machine"], row["date"], row["command"]) for row in rows):
        lines.append(f"- {machine[1]}, {machine[0]}: `{machine[2]}`")
    lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        lines.append("| " + " | ".join(settled(row)[1]) + " |")
    return "\n".join(lines) + "\n"


def read_rows(path):
    return json.loads(pathlib.Path(path).read_text())["rows"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--only", nargs="*", choices=[program.name for program in PROGRAMS], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=8, help="how long each works with switches (default 8)")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1, help="run the programs that need so many")
    parser.add_argument("--jobs", type=int, default=4, help="programs at a time (default 4)")
    parser.add_argument("--timeout", type=float, default=120, help="the most that one run may take (default 120)")
    parser.add_argument("--budget", type=float, default=540, help="begin no run after so many seconds (default 540)")
    parser.add_argument("--least-switches", type=int, default=2, help="fewer are a failure (default 2)")
    parser.add_argument("--out", type=pathlib.Path, help="put the table into this page")
    parser.add_argument("--json", type=pathlib.Path, help="keep the rows here")
    parser.add_argument("--merge", nargs="*", default=[], help="rows of earlier runs; those of this run replace them")
    parser.add_argument("--render", action="store_true", help="run nothing, only write the table of --merge")
    options = parser.parse_args()
    programs = [
        program
        for program in PROGRAMS
        if (program.name in options.only if options.only is not None else program.gpus == options.gpus)
    ]
    began = time.monotonic()
    new = [] if options.render else Matrix(options).run(programs)
    rows = {row["name"]: row for path in options.merge for row in read_rows(path)}
    rows |= {row["name"]: row for row in new}
    order = [program.name for program in PROGRAMS]
    rows = sorted(rows.values(), key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if options.out:
        sections.write(options.out, "matrix", table(rows))
    bad = [row["name"] for row in rows if not settled(row)[0]]
    print(f"{len(rows) - len(bad)} of {len(rows)} right in {time.monotonic() - began:.0f} s" + (f"; not right: {' '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
