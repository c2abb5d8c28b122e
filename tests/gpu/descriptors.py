"""What a descriptor of memory (cuMemExportToShareableHandle) tells the process that it comes to, and whether two processes that have
each imported one of the other's are a gang under nvshare.

    python3 tests/gpu/descriptors.py [--bin target/release] [--simulated]

Two processes with a context on the first GPU. Each makes memory and exports it, the first one twice and another object too; they send each
other the descriptors over a socket (SCM_RIGHTS) and import them. Both write down what fstat and /proc/self/fdinfo say of each descriptor,
and whose it is: the owner of the open file (fcntl, F_SETOWN), which the exporter writes. First without nvshare, where the program
itself writes the owner, then with it, where nvshare does.

Prints what each process has seen, one JSON object a line, and a table at the end. Exit status 1 if the owner is not what it
should be, or if the two are no gang under nvshare. Takes some seconds.
"""

import argparse
import ctypes
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

from harness import HERE, Arbiter, last_object, report, say, simulated_gpu, start

# cuda.h
PINNED, DEVICE, FILE_DESCRIPTOR = 1, 1, 1
GRANULE = 2 << 20


class Prop(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("kind", ctypes.c_uint),
        ("handle_types", ctypes.c_uint),
        ("location", ctypes.c_uint),
        ("device", ctypes.c_int),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class Driver:
    """The first GPU, and a context there."""

    def __init__(self):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", ctypes.c_uint(0))
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name, *arguments):
        result = getattr(self.cuda, name)(*arguments)
        if result:
            raise RuntimeError(f"{name}: CUresult {result}")

    def make(self):
        handle, prop = ctypes.c_ulonglong(), Prop(PINNED, FILE_DESCRIPTOR, DEVICE, 0)
        self.call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(GRANULE), ctypes.byref(prop), ctypes.c_ulonglong(0))
        return handle

    def export(self, handle):
        descriptor = ctypes.c_int(-1)
        self.call("cuMemExportToShareableHandle", ctypes.byref(descriptor), handle, ctypes.c_uint(FILE_DESCRIPTOR), ctypes.c_ulonglong(0))
        return descriptor.value

    def import_from(self, descriptor):
        handle = ctypes.c_ulonglong()
        self.call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(descriptor), ctypes.c_uint(FILE_DESCRIPTOR))


def seen(descriptor):
    """What the system says of a descriptor."""
    stat = os.fstat(descriptor)
    numbers = {name: getattr(stat, name) for name in ("st_dev", "st_ino", "st_rdev", "st_mode", "st_size")}
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    said = pathlib.Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("\n")
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    return {"is": path, "fdinfo": said, "sends_signals": bool(flags & os.O_ASYNC), "owner": fcntl.fcntl(descriptor, fcntl.F_GETOWN)} | numbers


def process_main(options):
    """One of the two. The other one's end of the socket is the standard input of that one."""
    peer = socket.socket(fileno=0)
    driver = Driver()
    first, second = driver.make(), driver.make()
    exports = [driver.export(first), driver.export(first), driver.export(second)]
    fresh = [seen(descriptor) for descriptor in exports]
    if options.writes_owner:
        for descriptor in exports:
            fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    socket.send_fds(peer, [str(os.getpid()).encode()], exports)
    said, came, _, _ = socket.recv_fds(peer, 64, len(exports))
    before = [seen(descriptor) for descriptor in came]
    for descriptor in came:
        driver.import_from(descriptor)
    after = [seen(descriptor)["owner"] for descriptor in came]
    # The descriptors of memory that is imported may be closed.
    for descriptor in came:
        os.close(descriptor)
    result = {"pid": os.getpid(), "peer": int(said), "exported": fresh, "came": before, "owners_after_import": after}
    print(json.dumps(result), flush=True)
    # Until the other one has imported too, and the books were looked at.
    sys.stdin.close()
    signal.sigwait({signal.SIGTERM})
    return 0


def two(environment, writes_owner, look):
    """Two processes, what each has seen, and what `look` sees when both have imported."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, "--process"] + ["--writes-owner"] * writes_owner
    # Blocked here and so in both, which wait for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    processes = [start(command, environment, stdin=end.fileno(), stdout=subprocess.PIPE) for end in ends]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for end in ends:
        end.close()
    try:
        results = [last_object(process.stdout.readline()) for process in processes]
        return results, look()
    finally:
        for process in processes:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def owners_are_right(results):
    """Each has got descriptors whose owner is the other one, before the import and after it, and no fresh one had an owner."""
    wanted = lambda result: [result["peer"]] * 3
    came = all([one["owner"] for one in result["came"]] == wanted(result) == result["owners_after_import"] for result in results)
    silent = not any(one["sends_signals"] for result in results for one in result["exported"] + result["came"])
    return came and silent


def natively(_):
    results, _ = two({}, True, lambda: None)
    say("natively", results=results)
    if None in results:
        return False, "natively: a process failed"
    exported = results[0]["exported"]
    unowned = all(one["owner"] == 0 for result in results for one in result["exported"])
    told_apart = len({(one["st_dev"], one["st_ino"], one["st_rdev"]) for one in exported}) > 1
    right = owners_are_right(results) and unowned
    return right, (
        f"natively: {exported[0]['is']}; descriptors of different memory are {'told apart' if told_apart else 'alike'} by fstat; "
        f"the owner {'comes along' if right else 'DOES NOT come along'}"
    )


def under_nvshare(binaries):
    with Arbiter(binaries) as arbiter:
        results, clients = two(arbiter.environment(), False, arbiter.clients)
    say("under_nvshare", results=results, clients=clients)
    if None in results:
        return False, "under_nvshare: a process failed"
    gangs = [client.get("gang") for client in clients]
    right = owners_are_right(results) and len(gangs) == 2 and gangs[0] is not None and gangs[0] == gangs[1]
    return right, f"under_nvshare: the two are {'a gang' if right else 'NO gang'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    parser.add_argument("--simulated", action="store_true", help="on a simulated GPU")
    # Of the processes that this program starts.
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--writes-owner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        return process_main(options)
    binaries = options.bin.resolve()
    scenarios = [natively, under_nvshare]
    if options.simulated:
        with simulated_gpu(binaries, MEMORY="1GiB", CONTEXT_BYTES="2MiB"):
            return report(scenario(binaries) for scenario in scenarios)
    return report(scenario(binaries) for scenario in scenarios)


if __name__ == "__main__":
    sys.exit(main())
