"""Two rules for a window of pending kernels, on the same kernels: how much of a turn the GPU works, and how long a drain can take.

A launch takes no time here and kernels run one after the other. After a wait for the GPU (a "sync") the GPU has nothing to do for
0.1 ms, until the next launch has come.

  c       the C nvshare's (src/hook.c at 1a8f211): sync after so many launches; a sync of 10 s or more sets the window to 1, one of
          1 s or more halves it, a shorter one doubles it, up to 2,048. A turn begins with 1 (src/client.c).
  aimd    the field report's design: the window grows in the first 30 s of a turn whatever a sync takes; from then on one of 1 s or
          more takes a fifth of it, one of 10 s or more a half, and it is 4 at least. It begins with 64 and is kept from turn to turn.

    python3 docs/analysis/launch_window.py
"""

TURN, GAP, TURNS = 55.0, 0.0001, 4


class Kernels:
    """Kernels whose times repeat, in seconds."""

    def __init__(self, times):
        self.times, self.next = times, 0

    def run(self, count):
        """What the next `count` of them take together."""
        cycles, rest = divmod(count, len(self.times))
        took = cycles * sum(self.times) + sum(self.times[(self.next + i) % len(self.times)] for i in range(rest))
        self.next = (self.next + count) % len(self.times)
        return took


class C:
    window = 1

    def begin_turn(self):
        self.window = 1

    def adjust(self, sync, _since):
        if sync >= 10:
            self.window = 1
        elif sync >= 1:
            self.window = max(self.window // 2, 1)
        else:
            self.window = min(self.window * 2, 2048)


class Aimd:
    window = 64

    def begin_turn(self):
        pass

    def adjust(self, sync, since):
        if sync < 1 or since < 30:
            self.window = min(self.window * 2, 2048)
        else:
            self.window = max(self.window // 2 if sync >= 10 else int(self.window * 0.8), 4)


def turn(rule, kernels):
    """The part of a turn in which the GPU works, the longest sync in seconds, and the windows. A client that is asked for the GPU
    at the beginning of a sync gives way at its end."""
    rule.begin_turn()
    now, syncs, windows = 0.0, [], []
    while now < TURN:
        windows.append(rule.window)
        syncs.append(kernels.run(rule.window))
        now += syncs[-1] + GAP
        rule.adjust(syncs[-1], now)
    return sum(syncs) / now, max(syncs), windows


def log():
    """What the C nvshare and the progress bar print in turn, for the report's iterations of two launches each."""
    rule, kernels, since, sync, lines = C(), Kernels([1.2, 1.2, 0.2, 0.2]), 0, 0.0, []
    for launch in range(12):
        since, sync = since + 1, sync + kernels.run(1)
        if since >= rule.window:
            rule.adjust(sync, 0)
            since, sync = 0, 0.0
            lines.append(f"window {rule.window}")
        if launch % 2 == 1:
            lines.append(f"iteration {launch // 2 + 1}")
    return ", ".join(lines)


def main():
    print(log())
    print()
    print(f"{'kernels':33} {'rule':5} {'GPU works':>9} {'longest sync':>13}  windows")
    for name, times in [
        ("19.4 ms (the job, where it fits)", [0.0194]),
        ("1.2, 1.2, 0.2, 0.2 s (report)", [1.2, 1.2, 0.2, 0.2]),
        ("0.005 ms", [0.000005]),
        ("5 ms", [0.005]),
        ("500 ms", [0.5]),
    ]:
        for rule in (C(), Aimd()):
            kernels = Kernels(times)
            turns = [turn(rule, kernels) for _ in range(TURNS)]
            works = sum(works for works, _, _ in turns) / TURNS
            sync = max(sync for _, sync, _ in turns)
            windows = [window for _, _, windows in turns for window in windows]
            kind = type(rule).__name__.lower()
            print(f"{name:33} {kind:5} {100 * works:8.2f}% {sync:11.2f} s  {min(windows)} to {max(windows)}")


if __name__ == "__main__":
    main()
