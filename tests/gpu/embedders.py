"""The two embedding examples, in C and in Rust, take turns on a real GPU with a preloaded PyTorch program, in a pool that has room for
the memory of one and a half of the three. Memory of all three moves, and each checks every word of its own at the end.

    python3 tests/gpu/embedders.py [--bin target/release] [--mib 2048] [--turns 6]

--bin also holds embed-vmm (of examples/embedding) and libnvshare_client.so; capi/examples/c/share_gpu.c is built here, with cc.
--simulated runs it on the simulated GPU, with `nvshare internal job` in place of PyTorch, to try the program. Prints each client's
figures, and a line for each; exit status 1 if data was wrong.
"""

import argparse
import contextlib
import ctypes.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from harness import HERE, MIB, Arbiter, Competitor, Job, program, report, say, simulated_gpu, start

ROOT = HERE.parent.parent


def torch_job(mib):
    """Adds 1 to all of its memory again and again until its input ends, and checks every word of it."""
    import threading

    import torch

    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    words = torch.arange(mib * MIB // 8, dtype=torch.int64, device="cuda")
    steps = 0
    while not ended.is_set():
        for _ in range(20):
            words.add_(1)
        torch.cuda.synchronize()
        steps += 20
    words.sub_(steps)
    right = all(
        torch.equal(part, torch.arange(first, first + part.numel(), dtype=torch.int64, device="cuda"))
        for first, part in zip(range(0, words.numel(), MIB), words.split(MIB))
    )
    print(json.dumps({"right": right, "steps": steps}), flush=True)


class Example:
    """A program that embeds nvshare. It works until its input ends; its last line says whether its data was right."""

    def __init__(self, command, environment):
        self.log = tempfile.TemporaryFile("w+")
        self.process = start(command, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)

    def finish(self):
        try:
            said, _ = self.process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            said, _ = self.process.communicate()
        self.log.seek(0)
        last = (said.splitlines() or [""])[-1]
        return self.process.returncode == 0 and last.startswith("right after"), last or self.log.read()[-1000:]


class Preloaded(Job):
    def __init__(self, mib, environment):
        super().__init__([*program("embedders.py"), "--role", "torch", f"--mib={mib}"], environment, "torch")

    def finish(self):
        self.process.stdin.close()
        answer = self.answer(90)
        return self.close() == 0 and answer["right"], f"right after {answer['steps']} steps" if answer["right"] else "its data is wrong"


class SimulatedJob(Competitor):
    def __init__(self, mib, environment, binaries):
        super().__init__(binaries, environment, mib * MIB)
        self.begin()

    def finish(self):
        right = super().finish()
        return right, "its data is right" if right else "its data is wrong"


def build_c(binaries, folder):
    """share_gpu, as docs/embedding.md says, against the CUDA driver that is here."""
    found = ctypes.util.find_library("cuda") or "libcuda.so.1"
    places = [place for place in os.environ.get("LD_LIBRARY_PATH", "").split(":") if place and pathlib.Path(place, found).exists()]
    command = ["cc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-pthread", f"-I{ROOT / 'capi/include'}", "-o", f"{folder}/share_gpu"]
    # As capi/install installs the library: the program looks for the name with the version.
    os.symlink(binaries / "libnvshare_client.so", f"{folder}/libnvshare_client.so.0")
    command += [str(ROOT / "capi/examples/c/share_gpu.c"), f"-L{binaries}", "-lnvshare_client", f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, *[f"-L{place}" for place in places], f"-l:{found}"], check=True)
    return f"{folder}/share_gpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--mib", type=int, default=2048, help="memory of each program")
    parser.add_argument("--turns", type=int, default=6, help="how often each gives way before it ends")
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--role", choices=["torch"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        return torch_job(options.mib)
    binaries = options.bin.resolve()
    simulated = simulated_gpu(binaries, MEMORY="8GiB", CONTEXT_BYTES="2MiB") if options.simulated else contextlib.nullcontext()
    with simulated, tempfile.TemporaryDirectory() as folder:
        # A context of a real GPU takes about 600 MiB, and each of the three has one.
        contexts = 64 if options.simulated else 2048
        with Arbiter(binaries, f"{options.mib * 3 // 2 + contexts}MiB") as arbiter:
            own = {"NVSHARE_RUNTIME_DIR": arbiter.directory}
            programs = {
                "share_gpu": Example([build_c(binaries, folder), options.mib, 7], own),
                "vmm": Example([binaries / "embed-vmm", "--mib", options.mib, "--seed", 8], own),
            }
            if options.simulated:
                programs["competitor"] = SimulatedJob(options.mib, arbiter.environment(), binaries)
            else:
                programs["torch"] = Preloaded(options.mib, arbiter.environment())
            until, rows = time.monotonic() + 120, {}
            while time.monotonic() < until:
                rows |= {client["name"]: client for client in arbiter.clients()}
                if all(name in rows and rows[name]["yields"] >= options.turns for name in programs):
                    break
                if any(one.process.poll() is not None for one in programs.values()):
                    break
                time.sleep(0.1)

            def one(name):
                right, said = programs[name].finish()
                figures = {what: rows.get(name, {}).get(what, 0) for what in ("yields", "bytes_in", "bytes_out")}
                say(name, right=right, said=said, **figures)
                moved = figures["yields"] >= options.turns and figures["bytes_in"] and figures["bytes_out"]
                line = f"{name:10} {said}; gave way {figures['yields']} times, {figures['bytes_in'] / 2**30:.1f} GiB in, {figures['bytes_out'] / 2**30:.1f} out"
                return right and bool(moved), line

            status = report(one(name) for name in list(programs))
            gpus = arbiter.status()["gpus"]
            left = [gpu for gpu in gpus if gpu["free_bytes"] != gpu["capacity_bytes"] or gpu["repaired"]]
            print("all memory is free at the end" if not left else f"NOT free at the end: {left}")
            return status or bool(left)


if __name__ == "__main__":
    sys.exit(main())
