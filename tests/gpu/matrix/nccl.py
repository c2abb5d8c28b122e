"""NCCL on two GPUs, a process each: all_reduce, all_gather, reduce_scatter, send and receive, and training steps with
DistributedDataParallel. Sums of two are the same in any order, so the digest, of all results of both, repeats.
NCCL_CUMEM_ENABLE=0 in the environment makes NCCL share memory by CUDA IPC instead of exported handles.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile

import common

COUNT = 8 << 20


def rank_main(options):
    torch = common.torch_that_repeats()
    import torch.distributed as distributed

    from models import Transformer, batches, parameters, train

    rank, other = options.rank, 1 - options.rank
    torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl",
        init_method=f"file://{options.meet}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=90),
        device_id=torch.device("cuda", rank),
    )
    ballast = common.Ballast(device=rank)

    def numbers(start):
        return torch.arange(COUNT, device="cuda", dtype=torch.int64) + start

    def collectives():
        reduced = numbers(rank)
        distributed.all_reduce(reduced)
        common.check(torch.equal(reduced, 2 * numbers(0) + 1), "all_reduce is wrong")
        gathered = torch.empty(2 * COUNT, device="cuda", dtype=torch.int64)
        distributed.all_gather_into_tensor(gathered, numbers(10 * rank))
        common.check(torch.equal(gathered, torch.cat([numbers(0), numbers(10)])), "all_gather is wrong")
        scattered = torch.empty(COUNT, device="cuda", dtype=torch.int64)
        distributed.reduce_scatter_tensor(scattered, gathered)
        common.check(torch.equal(scattered, 2 * numbers(10 * rank)), "reduce_scatter is wrong")
        received = torch.empty(COUNT, device="cuda", dtype=torch.int64)
        if rank == 0:
            distributed.send(numbers(100), other)
            distributed.recv(received, other)
        else:
            distributed.recv(received, other)
            distributed.send(numbers(200), other)
        common.check(torch.equal(received, numbers(200 - 100 * rank)), "send and receive are wrong")
        return [int(each.sum()) for each in (reduced, gathered, scattered, received)]

    def steps():
        torch.manual_seed(12)
        model = torch.nn.parallel.DistributedDataParallel(Transformer(layers=2).cuda(), device_ids=[rank])
        losses = train(model, torch.optim.SGD(model.parameters(), lr=0.05), batches(5, size=8, seed=20 + rank))
        return losses, parameters(model)

    def work():
        sums = collectives()
        losses, weights = steps()
        ballast.turn()
        # Both have the same parameters, and each its own losses.
        return common.digest(sums, common.bits(losses), common.bits(weights))

    def agree(more):
        flag = torch.tensor([int(more)], device="cuda")
        distributed.broadcast(flag, 0)
        return bool(flag.item())

    digest, rounds = common.same_each_time(options.seconds, work, agree=agree)
    version = ".".join(map(str, torch.cuda.nccl.version()))
    distributed.destroy_process_group()
    common.report(f"PyTorch {torch.__version__}, NCCL {version}", digest, rounds)


def main():
    def more(parser):
        parser.add_argument("--rank", type=int)
        parser.add_argument("--meet")

    options = common.parse(__doc__, more)
    # Multicast over NVLink is not what this is about, and not allowed on every machine.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if options.rank is not None:
        return rank_main(options)
    with tempfile.TemporaryDirectory() as directory:
        ranks = []
        for rank in range(2):
            command = [sys.executable, __file__, "--seconds", options.seconds, "--rank", rank, "--meet", directory + "/meet"]
            ranks.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in ranks]
    codes = [process.returncode for process in ranks]
    common.check(codes == [0, 0], f"the two processes ended with {codes}")
    results = [json.loads(text.strip().splitlines()[-1]) for text in said]
    digest = common.digest(*(result["digest"] for result in results))
    common.report(results[0]["framework"], digest, results[0]["figures"]["rounds"])


main()
