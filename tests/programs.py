"""Runs a program in a Python of its own, with a time limit."""

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for this module, too


def run_program(source: str, limit: float, **environment: str) -> str:
    """Run `source` and return what it printed; fail if it fails or takes too long.

    Args:
        source: a Python program, indented as a whole or not.
        limit: seconds.
        **environment: added to the environment.
    """
    # Without the four devices of the test session: one is what users have.
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=limit,
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": PATH, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def resident() -> int:
    """Bytes of memory that this process has, without garbage; for the programs."""
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
