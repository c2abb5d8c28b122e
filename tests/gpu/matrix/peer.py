"""Two GPUs in one process: tensors that move between them, a single process's collectives, copies by the driver's
peer functions, and a kernel on one GPU that writes into the other's memory. Integers; the digest is that of all sums.
"""

import ctypes
import os

import common

COUNT = 8 << 20
ALREADY_ENABLED = 704


def by_torch(torch):
    from torch.cuda import comm

    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    sums = []
    for turn in range(4):
        here = torch.arange(COUNT, device=first, dtype=torch.int64) + turn
        there = here.to(second)
        there.mul_(3)
        back = there.to(first, non_blocking=True)
        common.check(torch.equal(back, 3 * here), f"tensors differ in turn {turn}")
        sums.append(int(back.sum()))
    copies = comm.broadcast(torch.arange(COUNT, device=first, dtype=torch.int64), [0, 1])
    total = comm.reduce_add(list(copies), 0)
    common.check(torch.equal(total, 2 * copies[0]), "reduce_add is wrong")
    halves = comm.scatter(total, [0, 1])
    whole = comm.gather(halves, destination=1)
    common.check(torch.equal(whole.to(first), total), "scatter and gather are wrong")
    return [*sums, int(whole.sum())]


def by_driver(drivers):
    """Copies between the GPUs, and a kernel that writes across."""
    words = COUNT
    pointers = []
    for driver in drivers:
        with driver:
            pointers.append((driver.alloc(8 * words), driver.alloc(8)))
    (first, first_out), (second, second_out) = pointers
    sums = []
    with drivers[0]:
        drivers[0].launch("nvshare_iota_u64", first, words, 31)
        drivers[0].call(
            "cuMemcpyPeerAsync",
            ctypes.c_uint64(second),
            drivers[1].context,
            ctypes.c_uint64(first),
            drivers[0].context,
            ctypes.c_size_t(8 * words),
            drivers[0].stream,
        )
        drivers[0].synchronize()
    with drivers[1]:
        sums.append(drivers[1].checksum(second_out, second, words))
    common.check(sums[-1] == common.iota_checksum(words, 31), "a copy between the GPUs is wrong")
    with drivers[0]:
        drivers[0].call("cuCtxEnablePeerAccess", drivers[1].context, 0, allowed=(0, ALREADY_ENABLED))
        drivers[0].launch("nvshare_iota_u64", second, words, 32)
        drivers[0].synchronize()
        sums.append(drivers[0].checksum(first_out, second, words))
    common.check(sums[-1] == common.iota_checksum(words, 32), "GPU 0 reads other words in GPU 1 than it wrote")
    with drivers[1]:
        found = drivers[1].checksum(second_out, second, words)
    common.check(found == sums[-1], "GPU 1 does not see what GPU 0 wrote")
    for driver, held in zip(drivers, pointers):
        with driver:
            for pointer in held:
                driver.free(pointer)
    return sums


def main():
    options = common.parse(__doc__)
    # A single process's collectives are NCCL's; multicast over NVLink is not allowed on every machine.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch = common.torch_that_repeats()
    if torch.cuda.device_count() < 2:
        common.skip("there is one GPU")
    if not torch.cuda.can_device_access_peer(0, 1):
        common.skip("the GPUs cannot reach each other's memory")
    ballasts = [common.Ballast(device=device) for device in range(2)]

    def work():
        found = by_torch(torch) + by_driver([ballast.driver for ballast in ballasts])
        for ballast in ballasts:
            ballast.turn()
        return common.digest(found)

    digest, rounds = common.same_each_time(options.seconds, work)
    common.report(f"PyTorch {torch.__version__}, driver API", digest, rounds)


main()
