"""Peak memory of a few training steps, or forwards, of one model in a process of its own.

    python -m benchmarks.transformer.memory '{"shape": ..., "variant": ..., "dtype": ..., ...}'

On the CPU it is how far the peak resident size of the process rises while the model is built and
takes its steps, above what it was with everything imported: weights, gradients, optimizer,
activations, temporary tensors and what the allocator loses. On a GPU it is what
`torch.cuda.max_memory_allocated` says.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.transformer.variants import Case, Training, draw_tokens, make_model
from sparse_transformer import keep_freed_memory

STEPS = 2


def measure_peak_mb(case: Case, *, device: str, phase: str) -> float:
    """MB (10^6 bytes) of a case in a fresh process.

    Raises:
        RuntimeError: that process failed; with what it said.
    """
    words = {**case.as_dict(), "device": device, "phase": phase, "threads": torch.get_num_threads()}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.transformer.memory", json.dumps(words)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {case.label} failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout)["peak_mb"])


def _resident_peak() -> int:
    """Bytes; of this process, since it began."""
    try:
        # On Linux getrusage also counts the process that started this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _run(case: Case, device: str, phase: str) -> None:
    if phase == "train":
        training = Training(case, device)
        for _ in range(STEPS):
            training.step()
        if training.changes_connections:
            training.step(rewires=True)
        return
    model = make_model(case, device, case.torch_dtype)
    tokens, _ = draw_tokens(case.shape, device)
    with torch.inference_mode():
        for _ in range(STEPS):
            model(tokens)


def main() -> int:
    """Prints the peak as JSON."""
    words: dict[str, Any] = json.loads(sys.argv[1])
    device = words["device"]
    torch.set_num_threads(words["threads"])
    keep_freed_memory()
    before = _resident_peak()
    _run(Case.from_dict(words), device, words["phase"])
    peak = _resident_peak() - before if device == "cpu" else torch.cuda.max_memory_allocated()
    print(json.dumps({"peak_mb": round(peak / 1e6, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
