"""Programs that failed under nvshare once, each natively, alone, and beside a competitor that always wants the GPU, in a
pool too small for both.

    python3 tests/gpu/cases.py FOLDER [--bin build] [--seconds S] [--jobs N] [--only NAME ...] [--ways NAME=WORD,WORD ...]

A case is a file NAME.py or NAME.cu in the folder; a line `// nvcc: FLAGS` tells how it is built, and --ways with which
argument it is run, once for each. Its last line of output is "OK ...", "FAIL why" or "SKIP why". A case holds 3 GiB, and
works for CASE_SECONDS. Exit status 1 if a case is not right, or was never made to give way.
"""

import argparse
import concurrent.futures
import contextlib
import pathlib
import re
import subprocess
import sys
import tempfile

from harness import GIB, HERE, Arbiter, Competitor, Watch, run
from matrix import nvcc, query

# What a case holds, and the competitor; a context and a half beside the larger of them.
HOLDS = 3 * GIB
POOL = 5 * GIB

# Files that the cases share, or that are no cases.
NO_CASES = {"case", "competitor"}


def build(source, directory):
    """Builds a C++ case. Returns the program, or says why not."""
    compiler, _ = nvcc()
    if compiler is None:
        raise RuntimeError("there is no nvcc")
    flags = re.search(r"^// nvcc: (.*)$", source.read_text(), re.MULTILINE)
    architecture = (query("compute_cap") or ["9.0"])[0].replace(".", "")
    target = directory / source.stem
    command = [compiler, "-std=c++17", "-O2", f"-arch=sm_{architecture}", *(flags[1].split() if flags else []), "-o", target, source, "-lcuda"]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not build: {done.stdout[-2000:]}")
    return target


class Cases:
    def __init__(self, options):
        self.options = options
        self.binaries = options.bin.resolve()

    def verdict(self, ended):
        """Whether a run is right (or has nothing to test here), and what it said."""
        said = (ended.output.strip().splitlines() or [f"it said nothing, status {ended.status}"])[-1]
        if ended.stuck:
            return False, "\n".join(ended.stuck)
        if said.startswith("SKIP"):
            return None, said
        return ended.status == 0 and said.startswith("OK"), said if said.startswith("OK") else f"{said}\n{ended.tail()}"

    def under_nvshare(self, command, beside):
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            arbiter = stack.enter_context(Arbiter(self.binaries, POOL, ["--quantum", "1s"], log))
            watch = stack.enter_context(Watch(arbiter))
            rival = None
            if beside:
                rival = Competitor(self.binaries, arbiter.environment(), HOLDS)
                stack.callback(rival.close, 1)
                rival.begin()
            environment = arbiter.environment() | {"NVSHARE_CLIENT_NAME": "case", "CASE_SECONDS": str(self.options.seconds)}
            right, said = self.verdict(run(command, environment, self.options.timeout))
            if rival and not rival.finish():
                right, said = False, f"the competitor's data is wrong; {said}"
            if watch.repaired():
                right, said = False, f"the books did not balance; {said}"
            switches = watch.yields("case")
            if rival and right and not switches:
                right, said = False, f"it never had to give way; {said}"
        return right, f"{switches} switches: {said}" if beside else said

    def examine(self, name, command):
        """A case in its three places. Whether all are right."""
        good = True
        native = {"CASE_SECONDS": str(min(2, self.options.seconds))}
        for place in ("native", "alone", "beside"):
            if place == "native":
                right, said = self.verdict(run(command, native, self.options.timeout))
            else:
                right, said = self.under_nvshare(command, place == "beside")
            print(f"{name:32} {place:7} {'skip' if right is None else 'ok' if right else 'FAILED'}  {said}", flush=True)
            good &= right is not False
        return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--timeout", type=float, default=90, help="the most that one run may take, s (default 90)")
    parser.add_argument("--jobs", type=int, default=3, help="cases at a time (default 3)")
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--ways", nargs="*", default=[], metavar="NAME=WORD,WORD", help="arguments of a case, a run for each")
    options = parser.parse_args()
    ways = {name: words.split(",") for name, _, words in (way.partition("=") for way in options.ways)}
    cases = Cases(options)
    sources = [one for one in sorted(options.folder.resolve().iterdir()) if one.suffix in (".py", ".cu") and one.stem not in NO_CASES]
    sources = [one for one in sources if not options.only or one.stem in options.only]
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(options.jobs) as workers:

        def whole(source):
            try:
                head = [build(source, pathlib.Path(scratch))] if source.suffix == ".cu" else [sys.executable, source]
                with_words = [[word] for word in ways.get(source.stem, [])] or [[]]
                return [cases.examine(" ".join([source.stem, *words]), [*head, *words]) for words in with_words]
            except RuntimeError as error:
                print(f"{source.stem:32} FAILED  {error}", flush=True)
                return [False]

        verdicts = [right for rights in workers.map(whole, sources) for right in rights]
    print(f"{sum(verdicts)} of {len(verdicts)} right")
    return 0 if verdicts and all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
