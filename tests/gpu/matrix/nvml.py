"""NVML in a process on PyTorch: its figures for total and free memory agree with CUDA's, and both follow what this
process allocates. Figures differ between runs, so the digest is that of the data; agreement is checked here. Others may
use the GPU too, so what does not agree at once may agree at the next look.
"""

import time

import common

GIB = 1 << 30


def main():
    options = common.parse(__doc__)
    torch = common.torch_that_repeats()
    try:
        import pynvml
    except ImportError as error:
        common.skip(f"no pynvml: {error}")
    pynvml.nvmlInit()
    properties = torch.cuda.get_device_properties(0)
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except (AttributeError, pynvml.NVMLError):
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    near = max(GIB // 4, total // 50)
    figures = {"total_mib": {"cudaMemGetInfo": total >> 20, "properties": properties.total_memory >> 20}}
    figures["total_mib"]["nvml"] = pynvml.nvmlDeviceGetMemoryInfo(handle).total >> 20
    totals = [mib << 20 for mib in figures["total_mib"].values()]
    common.check(max(totals) - min(totals) <= near, f"the totals differ: {figures['total_mib']}")

    def settled(what, right, look):
        """Looks until it is right, for a few seconds."""
        until = time.monotonic() + 20
        while not right(seen := look()):
            common.check(time.monotonic() < until, f"{what}: {seen}")
            time.sleep(0.1)
        return seen

    def free_memory():
        nvml, cuda = pynvml.nvmlDeviceGetMemoryInfo(handle).free, torch.cuda.mem_get_info()[0]
        return {"nvml": nvml, "cuda": cuda}

    def work():
        torch.cuda.empty_cache()
        before = settled("free memory differs", lambda seen: abs(seen["nvml"] - seen["cuda"]) <= near, free_memory)
        held = torch.arange(GIB // 4, device="cuda", dtype=torch.int64)  # 2 GiB
        settled(
            f"2 GiB were allocated, and free was {before}",
            lambda seen: all(before[name] - seen[name] > 1.5 * GIB for name in seen),
            free_memory,
        )
        settled("free memory differs", lambda seen: abs(seen["nvml"] - seen["cuda"]) <= near, free_memory)
        return common.digest(int(held.sum()))

    digest, rounds = common.same_each_time(options.seconds, work)
    common.report(f"PyTorch {torch.__version__}, pynvml", digest, rounds, **figures)


main()
