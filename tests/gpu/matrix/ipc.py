"""torch.multiprocessing: tensors on the GPU pass between two processes by queues, both ways, with each process
computing on memory of the other's, and an event of one that the other's stream waits for. Integers, so every sum is
known; the digest is that of the sums.
"""

import common

COUNT = 8 << 20


def total(start, factor):
    """The sum of factor * (start + i)."""
    return factor * (start * COUNT + COUNT * (COUNT - 1) // 2)


def other(requests, answers):
    """The second process: changes what it is lent, and lends tensors of its own."""
    import torch

    ballast = common.Ballast(256)
    lent = []
    while (request := requests.get()) is not None:
        turn, tensor, handle = request
        # The event of the first process tells when its own kernels have written the tensor.
        torch.cuda.Event.from_ipc_handle(torch.device("cuda", 0), handle).wait()
        seen = int(tensor.sum())
        tensor.mul_(3)
        torch.cuda.synchronize()
        # The first process computes on this one; it lives until the next request, when that has been done.
        lent[:] = [torch.arange(COUNT, device="cuda", dtype=torch.int64) + 7 * turn]
        torch.cuda.synchronize()
        ballast.turn()
        answers.put((turn, seen, lent[0]))
        del tensor, request


def main():
    options = common.parse(__doc__)
    torch = common.torch_that_repeats()
    import torch.multiprocessing as multiprocessing

    spawn = multiprocessing.get_context("spawn")
    requests, answers = spawn.Queue(), spawn.Queue()
    child = spawn.Process(target=other, args=(requests, answers), daemon=True)
    child.start()
    ballast = common.Ballast(256)

    def work():
        sums = []
        for turn in range(4):
            tensor = torch.arange(COUNT, device="cuda", dtype=torch.int64) + turn
            written = torch.cuda.Event(enable_timing=False, interprocess=True)
            written.record()
            requests.put((turn, tensor, written.ipc_handle()))
            answered, seen, theirs = answers.get(timeout=60)
            common.check(answered == turn, f"the answer to {turn} is for {answered}")
            common.check(seen == total(turn, 1), f"turn {turn}: the other process sees {seen}, not {total(turn, 1)}")
            changed = int(tensor.sum())
            common.check(changed == total(turn, 3), f"turn {turn}: changed into {changed}, not {total(turn, 3)}")
            found = int((theirs * 2).sum())
            common.check(found == total(7 * turn, 2), f"turn {turn}: theirs is {found}, not {total(7 * turn, 2)}")
            sums += [seen, changed, found]
            del tensor, theirs
        torch.cuda.ipc_collect()
        ballast.turn()
        return common.digest(sums)

    digest, rounds = common.same_each_time(options.seconds, work)
    requests.put(None)
    child.join(30)
    common.check(child.exitcode == 0, f"the second process ended with {child.exitcode}")
    common.report(f"PyTorch {torch.__version__}, torch.multiprocessing", digest, rounds)


if __name__ == "__main__":
    main()
