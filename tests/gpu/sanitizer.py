"""compute-sanitizer under nvshare: an overrun by one int is found, and a program without one passes, natively, alone and
beside a competitor that always wants the GPU. Allocations are the driver's own then, and cannot move.

    python3 tests/gpu/sanitizer.py --bin build [--sanitizer PATH] [--seconds S]

Needs nvcc and compute-sanitizer (in the CUDA toolkit; on PyPI as nvidia-cuda-sanitizer-api). Exit status 1 if anything is
not as it should be, 77 if one of them is missing.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from harness import GIB, HERE, MIB, Arbiter, Competitor, Watch, run
from matrix import nvcc, query

HOWS = ("malloc", "pitch", "async")
# None of them whole granules, and one of them in a block that the driver shares out.
SIZES = {"small": 4096 * 3, "large": 96 * MIB + 4096 * 3}
FOUND = 9


def sanitizer(named):
    """Where compute-sanitizer is."""
    if named:
        return str(named)
    places = ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    places += [f"{path}/nvidia/cuda_sanitizer_api/bin" for path in sys.path if path]
    found = shutil.which("compute-sanitizer")
    return found or next((f"{place}/compute-sanitizer" for place in places if os.path.exists(f"{place}/compute-sanitizer")), None)


class Sanitizer:
    def __init__(self, options, tool, program):
        self.options, self.tool, self.program = options, tool, program
        self.binaries = options.bin.resolve()
        self.wrong = 0

    def command(self, how, size, beyond, tool):
        seconds = self.options.seconds
        watched = [self.tool, "--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
        return [*watched, self.program, how, SIZES[size], seconds, beyond]

    def once(self, where, environment, how, size, beyond):
        """One run. Whether the overrun was found, or nothing was."""
        ended = run(self.command(how, size, beyond, "memcheck"), environment, self.options.timeout)
        found = "Invalid __global__ write of size 4" in ended.output + ended.errors
        expected = ended.status == (FOUND if beyond else 0) and found == bool(beyond) and not ended.stuck
        told = "allocations are the driver's own" in ended.errors + ended.output
        expected &= told == bool(environment)
        line = f"{where}, {how}, {size}: " + ("an int beyond the end" if beyond else "to the end")
        line += ", found" if found else ", nothing found"
        print(line + ("" if expected else f"  WRONG (status {ended.status})"), flush=True)
        if not expected:
            self.wrong += 1
            print("\n".join("    | " + text for text in (ended.output + ended.errors).splitlines()[-25:]), flush=True)

    def all(self, where, environment):
        for how in HOWS:
            for size in SIZES:
                for beyond in (0, 1):
                    self.once(where, environment, how, size, beyond)

    def under_nvshare(self, where, capacity, rival):
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            arbiter = stack.enter_context(Arbiter(self.binaries, capacity, ["--quantum", "200ms"], log))
            watch = stack.enter_context(Watch(arbiter))
            competitor = None
            if rival:
                competitor = Competitor(self.binaries, arbiter.environment(), rival)
                stack.callback(competitor.close, 1)
                competitor.begin()
            self.all(where, arbiter.environment() | {"NVSHARE_CLIENT_NAME": "watched"})
            unmovable = watch.most("watched", lambda client: client["unmovable_bytes"])
            if unmovable < SIZES["large"]:
                print(f"{where}: only {unmovable >> 20} MiB were ever in the books as unmovable  WRONG")
                self.wrong += 1
            if competitor and not competitor.finish():
                print(f"{where}: the competitor's data is wrong  WRONG")
                self.wrong += 1
            if watch.repaired():
                print(f"{where}: the books did not balance  WRONG")
                self.wrong += 1


def build(directory):
    compiler, library = nvcc()
    if compiler is None:
        return None
    capability = (query("compute_cap") or ["9.0"])[0].replace(".", "")
    target = pathlib.Path(directory) / "overrun"
    command = [compiler, "-std=c++17", "-O2", "-lineinfo", f"-arch=sm_{capability}", "-o", str(target), str(HERE / "overrun.cu")]
    subprocess.run(command, check=True)
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--sanitizer", type=pathlib.Path, help="compute-sanitizer, if it is not where it usually is")
    parser.add_argument("--seconds", type=float, default=1, help="how long each program works (default 1)")
    parser.add_argument("--timeout", type=float, default=120, help="the most that a run may take (default 120)")
    options = parser.parse_args()
    tool = sanitizer(options.sanitizer)
    with tempfile.TemporaryDirectory() as directory:
        program = build(directory)
        if tool is None or program is None:
            print(f"SKIP there is no {'compute-sanitizer' if tool is None else 'nvcc'}")
            return 77
        sanitized = Sanitizer(options, tool, program)
        sanitized.all("natively", {})
        sanitized.under_nvshare("alone", 12 * GIB, 0)
        # The competitor has all but a little of what two contexts and the sanitizer's own memory leave.
        sanitized.under_nvshare("beside a competitor", 6 * GIB, 4 * GIB)
    print("all as it should be" if not sanitized.wrong else f"{sanitized.wrong} wrong")
    return 1 if sanitized.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
