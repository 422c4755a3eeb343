"""Runs a program in a Python of its own, with a time limit."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
