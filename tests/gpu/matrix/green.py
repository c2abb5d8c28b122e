"""Green contexts: a stream of one, made by the driver and used by PyTorch as an external stream on its ordinary memory, and
PyTorch's own green context, in which memory is allocated. Integers; the digest is that of all sums."""

import common

WORDS = 64 << 20


def call(outcome, what):
    """What a function of cuda-bindings gave."""
    status, *values = outcome
    common.check(int(status) == 0, f"{what} said {status!r}")
    return values[0] if len(values) == 1 else values


def stream_of_green_context():
    """A stream that may use a part of the GPU."""
    from cuda.bindings import driver

    call(driver.cuInit(0), "cuInit")
    device = call(driver.cuDeviceGet(0), "cuDeviceGet")
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    whole = call(driver.cuDeviceGetDevResource(device, kind), "cuDeviceGetDevResource")
    groups = call(driver.cuDevSmResourceSplitByCount(1, whole, 0, 32), "cuDevSmResourceSplitByCount")[0]
    description = call(driver.cuDevResourceGenerateDesc([groups[0]], 1), "cuDevResourceGenerateDesc")
    green = call(driver.cuGreenCtxCreate(description, device, 1), "cuGreenCtxCreate")
    return call(driver.cuGreenCtxStreamCreate(green, 1, 0), "cuGreenCtxStreamCreate")


def turns(torch, words):
    """Many additions in flight at once, and the sum of the words."""
    for turn in range(40):
        words += turn
    return int(words.sum(dtype=torch.int64))


def main():
    options = common.parse(__doc__)
    torch = common.torch_that_repeats()
    torch.zeros(1, device="cuda")
    try:
        from torch.cuda.green_contexts import GreenContext
    except ImportError:
        GreenContext = getattr(torch.cuda, "GreenContext", None)
    stream = torch.cuda.ExternalStream(int(stream_of_green_context()))
    green = GreenContext.create(num_sms=32, device_id=0) if GreenContext else None
    ballast = common.Ballast()

    def work():
        sums = []
        words = torch.zeros(WORDS, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            sums += [turns(torch, words) for _ in range(3)]
        if green:
            # What it allocates is new memory then, and not what was kept from outside.
            torch.cuda.empty_cache()
            green.set_context()
            there = torch.ones(3 * WORDS, dtype=torch.int32, device="cuda")
            sums += [turns(torch, there) for _ in range(3)]
            torch.cuda.synchronize()
            green.pop_context()
            there += 1
            sums.append(int(there.sum(dtype=torch.int64)))
            del there
        ballast.turn()
        return common.digest(sums)

    digest, rounds = common.same_each_time(options.seconds, work)
    used = "a driver's stream and PyTorch's green context" if green else "a driver's stream"
    common.report(f"PyTorch {torch.__version__}, {used}", digest, rounds)


main()
