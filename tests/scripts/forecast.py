"""What `nvshare sim` says a run will come to, told what was measured here: iteration, context, link."""

import json
import subprocess
import tempfile

GIB = 1 << 30
MIB = 1 << 20

# A T4 as the field report and docs/driver-facts.md have it: 15,360 MiB less the 512 MiB that `run` leaves, PyTorch's context with modules
# loaded when needed, PCIe 3 x16, and adds that touch three of a job's four matrices at 242 GB/s.
T4 = {"pool": 15_360 * MIB - 512 * MIB, "context": 718 * MIB, "link_in": 12e9, "link_out": 12e9}
T4_ADDS = 242e9


def of_t4(binaries, seconds, quantum, part):
    """What the scenarios that take turns come to on two T4s: (name, results, seconds one after another on one GPU), with jobs of this
    part of the pool."""
    size = round(T4["pool"] * part) // (8 * MIB) * (8 * MIB)
    iteration_s = 0.75 * size / T4_ADDS
    iterations = round(seconds / iteration_s)
    jobs = {
        "two_turns": ([2], None),
        "four_turns": ([4], None),
        "fixed_quantum": ([4], quantum),
        "field_report": ([3, 1], None),
        "two_by_two": ([2, 2], None),
    }
    for name, (counts, fixed) in jobs.items():
        classes = [(f"gpu-{gpu}", count, gpu, size, iteration_s, iterations) for gpu, count in enumerate(counts)]
        text = scenario(**T4, gpus=len(counts), classes=classes, quantum=fixed)
        yield name, run(binaries, text), counts[0] * iterations * iteration_s


def scenario(pool, context, link_in, link_out, gpus, classes, quantum=None):
    """A scenario file. Sizes are bytes, rates bytes a second; a class is (name, count, gpu, size, iteration in seconds, iterations)."""
    lines = ['name = "forecast"']
    if quantum:
        lines += ["[policy]", f'quantum = "{quantum}"']
    lines += [
        "[gpus]",
        f"per_node = {gpus}",
        f'memory = "{pool}B"',
        f'context = "{context}B"',
        f'link_in = "{round(link_in)}B"',
        f'link_out = "{round(link_out)}B"',
        # What does not fit beside the contexts is used over the link.
        f'overflow = "{round(min(link_in, link_out) * 0.74)}B"',
        'switch = "1ms"',
        'drain = "1ms"',
    ]
    for name, count, gpu, size, iteration_s, iterations in classes:
        lines += [
            "[[clients]]",
            f'name = "{name}"',
            f"count = {count}",
            f"gpu = {gpu}",
            f'memory = "{size}B"',
            "in_flight = 2",
            f'work = {{ kind = "batch", iteration = "{round(iteration_s * 1e9)}ns", iterations = {iterations} }}',
        ]
    return "\n".join(lines) + "\n"


def run(binaries, text):
    """The results of a scenario, as `nvshare sim --json` has them."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        done = subprocess.run(
            [str(binaries / "nvshare"), "sim", file.name, "--json", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    if done.returncode:
        raise RuntimeError(f"nvshare sim refused the forecast's scenario: {done.stderr.strip()}\n{text}")
    return json.loads(done.stdout)
