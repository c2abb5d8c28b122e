"""The field report's job with unmodified PyTorch, which says how it goes like `nvshare internal job` does: a line of JSON for each
event (ready, progress, done), a start at a line on the standard input, an early end when that is closed.

It adds two matrices again and again; the sum is made beside the one before, so there are four matrices, --size bytes in all. The
inputs and the result are checked at the end, to the last bit.
"""

import argparse
import collections
import json
import math
import sys
import threading
import time

import torch

# Additions that the GPU has before it: it never waits for this program, and progress is what is done and not what was submitted.
AHEAD = 32
SAY_EVERY_S = 0.05


def say(event, **figures):
    # The one who listened may have gone: the work goes on, as its end is seen by others.
    try:
        print(json.dumps({"event": event, **figures}), flush=True)
    except BrokenPipeError:
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, required=True, help="bytes of GPU memory")
    parser.add_argument("--iterations", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    n = math.isqrt(arguments.size // 16)

    began = time.monotonic()
    # Small integers: float32 adds them exactly, so the sum is known.
    columns = torch.arange(n, device="cuda", dtype=torch.float32).add_(arguments.seed)[None, :]
    rows = torch.arange(n, device="cuda", dtype=torch.float32).mul_(2)[:, None]
    x, y = torch.empty((n, n), device="cuda"), torch.empty((n, n), device="cuda")
    x.copy_(columns.expand(n, n))
    y.copy_(rows.expand(n, n))
    # The second sum needs its place beside the first: all memory is had now.
    for _ in range(2):
        z = torch.add(x, y)
    torch.cuda.synchronize()
    say("ready", seconds=time.monotonic() - began)

    sys.stdin.readline()
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    began = said = time.monotonic()
    submitted, in_flight = 0, collections.deque()
    while submitted < arguments.iterations and not over.is_set():
        z = torch.add(x, y)
        submitted += 1
        event = torch.cuda.Event()
        event.record()
        in_flight.append(event)
        if len(in_flight) > AHEAD:
            in_flight.popleft().synchronize()
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            say("progress", done=submitted - len(in_flight))
    torch.cuda.synchronize()
    seconds = time.monotonic() - began
    say("progress", done=submitted)

    # In strips: a comparison of all at once needs memory for two more matrices.
    right, strip = True, 512
    for first in range(0, n, strip):
        some = slice(first, first + strip)
        x_is, y_is = columns.expand(n, n)[some], rows.expand(n, n)[some]
        right &= torch.equal(x[some], x_is) and torch.equal(y[some], y_is) and torch.equal(z[some], x_is + y_is)
    say("done", iterations=submitted, seconds=seconds, right=right)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
