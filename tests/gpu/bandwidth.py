"""The pinned bandwidth of this machine's link, bytes a second: in, out, and each way when both go at once.

Each figure is the median of 7 copies of 2 GiB."""

import json
import statistics
import time

import torch

SIZE = 2 << 30


def measure(target, source):
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.monotonic()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return SIZE / statistics.median(times[1:])


def measure_both(target, source, host_target, device_source):
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.monotonic()
        with torch.cuda.stream(streams[0]):
            target.copy_(source, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            host_target.copy_(device_source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return SIZE / statistics.median(times[1:])


def host():
    return torch.empty(SIZE, dtype=torch.uint8, pin_memory=True).fill_(1)


first, second = host(), host()
device, other = (torch.empty(SIZE, dtype=torch.uint8, device="cuda") for _ in range(2))
figures = {"in": measure(device, first), "out": measure(first, device)}
figures["both"] = measure_both(device, first, second, other)
print(json.dumps(figures))
