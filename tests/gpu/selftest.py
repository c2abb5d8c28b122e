"""Does the matrix see what is wrong? Runs tests/gpu/matrix.py with programs that are made for it, on the simulated
GPU: one that is right, one whose result differs under nvshare, one that hangs there, one whose numbers are wrong, one
that was killed, and one that has nothing to test. No GPU and no framework is needed.

    python3 tests/gpu/selftest.py --bin target/release
"""

import argparse
import pathlib
import sys
import tempfile

from harness import HERE, simulated_gpu

BEGIN = f"""
import os, signal, sys, time
sys.path.insert(0, {str(HERE / "matrix")!r})
import common
options = common.parse("", lambda parser: parser.add_argument("--fill", action="store_true"))
under = "NVSHARE_RUNTIME_DIR" in os.environ
"""

# What follows for each program, and what its row must be: which scenarios are right, and a word of its remarks.
PROGRAMS = {
    "right": (
        """
ballast = common.Ballast(96)
digest, rounds = common.same_each_time(options.seconds, lambda: ballast.turn() or common.digest("the same"))
common.check(options.fill == under, "under nvshare it has an argument more")
common.report("none", digest, rounds)
""",
        {"native": True, "alone": True, "switched": True},
        "",
    ),
    "differs": (
        """
ballast = common.Ballast(64)
digest, rounds = common.same_each_time(options.seconds, lambda: ballast.turn() or common.digest(under))
common.report("none", digest, rounds)
""",
        {"native": True, "alone": True, "switched": True},
        "another result than natively",
    ),
    "hangs": (
        """
ballast = common.Ballast(64)
def wait_for_ever():
    time.sleep(3600)
if under:
    wait_for_ever()
common.report("none", common.digest("the same"), 1)
""",
        {"native": True, "alone": False},
        "not ended after",
    ),
    "wrong": (
        """
digest, rounds = common.same_each_time(0, lambda: common.digest("the same"))
common.check(not under, "seven is not eight")
common.report("none", digest, rounds)
""",
        {"native": True, "alone": False},
        "seven is not eight",
    ),
    "killed": (
        """
if under:
    os.kill(os.getpid(), signal.SIGKILL)
common.report("none", common.digest("the same"), 1)
""",
        {"native": True, "alone": False},
        "status -9",
    ),
    "absent": ("""common.skip("there is no such thing")""", {"native": False}, "there is no such thing"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=HERE.parent.parent / "target/release")
    binaries = parser.parse_args().bin.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        sources = scratch / "programs"
        sources.mkdir()
        with simulated_gpu(binaries, MEMORY="6GiB", CONTEXT_BYTES="16MiB"):
            return check(binaries, scratch, sources)


def check(binaries, scratch, sources):
    # Its name is also that of the folder beside it; the module comes first.
    import matrix

    matrix.PROGRAMS_IN = sources
    matrix.PROGRAMS = []
    for name, (source, _, _) in PROGRAMS.items():
        (sources / f"{name}.py").write_text(BEGIN + source)
        shared = ("--fill",) if name == "right" else ()
        matrix.PROGRAMS.append(matrix.Program(name, f"{name}.py", pool=1, competitor=0.125, shared=shared))
    rows, out = scratch / "rows.json", scratch / "table.md"
    sys.argv = ["matrix.py", "--bin", str(binaries), "--seconds", "6", "--timeout", "30", "--jobs", "2"]
    sys.argv += ["--json", str(rows), "--out", str(out)]
    status = matrix.main()
    found = {row["name"]: row for row in matrix.read_rows(rows)}
    wrong = [] if status == 1 else [f"the exit status is {status}"]
    for name, (_, scenarios, remark) in PROGRAMS.items():
        row = found[name]
        seen = {scenario: row[scenario]["ok"] for scenario in matrix.SCENARIOS if scenario in row}
        if seen != scenarios:
            wrong.append(f"{name}: {seen}, not {scenarios}")
        if remark not in " ".join(matrix.settled(row)[1]):
            wrong.append(f"{name}: its row does not say '{remark}': {matrix.settled(row)[1]}")
        if matrix.settled(row)[0] != (name in ("right", "absent")):
            wrong.append(f"{name}: its row is {'right' if matrix.settled(row)[0] else 'wrong'}")
    if found["right"].get("switched", {}).get("switches", 0) < 2:
        wrong.append(f"right: no switches: {found['right'].get('switched')}")
    if "in wait_for_ever" not in found["hangs"].get("alone", {}).get("log", ""):
        wrong.append(f"hangs: its stack is not shown: {found['hangs'].get('alone')}")
    text = out.read_text()
    wrong += [f"the table has no row for {name}" for name in PROGRAMS if f"| `{name}` |" not in text]
    print("\n".join(wrong) or "the matrix sees what is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
