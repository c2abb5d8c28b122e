"""Processes that come from a process with a context: forks that do no CUDA (one leaves at once, one through all exit
handlers), programs that are started and have a context of their own, one that forks before it begins with CUDA, and
programs that end in the middle of their work, by themselves or killed. All by ctypes, and the driver is loaded late.
Every checksum is known; the digest is that of all of them.
"""

import os
import signal
import subprocess
import sys
import time

import common

SIZE = 64 << 20
WORDS = SIZE // 8


def compute(driver, seed):
    """Writes the same memory again and again; what is there at the end is known."""
    with driver:
        pointer, out = driver.alloc(SIZE), driver.alloc(8)
        for turn in range(50):
            driver.launch("nvshare_iota_u64", pointer, WORDS, seed + turn)
        found = driver.checksum(out, pointer, WORDS)
        driver.free(pointer)
        driver.free(out)
    expected = common.iota_checksum(WORDS, seed + 49)
    common.check(found == expected, f"the checksum is {found:x}, not {expected:x}")
    return found


def busy(driver, seconds):
    """Work that is still running when this returns."""
    with driver:
        pointer = driver.alloc(SIZE)
        driver.launch("nvshare_iota_u64", pointer, WORDS, 1)
        for _ in range(20):
            # Every thread waits so long.
            driver.launch("nvshare_spin", int(seconds * 1e9 / 20))
        driver.launch("nvshare_iota_u64", pointer, WORDS, 2)


def child(kind, seed):
    """What a program that was started does."""
    if kind == "forks":
        pid = os.fork()
        if pid == 0:
            print(compute(common.Driver(), seed), flush=True)
            os._exit(0)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    driver = common.Driver()
    if kind == "computes":
        print(compute(driver, seed), flush=True)
        return
    busy(driver, 0.4)
    print("launched", flush=True)
    if kind == "leaves":
        os._exit(7)
    if kind == "exits":
        sys.exit(8)
    time.sleep(60)  # To be killed.


def wait_for(pid, seconds):
    """The exit code of a fork."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "a hang"


def start(kind, seed):
    command = [sys.executable, __file__, "--child", kind, "--seed", str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def main():
    def more(parser):
        parser.add_argument("--child", choices=["computes", "forks", "leaves", "exits", "killed"])
        parser.add_argument("--seed", type=int, default=1)

    options = common.parse(__doc__, more)
    if options.child:
        return child(options.child, options.seed)
    with open("/proc/self/maps") as maps:
        early = "libcuda.so" in maps.read()
    driver = common.Driver()
    # More than five contexts: see matrix.py.
    ballast = common.Ballast(mib=4096, driver=driver)
    with driver:
        held, out = driver.alloc(SIZE), driver.alloc(8)

    def work():
        with driver:
            for turn in range(200):
                driver.launch("nvshare_iota_u64", held, WORDS, turn)
        # While that runs:
        forks = []
        for through_handlers in (False, True):
            pid = os.fork()
            if pid == 0:
                own = sum(index * index for index in range(100_000))
                if through_handlers:
                    sys.exit(0 if own == 333328333350000 else 1)
                os._exit(0 if own == 333328333350000 else 1)
            forks.append(pid)
        started = {kind: start(kind, 40 + index) for index, kind in enumerate(("computes", "forks", "leaves", "exits", "killed"))}
        codes = [wait_for(pid, 5) for pid in forks]
        # How the driver's own exit handlers like it is its affair; it must be the same under nvshare.
        common.check(codes[0] == 0, f"the forks ended with {codes}")
        started["killed"].stdout.readline()
        started["killed"].kill()
        ended, sums = {}, []
        for kind, process in started.items():
            said, _ = process.communicate(timeout=60)
            ended[kind] = process.returncode
            if kind in ("computes", "forks"):
                sums.append(said.strip())
        expected = {"computes": 0, "forks": 0, "leaves": 7, "exits": 8, "killed": -signal.SIGKILL}
        common.check(ended == expected, f"the programs ended with {ended}, not {expected}")
        with driver:
            sums.append(driver.checksum(out, held, WORDS))
        common.check(sums[-1] == common.iota_checksum(WORDS, 199), f"this process's own memory is wrong: {sums[-1]:x}")
        ballast.turn()
        return common.digest(sums, codes)

    digest, rounds = common.same_each_time(options.seconds, work)
    common.report("ctypes, driver API", digest, rounds, driver_loaded_before_use=early)


main()
