"""What was measured, what was expected, and whether that is a pass: a line each, and an exit status."""

import json


class Report:
    """Collects verdicts and prints each as it comes."""

    def __init__(self):
        self.rows = []
        self.scenario = None

    def begin(self, scenario, says):
        self.scenario = scenario
        print(f"\n== {scenario}: {says}", flush=True)

    def check(self, passed, what, measured, expected):
        """A verdict. `expected` says what would be right, and where that is from if it is no rule."""
        self.add("PASS" if passed else "FAIL", what, measured, expected)
        return passed

    def skip(self, why):
        self.add("SKIP", why, None, None)

    def fail(self, what, why):
        """Something went wrong that no check asked about."""
        self.add("FAIL", what, why, "nothing of the kind")

    def note(self, text):
        """For the reader: no verdict."""
        print(f"     {text}", flush=True)

    def add(self, verdict, what, measured, expected):
        self.rows.append({"scenario": self.scenario, "verdict": verdict, "what": what, "measured": measured, "expected": expected})
        line = f"{verdict} {self.scenario}: {what}"
        if measured is not None:
            line += f": {measured} (expected: {expected})"
        print(line, flush=True)

    def count(self, verdict):
        return sum(row["verdict"] == verdict for row in self.rows)

    def finish(self, machine, file):
        """The summary, and the exit status: 0 if something passed and nothing failed."""
        passed, failed, skipped = map(self.count, ("PASS", "FAIL", "SKIP"))
        if file:
            file.write_text(json.dumps({"machine": machine, "rows": self.rows}, indent=1) + "\n")
        print(f"\n{'PASS' if passed and not failed else 'FAIL'}: {passed} passed, {failed} failed, {skipped} skipped")
        for row in self.rows:
            if row["verdict"] == "FAIL":
                print(f"  failed: {row['scenario']}: {row['what']}: {row['measured']}")
        return 0 if passed and not failed else 1
