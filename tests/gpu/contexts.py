"""Two processes share a GPU; the first context of one of them is destroyed, and the memory of its second one
goes on moving out and in.

    python3 tests/gpu/contexts.py [--bin target/release]

The processes are `nvshare-test-calls` (tests/e2e), which makes the CUDA calls that it reads: `cargo build --release --workspace`
puts it beside nvshare.
"""

import argparse
import pathlib
import subprocess

GIB = 1 << 30
INVALID_VALUE = "1"


class Application:
    def __init__(self, binaries):
        command = [binaries / "nvshare", "run", "--capacity", "14.9GiB", "--", binaries / "nvshare-test-calls"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *words):
        """The CUresult of a call, and what else it gave."""
        call = " ".join(map(str, words))
        self.process.stdin.write(call + "\n")
        self.process.stdin.flush()
        code, _, given = self.process.stdout.readline().rstrip("\n").partition(" ")
        print(f"{call} -> {code} {given}", flush=True)
        return code, given

    def call(self, *words):
        code, given = self.ask(*words)
        assert code == "0", f"{words} said {code}"
        return given

    def end(self):
        self.process.stdin.close()
        assert self.process.wait() == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path(__file__).parents[2] / "target/release")
    binaries = parser.parse_args().bin.resolve()
    two, other = Application(binaries), Application(binaries)
    for application in (two, other):
        application.call("init")
        application.call("create")
    gone = two.call("alloc", GIB)
    two.call("write", gone, GIB, 1)
    two.call("create")
    stays = two.call("alloc", 8 * GIB)
    two.call("write", stays, 2 * GIB, 2)
    large = other.call("alloc", 10 * GIB)
    other.call("write", large, 2 * GIB, 3)
    two.call("destroy", 0)
    for _ in range(3):
        assert two.call("check", stays, 2 * GIB, 2) == "right"
        assert other.call("check", large, 2 * GIB, 3) == "right"
    assert two.ask("free", gone)[0] == INVALID_VALUE, "it went with its context"
    two.end()
    other.end()
    print("all right")


if __name__ == "__main__":
    main()
