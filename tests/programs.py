"""Runs a program in a Python of its own, with a time limit."""

import gc
import os
import socket
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # programs import this module, too


def xla_flags(devices: int) -> str:
    """Return flags for a CPU client of several devices that compiles as fast as possible.

    Most tests spend most of their time in compilation.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    flags += " --xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # later ones have only one
        flags += " --xla_cpu_use_fusion_emitters=false"
    return flags


def start_program(source: str, **environment: str) -> subprocess.Popen[str]:
    """Start `source` in a Python whose outputs are pipes.

    Args:
        source: a Python program, indented as a whole or not.
        **environment: added to the environment, in which XLA compiles quickly.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": PATH,
        "XLA_FLAGS": xla_flags(devices=1),  # as most users have
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def run_program(source: str, limit: float, **environment: str) -> str:
    """Run `source` and return what it printed; fail if it fails or takes too long.

    Args:
        source: as of `start_program`.
        limit: seconds.
        **environment: as of `start_program`.
    """
    running = start_program(source, **environment)
    try:
        out, err = running.communicate(timeout=limit)
    finally:
        running.kill()
    assert running.returncode == 0, out + err
    return out


def run_processes(
    source: str, count: int, limit: float, devices: int = 1, fails: bool = False
) -> list[str]:
    """Run `source` in several processes of one JAX, each with its `rank`.

    Args:
        source: as of `run_program`, after the processes have found each other.
        count: how many processes.
        limit: seconds.
        devices: of each.
        fails: whether all are to fail.

    Returns:
        What each printed, errors included.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    start = f"""
import sys, jax
rank = int(sys.argv[1])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    "localhost:{port}", {count}, rank, shutdown_timeout_seconds=5
)
"""
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # the cache is for one process at a time
        "PYTHONPATH": PATH,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
    }
    program = start + textwrap.dedent(source)
    running = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", program, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for rank in range(count)
    ]
    try:
        printed = [process.communicate(timeout=limit)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, printed, strict=True):
        assert (process.returncode != 0) == fails, text
    return printed


def resident() -> int:
    """Return the resident memory of this process in bytes, after garbage collection."""
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
