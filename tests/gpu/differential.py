"""The driver's own answers: a long list of queries and life-cycle calls, with ordinary and odd arguments, natively,
under nvshare alone, and under nvshare beside a competitor in a pool too small for both. Result codes and outputs are
compared call by call; every difference is a row of a table, with the reason why it is meant to be, or UNEXPLAINED.

    python3 tests/gpu/differential.py --bin build [--only 'pointer_*' ...] [--jobs N] [--budget S]
        [--out docs/compatibility.md] [--json FILE] [--merge FILE ...] [--render] [--simulated]

The sequences of calls are in tests/gpu/differential/sequences.py, the reasons in explained.py. Each sequence runs in a
process of its own, so one that crashes or hangs is a row and not the end. Natively each runs twice: what then differs
is the driver's whim, and is not compared. --json keeps everything that was answered; --merge adds the sequences of
earlier runs, where this one has none of that name, and --render runs nothing and only compares those. --simulated takes
the simulated GPU of the build, and compares only what it has. Exit status 1 if a difference is unexplained, or a sequence
was not run.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

from harness import GIB, HERE, MIB, Arbiter, Competitor, Watch, run, simulated_gpu

FOLDER = HERE / "differential"
sys.path.insert(0, str(FOLDER))
import explained  # noqa: E402
import sections  # noqa: E402
from sequences import SEQUENCES  # noqa: E402

SCENARIOS = ("native", "native again", "alone", "beside")
SHARED = ("alone", "beside")
# Sequences at a time beside the competitor.
RIVALS = 2
# What the simulated GPU's driver says of what it does not have.
LACKING = ("missing", "NOT_SUPPORTED")


@dataclasses.dataclass
class Call:
    """A call, and what was answered."""

    told: str
    result: str = "no answer"
    outputs: list = dataclasses.field(default_factory=list)

    @property
    def answer(self):
        return self.result + (" (" + ", ".join(self.outputs) + ")" if self.outputs else "")

    @property
    def function(self):
        return self.told.partition("(")[0]


@dataclasses.dataclass
class Record:
    """What a sequence came to."""

    calls: list
    remark: str = ""
    log: str = ""
    simulated: bool = False

    def plain(self):
        """For JSON: what was called and answered, and what it said if it did not end well."""
        calls = [f"{call.told} -> {call.answer}" for call in self.calls]
        log = {"log": self.log} if self.remark else {}
        return {"calls": calls, "remark": self.remark, **log, **({"simulated": True} if self.simulated else {})}

    @staticmethod
    def of(plain):
        """What `plain` made JSON of."""
        record = Record([], plain["remark"], plain.get("log", ""), plain.get("simulated", False))
        for line in plain["calls"]:
            told, _, answer = line.partition(" -> ")
            result, _, outputs = answer.partition(" (")
            record.calls.append(Call(told, result, [outputs.removesuffix(")")] if outputs else []))
        return record

    @staticmethod
    def read(ended):
        record = Record([], log=ended.tail())
        whole = False
        for line in ended.output.splitlines():
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            record.simulated |= bool(said.get("simulated"))
            if "call" in said:
                record.calls.append(Call(said["call"]))
            elif "result" in said:
                record.calls[-1].result, record.calls[-1].outputs = said["result"], said["outputs"]
            whole |= said.get("ended", False)
        if ended.stuck:
            record.remark = ended.stuck[0]
        elif ended.status != 0:
            record.remark = f"signal {-ended.status}" if ended.status < 0 else f"exit status {ended.status}"
        if record.remark and record.calls and not whole and record.calls[-1].result == "no answer":
            record.calls[-1].result = record.remark
        if record.remark and (whole or not record.calls):
            record.calls.append(Call("the end of the process", record.remark))
        return record


@dataclasses.dataclass(frozen=True)
class Difference:
    sequence: str
    scenario: str
    call: str
    native: str
    shared: str
    why: str | None


def compare(name, records):
    """The differences of a sequence from the native run, and how many answers were compared."""
    native, again = records["native"], records["native again"]
    found, compared = [], 0
    for scenario in SHARED:
        for index, call in enumerate(native.calls):
            twin = again.calls[index] if index < len(again.calls) else Call("")
            if twin.told != call.told or twin.answer != call.answer:
                continue
            if native.simulated and call.result in LACKING:
                continue
            compared += 1
            calls = records[scenario].calls
            other = calls[index] if index < len(calls) else Call("", "not reached")
            if other.told not in (call.told, ""):
                other = Call("", f"another call: {other.told}")
            if other.answer != call.answer:
                why = explained.why(name, call.told, call.answer, other.answer)
                found.append(Difference(name, scenario, call.told, call.answer, other.answer, why))
                if other.result == "not reached":
                    break
        beyond = records[scenario].calls[len(native.calls) :]
        if beyond:
            why = explained.why(name, beyond[0].told, "", beyond[0].answer)
            found.append(Difference(name, scenario, beyond[0].told, "", beyond[0].answer, why))
    return found, compared


class Differential:
    def __init__(self, options, names):
        self.options, self.names = options, names
        self.binaries = options.bin.resolve()
        self.until = time.monotonic() + options.budget
        self.records = {name: {} for name in names}
        self.heads = []
        self.switches = 0

    def sequence(self, name, scenario, environment):
        left = min(self.options.timeout, self.until - time.monotonic())
        if left < 5:
            return
        pause = str(self.options.pause) if scenario == "beside" else "0"
        command = [sys.executable, FOLDER / "sequences.py", name, pause]
        named = {"NVSHARE_CLIENT_NAME": "sequence", "PYTHONDONTWRITEBYTECODE": "1"}
        ended = run(command, environment | (named if environment else {}), left)
        self.records[name][scenario] = Record.read(ended)

    def all(self, scenario, environment, jobs):
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(jobs) as workers:
            list(workers.map(lambda name: self.sequence(name, scenario, environment), self.names))
        print(f"{scenario}: {len(self.names)} sequences in {time.monotonic() - began:.0f} s", flush=True)

    def under_nvshare(self, scenario, capacity, rival):
        """All sequences as clients, beside a competitor of so many bytes if there is to be one."""
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            arbiter = stack.enter_context(Arbiter(self.binaries, capacity, ["--quantum", "100ms"], log))
            watch = stack.enter_context(Watch(arbiter))
            competitor = None
            if rival:
                competitor = Competitor(self.binaries, arbiter.environment(), rival)
                stack.callback(competitor.close, 1)
                competitor.begin()
            self.all(scenario, arbiter.environment(), RIVALS if rival else self.options.jobs)
            if competitor and not competitor.finish():
                raise RuntimeError("the competitor's data is wrong")
            if watch.repaired():
                raise RuntimeError("the books did not balance")
            self.switches = watch.yields("sequence")
            return watch

    def measure_context(self):
        """What a context takes: a pool must have room for it, and nobody knows before."""
        with tempfile.TemporaryFile("w+") as log, Arbiter(self.binaries, 4 * GIB, log=log) as arbiter:
            competitor = Competitor(self.binaries, arbiter.environment(), 64 * MIB)
            competitor.begin()
            with Watch(arbiter) as watch:
                until, context = time.monotonic() + 5, 0
                while not context and time.monotonic() < until:
                    time.sleep(0.2)
                    context = watch.most("competitor", lambda client: client["pinned_bytes"])
            competitor.finish()
            return context

    def merge(self, path):
        """Adds the sequences of an earlier run."""
        earlier = json.loads(pathlib.Path(path).read_text())
        for name, found in earlier["records"].items():
            if not self.records.get(name):
                self.records[name] = {scenario: Record.of(plain) for scenario, plain in found.items()}
        self.heads += earlier["heads"]
        self.switches += earlier["switches"]

    def run(self):
        simulated = self.options.simulated
        for scenario in ("native", "native again"):
            self.all(scenario, {}, self.options.jobs)
        self.under_nvshare("alone", 4 * GIB if simulated else self.options.jobs * 4 * GIB, 0)
        rival = 384 * MIB if simulated else 1536 * MIB
        self.under_nvshare("beside", rival + (RIVALS + 1) * self.measure_context() + 96 * MIB, rival)


def machine():
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "no nvidia-smi"
    return said.strip().splitlines()[0]


def grouped(differences):
    """Rows of the table: the same difference of the same function is told once."""
    rows = {}
    for one in differences:
        function = one.call.partition("(")[0]
        rows.setdefault((one.why is not None, one.why or "", function, one.native, one.shared), []).append(one)
    return sorted(rows.items())


def cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def table(heads, differences, compared, sequences, switches):
    """The part of docs/compatibility.md."""
    explained_ones = sum(one.why is not None for one in differences)
    lines = [
        "## The driver's own answers",
        "",
        "Written by `tests/gpu/differential.py`; see [testing.md](testing.md). Queries and life-cycle calls with ordinary and",
        "odd arguments, natively, under nvshare alone, and beside a competitor in a pool too small for both. Addresses are",
        "compared as allocation and offset, handles by what they belong to, amounts of free memory not at all.",
        "",
        *(f"- {head}" for head in heads),
        f"- {sequences} sequences, {compared} answers compared, {len(differences)} other than natively:"
        f" {explained_ones} explained, {len(differences) - explained_ones} unexplained; {switches} switches beside the competitor",
        "",
    ]
    if differences:
        lines += ["| call | natively | under nvshare | where | why |", "|---|---|---|---|---|"]
    for (_, why, _, native, shared), ones in grouped(differences):
        more = len({one.call for one in ones}) - 1
        call = f"`{cell(ones[0].call)}`" + (f" and {more} more" if more else "")
        scenarios = " ".join(dict.fromkeys(one.scenario for one in ones))
        where = ", ".join(f"`{name}`" for name in list(dict.fromkeys(one.sequence for one in ones))[:4])
        lines.append(f"| {call} | {cell(native)} | {cell(shared)} | {where}; {scenarios} | {cell(why) or '**UNEXPLAINED**'} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="run the sequences that match")
    parser.add_argument("--jobs", type=int, default=4, help="sequences at a time, where they do not compete (default 4)")
    parser.add_argument("--timeout", type=float, default=40, help="the most that a sequence may take (default 40)")
    parser.add_argument("--pause", type=float, default=0.003, help="s before each call beside the competitor (default 0.003)")
    parser.add_argument("--budget", type=float, default=540, help="begin none after so many seconds (default 540)")
    parser.add_argument("--out", type=pathlib.Path, help="put the table into this page")
    parser.add_argument("--json", type=pathlib.Path, help="keep all answers here")
    parser.add_argument("--merge", nargs="*", default=[], help="answers of earlier runs; those of this run replace them")
    parser.add_argument("--render", action="store_true", help="run nothing, only compare the answers of --merge")
    parser.add_argument("--simulated", action="store_true", help="on the simulated GPU of the build")
    parser.add_argument("--list", action="store_true", help="name the sequences and end")
    options = parser.parse_args()
    names = [name for name in SEQUENCES if any(fnmatch.fnmatchcase(name, only) or name == only for only in options.only)]
    if options.list:
        print("\n".join(names))
        return 0
    differential, began = Differential(options, [] if options.render else names), time.monotonic()
    if not options.render:
        gpu = {"MEMORY": "6GiB", "CONTEXT_BYTES": "16MiB"}
        with simulated_gpu(differential.binaries, **gpu) if options.simulated else contextlib.nullcontext():
            differential.run()
        command = "python3 tests/gpu/differential.py " + shlex.join(sys.argv[1:])
        gpu = "the simulated GPU" if options.simulated else machine()
        differential.heads.append(f"{time.strftime('%Y-%m-%d')}, {gpu}: `{command}`")
    for path in options.merge:
        differential.merge(path)
    return report(options, differential, time.monotonic() - began)


def report(options, differential, seconds):
    records = differential.records
    ran = [name for name in records if all(scenario in records[name] for scenario in SCENARIOS)]
    differences, compared = [], 0
    for name in ran:
        found, count = compare(name, records[name])
        differences += found
        compared += count
    for one in differences:
        if one.why is None:
            print(f"UNEXPLAINED {one.sequence}, {one.scenario}: {one.call}: natively {one.native}, here {one.shared}")
    if options.out:
        part = table(differential.heads, differences, compared, len(ran), differential.switches)
        sections.write(options.out, "differential", part)
    if options.json:
        everything = {
            "heads": differential.heads,
            "switches": differential.switches,
            "differences": [dataclasses.asdict(one) for one in differences],
            "records": {
                name: {scenario: record.plain() for scenario, record in found.items()}
                for name, found in records.items()
            },
        }
        options.json.write_text(json.dumps(everything) + "\n")
    unexplained = sum(one.why is None for one in differences)
    left_out = [name for name in records if name not in ran]
    if left_out:
        print(f"not run, for want of time: {' '.join(left_out)}")
    print(
        f"{len(ran)} sequences, {compared} answers compared, {len(differences)} other than natively,"
        f" {unexplained} unexplained, {differential.switches} switches, {seconds:.0f} s"
    )
    return 1 if unexplained or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
