"""PyTorch's CUDA graphs: a captured training step that is replayed; two graphs that share a private pool, captured
while another thread allocates and computes; a callable made by make_graphed_callables. Each is checked against the
same work without a graph, bit by bit where both use the same kernels, and the digest is that of all results.
"""

import threading

import common

SIDE = 2048


def replayed_training(torch, rounds=8):
    """A whole step, forward, backward and optimizer, in one graph."""
    from models import Transformer, batches, loss_of, parameters

    torch.manual_seed(5)
    model = Transformer(layers=3).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = batches(rounds)
    held = data[0].clone()

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, held)
        loss.backward()
        optimizer.step()
        # Without its history, which would keep nodes of the capture alive.
        return loss.detach()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    start = [parameter.detach().clone() for parameter in model.parameters()]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def restart():
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start):
                parameter.copy_(value)

    losses = {}
    for name in ("replayed", "eager"):
        restart()
        each = []
        for batch in data:
            held.copy_(batch)
            if name == "replayed":
                graph.replay()
                each.append(loss.clone())
            else:
                each.append(step())
        losses[name] = torch.stack(each).cpu()
        if name == "replayed":
            after = parameters(model)
    common.check(
        torch.allclose(losses["replayed"], losses["eager"], rtol=1e-4),
        f"replayed {losses['replayed'].tolist()}, eager {losses['eager'].tolist()}",
    )
    return common.bits(losses["replayed"]), common.bits(after)


def captured_while_others_allocate(torch):
    """Two graphs in one pool, with memory that only exists inside it, while a thread allocates and computes."""
    over, wrong = threading.Event(), []

    def others():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            turn = 0
            while not over.is_set() or turn < 3:
                turn += 1
                held = torch.full((4 + turn % 5, 1 << 20), turn, dtype=torch.int64, device="cuda")
                if int(held.sum()) != turn * held.numel():
                    wrong.append(turn)

    source = torch.arange(SIDE * SIDE, device="cuda", dtype=torch.int64).view(SIDE, SIDE)
    pool = torch.cuda.graph_pool_handle()
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    thread = threading.Thread(target=others)
    thread.start()
    try:
        with torch.cuda.graph(first, pool=pool, capture_error_mode="thread_local"):
            scratch = torch.cat([source * 3, source.flip(0)])
            middle = scratch.cumsum(1)[:SIDE] - scratch[SIDE:]
        with torch.cuda.graph(second, pool=pool, capture_error_mode="thread_local"):
            result = (middle.roll(1, 0) ^ source).sum(1)
    finally:
        over.set()
        thread.join()
    common.check(not wrong, f"the other thread found wrong sums in turns {wrong}")
    results = []
    for factor in (1, 2, 3):
        source.mul_(factor)
        first.replay()
        second.replay()
        expected = (((source * 3).cumsum(1) - source.flip(0)).roll(1, 0) ^ source).sum(1)
        common.check(torch.equal(result, expected), f"replay with factor {factor} is wrong")
        results.append(common.bits(result))
    return results


def graphed_callables(torch):
    """Forward and backward as graphs, the optimizer outside."""

    def make():
        torch.manual_seed(6)
        layers = (torch.nn.Linear(SIDE, SIDE), torch.nn.ReLU(), torch.nn.Linear(SIDE, 256))
        return torch.nn.Sequential(*layers).cuda()

    inputs = [torch.randn(64, SIDE, generator=torch.Generator().manual_seed(index)).cuda() for index in range(4)]
    sample = torch.randn(64, SIDE, device="cuda")
    losses = {}
    for name in ("graphed", "eager"):
        model = make()
        called = torch.cuda.make_graphed_callables(model, (sample,)) if name == "graphed" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        each = []
        for x in inputs:
            optimizer.zero_grad(set_to_none=True)
            loss = called(x).square().mean()
            loss.backward()
            optimizer.step()
            each.append(loss.detach())
        losses[name] = torch.stack(each).cpu()
    common.check(torch.allclose(losses["graphed"], losses["eager"], rtol=1e-4), f"losses differ: {losses}")
    return [common.bits(losses["graphed"])]


def main():
    options = common.parse(__doc__)
    torch = common.torch_that_repeats()
    ballast = common.Ballast()

    def work():
        parts = [*replayed_training(torch), *captured_while_others_allocate(torch), *graphed_callables(torch)]
        ballast.turn()
        return common.digest(*parts)

    digest, rounds = common.same_each_time(options.seconds, work)
    common.report(f"PyTorch {torch.__version__}", digest, rounds)


main()
