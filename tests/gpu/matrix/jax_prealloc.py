"""JAX with its default preallocation (three quarters of the GPU in one piece): a jit-compiled training step with
donated parameters. XLA picks algorithms by timing them, so its deterministic mode is on, which does without; the
digest is that of losses and parameters. `matrix.py` gives the native run a smaller share, because others run beside.
"""

import os

import common

WIDTH, BATCH, LAYERS = 1024, 512, 4


def main():
    options = common.parse(__doc__)
    flags = "--xla_gpu_deterministic_ops=true"
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), flags]).strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    try:
        import jax
        import jax.numpy as jnp
        import numpy
    except ImportError as error:
        common.skip(f"no JAX: {error}")
    jax.config.update("jax_default_matmul_precision", "highest")
    device = jax.devices()[0]
    common.check(device.platform in ("gpu", "cuda"), f"JAX has found no GPU but {device.platform}")

    generator = numpy.random.default_rng(11)
    weights = [generator.standard_normal((WIDTH, WIDTH), dtype=numpy.float32) / 32 for _ in range(LAYERS)]
    inputs = generator.standard_normal((8, BATCH, WIDTH), dtype=numpy.float32)
    # Data of its own that must keep every bit, in pieces as a loader would put them there.
    held = [jax.device_put(generator.integers(0, 1 << 30, 1 << 24, dtype=numpy.int32)) for _ in range(4)]
    sums = [int(numpy.asarray(piece).astype(numpy.int64).sum()) for piece in held]

    def loss_of(weights, x):
        y = x
        for weight in weights:
            y = jnp.tanh(y @ weight)
        return jnp.mean((y - x) ** 2)

    @jax.jit
    def sum_of(piece):
        # In halves: JAX has no 64-bit integers by default.
        return jnp.sum(piece & 0xFFFF, dtype=jnp.uint32), jnp.sum(piece >> 16, dtype=jnp.uint32)

    def step(weights, x):
        loss, gradients = jax.value_and_grad(loss_of)(weights, x)
        return [weight - 0.5 * gradient for weight, gradient in zip(weights, gradients)], loss

    step = jax.jit(step, donate_argnums=0)
    halves = [
        tuple(int((numpy.asarray(piece).astype(numpy.int64) >> shift & 0xFFFF).sum() & 0xFFFFFFFF) for shift in (0, 16))
        for piece in held
    ]

    def work():
        present = [jax.device_put(weight) for weight in weights]
        losses = []
        for _ in range(5):
            for x in inputs:
                present, loss = step(present, x)
                losses.append(loss)
        losses = numpy.asarray([float(loss) for loss in losses], dtype=numpy.float32)
        common.check(bool(numpy.isfinite(losses).all() and losses[-1] < losses[0]), f"losses: {losses.tolist()}")
        for piece, expected in zip(held, halves):
            found = tuple(int(half) for half in sum_of(piece))
            common.check(found == expected, f"held data sums up to {found}, not {expected}")
        return common.digest(losses, sums, *(numpy.asarray(weight) for weight in present))

    digest, rounds = common.same_each_time(options.seconds, work)
    figures = device.memory_stats() or {}
    limit, most = figures.get("bytes_limit", 0), figures.get("peak_bytes_in_use", 0)
    driver = common.Driver()
    with driver:
        total = driver.memory()[1]
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        common.check(limit > 0.6 * total, f"JAX took {limit >> 20} MiB of {total >> 20}, which is no preallocation")
    common.report(f"JAX {jax.__version__}", digest, rounds, limit_mib=limit >> 20, total_mib=total >> 20, most_mib=most >> 20)


main()
