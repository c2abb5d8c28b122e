"""Out of memory: what is larger than the GPU is refused with an error that PyTorch knows, and the program goes on.
With --fill (under nvshare, where nobody else is hurt) it also takes memory until there is none. How much that is
differs between runs, so the digest is that of the data.
"""

import ctypes

import common

BLOCK = 256 << 20
OUT_OF_MEMORY = 2


def main():
    options = common.parse(__doc__, lambda parser: parser.add_argument("--fill", action="store_true"))
    torch = common.torch_that_repeats()
    driver = common.Driver()
    held = torch.arange(BLOCK // 8, device="cuda", dtype=torch.int64)
    expected = int(held.sum())
    figures = {}

    def refused(size):
        try:
            torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError as error:
            return str(error)
        raise AssertionError(f"{size >> 20} MiB were granted")

    def fill():
        """Blocks until there is no room, each with a number in every word."""
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        blocks = []
        try:
            while len(blocks) * BLOCK < 2 * free:
                blocks.append(torch.full((BLOCK // 8,), len(blocks), dtype=torch.int64, device="cuda"))
        except torch.cuda.OutOfMemoryError:
            pass
        got = len(blocks) * BLOCK
        figures.update(free_mib=free >> 20, granted_mib=got >> 20)
        # Under nvshare what others' contexts take of the GPU is made up for in host memory: up to the total.
        total = torch.cuda.mem_get_info()[1]
        common.check(0.7 * free < got <= total, f"{free >> 20} MiB were free, and {got >> 20} were granted")
        # Room for the comparison's own results, which a GPU filled to the last byte has not.
        blocks.pop()
        torch.cuda.empty_cache()
        for index, block in enumerate(blocks):
            common.check(int(block.min()) == int(block.max()) == index, f"block {index} has other numbers")
        blocks.clear()
        torch.cuda.empty_cache()

    def work():
        free, total = torch.cuda.mem_get_info()
        common.check(0 < free <= total, f"{free} of {total} bytes are free")
        common.check("out of memory" in refused(total + (1 << 30)).lower(), "the error does not say what is wrong")
        with driver:
            pointer = ctypes.c_uint64()
            size = ctypes.c_size_t(2 * total)
            driver.call("cuMemAlloc_v2", ctypes.byref(pointer), size, allowed=(OUT_OF_MEMORY,))
        if options.fill:
            fill()
        doubled = held * 2
        common.check(int(held.sum()) == expected and int(doubled.sum()) == 2 * expected, "data has changed")
        return common.digest(expected)

    digest, rounds = common.same_each_time(options.seconds, work)
    common.report(f"PyTorch {torch.__version__}", digest, rounds, **figures)


main()
