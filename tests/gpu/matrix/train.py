"""PyTorch: a transformer is trained, with activations recomputed in the backward pass; halfway its state is saved,
and a new model goes on from it. The digest is that of the loss curve and of all parameters, to the last bit.
"""

import io

import common


def main():
    options = common.parse(__doc__)
    torch = common.torch_that_repeats()
    from models import Transformer, batches, parameters, train

    ballast = common.Ballast()
    data = batches(4) * 5
    last = []

    def begin():
        torch.manual_seed(1)
        model = Transformer(recompute=True).cuda()
        return model, torch.optim.AdamW(model.parameters(), lr=3e-4, foreach=True)

    def work():
        model, optimizer = begin()
        losses = train(model, optimizer, data[:10])
        saved = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        saved.seek(0)
        model, optimizer = begin()
        state = torch.load(saved, map_location="cuda")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = torch.cat([losses, train(model, optimizer, data[10:])])
        common.check(bool(torch.isfinite(losses).all()), f"losses: {losses.tolist()}")
        common.check(bool(losses[-1] < losses[0]), f"nothing is learnt: {losses.tolist()}")
        last[:] = losses.tolist()
        ballast.turn()
        return common.digest(common.bits(losses), common.bits(parameters(model)))

    digest, rounds = common.same_each_time(options.seconds, work)
    most = torch.cuda.max_memory_allocated() >> 20
    common.report(f"PyTorch {torch.__version__}", digest, rounds, first_loss=last[0], last_loss=last[-1], most_mib=most)


main()
