"""torch.compile: a transformer's training step, and inference with mode="reduce-overhead", which captures CUDA
graphs. Compiled and eager results agree within rounding, and the digest is that of the compiled ones. Kernels are not
picked by timing, and `matrix.py` keeps the compiler's caches, so all runs have the same kernels.
"""

import os
import shutil

import common


def main():
    options = common.parse(__doc__)
    # One process and no pool of compilers: the programs beside this one need the cores too.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Without it, kernels are picked by timing them.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch = common.torch_that_repeats()
    try:
        import triton
    except ImportError as error:
        common.skip(f"no Triton: {error}")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        common.skip("Triton needs a C compiler: there is no gcc")
    from models import Transformer, batches, loss_of, parameters, train

    ballast = common.Ballast()
    torch.set_float32_matmul_precision("highest")
    data = batches(6, size=8)
    torch.manual_seed(8)
    reader = Transformer(layers=2).cuda().eval()
    quick = torch.compile(reader, mode="reduce-overhead")
    trained = Transformer(layers=2).cuda()
    start = {name: value.clone() for name, value in trained.state_dict().items()}
    compiled = torch.compile(trained)

    def trained_by(model):
        trained.load_state_dict(start)
        return train(model, torch.optim.SGD(trained.parameters(), lr=0.05), data)

    eager = trained_by(trained)

    def work():
        losses = trained_by(compiled)
        common.check(
            torch.allclose(losses, eager, rtol=1e-3), f"compiled {losses.tolist()}, eager {eager.tolist()}"
        )
        parts = [common.bits(losses), common.bits(parameters(trained))]
        with torch.no_grad():
            for batch in data:
                torch.compiler.cudagraph_mark_step_begin()
                loss = loss_of(quick, batch)
                expected = loss_of(reader, batch)
                common.check(torch.allclose(loss, expected, rtol=1e-3), f"read {loss}, eager {expected}")
                parts.append(common.bits(loss))
        ballast.turn()
        return common.digest(*parts)

    # The first calls compile and capture; from the third on everything is replayed.
    for _ in range(2):
        work()
    digest, rounds = common.same_each_time(options.seconds, work)
    common.report(f"PyTorch {torch.__version__}, Triton {triton.__version__}", digest, rounds)


main()
