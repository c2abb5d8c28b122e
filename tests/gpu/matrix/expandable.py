"""PyTorch with PYTORCH_ALLOC_CONF=expandable_segments:True, which maps memory by hand (cuMemCreate, cuMemMap):
training with batches that grow, tensors that grow past their segments, and empty_cache, which unmaps in the middle.
The digest is that of losses, parameters and tensors.
"""

import os

import common


def main():
    options = common.parse(__doc__)
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch = common.torch_that_repeats()
    from models import Transformer, batches, parameters, train

    ballast = common.Ballast()

    def growing():
        """Tensors of ever more memory; every second one goes, and what is left must keep its bytes."""
        kept = []
        for turn in range(1, 13):
            held = torch.arange(turn << 20, device="cuda", dtype=torch.int64) * turn
            if turn % 2:
                kept.append((turn, held))
            elif turn % 4 == 0:
                del held
                torch.cuda.empty_cache()
        sums = []
        for turn, held in kept:
            count = turn << 20
            sums.append(int(held.sum()))
            common.check(sums[-1] == turn * count * (count - 1) // 2, f"tensor {turn} sums up to {sums[-1]}")
        return sums

    def work():
        torch.manual_seed(9)
        model = Transformer(layers=4).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        losses = []
        for size in (2, 6, 12, 20, 4):
            losses.append(train(model, optimizer, batches(3, size=size)))
            if size == 12:
                torch.cuda.empty_cache()
        parts = [common.bits(torch.cat(losses)), common.bits(parameters(model)), growing()]
        del model, optimizer
        torch.cuda.empty_cache()
        ballast.turn()
        return common.digest(*parts)

    digest, rounds = common.same_each_time(options.seconds, work)
    held = torch.ones(1 << 20, device="cuda")
    segments = torch.cuda.memory_snapshot()
    common.check(segments and all(segment["is_expandable"] for segment in segments), "no segment is expandable")
    del held
    most = torch.cuda.max_memory_allocated() >> 20
    common.report(f"PyTorch {torch.__version__}, expandable segments", digest, rounds, most_mib=most)


main()
