"""PyTorch with PYTORCH_ALLOC_CONF=backend:cudaMallocAsync: training, tensors that cross streams, and a captured
graph, whose allocations become memory nodes. The digest is that of losses, parameters and tensors.
"""

import os

import common


def main():
    options = common.parse(__doc__)
    os.environ["PYTORCH_ALLOC_CONF"] = "backend:cudaMallocAsync"
    torch = common.torch_that_repeats()
    common.check(torch.cuda.get_allocator_backend() == "cudaMallocAsync", torch.cuda.get_allocator_backend())
    from models import Transformer, batches, parameters, train

    ballast = common.Ballast()
    data = batches(12)

    def crossing():
        """What one stream makes, another uses and frees, many at a time."""
        streams = [torch.cuda.Stream() for _ in range(3)]
        sums = []
        for turn in range(24):
            maker, user = streams[turn % 3], streams[(turn + 1) % 3]
            with torch.cuda.stream(maker):
                made = torch.arange((1 + turn % 5) << 20, device="cuda", dtype=torch.int64) + turn
            user.wait_stream(maker)
            with torch.cuda.stream(user):
                made.record_stream(user)
                sums.append((made * 2).sum())
            del made
        torch.cuda.synchronize()
        for turn, found in enumerate(sums):
            count = (1 + turn % 5) << 20
            expected = 2 * (count * (count - 1) // 2 + turn * count)
            common.check(int(found) == expected, f"turn {turn} sums up to {int(found)}, not {expected}")
        return [int(found) for found in sums]

    def captured():
        source = torch.arange(1 << 22, device="cuda", dtype=torch.int64)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = (source * 3 + source.flip(0)).view(64, -1).sum(1)
        results = []
        for turn in range(3):
            source.add_(turn)
            graph.replay()
            expected = (source * 3 + source.flip(0)).view(64, -1).sum(1)
            common.check(torch.equal(result, expected), f"replay {turn} is wrong")
            results.append(common.bits(result))
        torch.cuda.synchronize()
        return results

    def work():
        torch.manual_seed(10)
        model = Transformer(layers=4).cuda()
        losses = train(model, torch.optim.AdamW(model.parameters(), lr=3e-4), data)
        parts = [common.bits(losses), common.bits(parameters(model)), crossing(), *captured()]
        ballast.turn()
        return common.digest(*parts)

    digest, rounds = common.same_each_time(options.seconds, work)
    common.report(f"PyTorch {torch.__version__}, cudaMallocAsync", digest, rounds)


main()
