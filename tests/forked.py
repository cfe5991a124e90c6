"""Python programs in processes of their own, forked from one that has imported PyTorch.

The import takes seconds, more than what most tests want to see takes.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch._dynamo", "sparse_kernels"])


class Python:
    """What `python *arguments` runs, for `-m module` and `-c code`, with these variables.

    Its methods are those of `subprocess.Popen`. Errors go to a file, output is dropped.
    """

    def __init__(self, arguments, **variables):
        handle, name = tempfile.mkstemp()
        os.close(handle)
        self._error = Path(name)
        self._process = context.Process(target=_run, args=(list(arguments), variables, name))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def kill(self):
        self._process.kill()

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise AssertionError(f"still running after {timeout} s: {self._error.read_text()}")
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        text = self._error.read_text()
        self._error.unlink(missing_ok=True)
        return None, text


def run(arguments, timeout=None, **variables):
    """Runs it to the end.

    Raises:
        AssertionError: it failed; the message is what it wrote to standard error.
    """
    process = Python(arguments, **variables)
    _, error = process.communicate(timeout)
    assert process.returncode == 0, error


def _run(arguments, variables, error):
    os.environ.update(variables)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    for descriptor, name in ((1, os.devnull), (2, error)):
        file = os.open(name, os.O_WRONLY)
        os.dup2(file, descriptor)
        os.close(file)
    kind, program, *sys.argv[1:] = arguments
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "-c", "exec"), {"__name__": "__main__"})
