"""Every handle is freed on every path: a million calls, good and refused, leave the process as large as before."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A leak of one handle a call (a TensorImpl is over 200 bytes) would add 200 MB in a million calls.
CALLS, ALLOWED_MB = 1_000_000, 8.0

PATHS = {
    "linear": "run = lambda: linear(x, codes, basis, gain, bias, None, layout=L, in_features=16)",
    "linear, amplitude": "run = lambda: linear(x, codes, basis, gain, bias, amplitude, layout=L, in_features=16)",
    "linear, strided copies": "run = lambda: linear(x, codes, wide, gain, bias, None, layout=L, in_features=16)",
    "backward": "run = lambda: backward(dy, x, codes, basis, gain, bias, amplitude, layout=L, in_features=16)",
    "pack": "run = lambda: torch.ops.rbe.pack.default(codes, layout=L, in_features=16)",
    "refused shape": "run = lambda: refused(lambda: linear(x, codes, basis, gain, dy, amplitude, layout=L, in_features=16))",
    "refused codes": "run = lambda: refused(lambda: linear(x, codes | 1 << 30, basis, gain, bias, None, layout=L, in_features=16))",
}

SCRIPT = """
import sys, torch, rbe_torch
torch.set_num_threads(1)
linear, backward, L = torch.ops.rbe.linear_inference.default, torch.ops.rbe.linear_backward.default, "rbe22_g8"
x, dy, codes = torch.randn(1, 16), torch.randn(1, 2), torch.zeros(2, 2, 1, dtype=torch.int32)
basis, gain, bias, amplitude = torch.randn(1, 256, 8), torch.ones(2), torch.zeros(2), torch.zeros(2, 2, 1)
wide = torch.randn(1, 8, 256).transpose(1, 2)
def refused(call):
    try:
        call()
    except RuntimeError:
        return
    raise SystemExit("was not refused")
def resident_mb():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20
exec(sys.argv[1])
calls = int(sys.argv[2])
with torch.inference_mode():
    for _ in range(calls // 10):
        run()
    before = resident_mb()
    for _ in range(calls):
        run()
print(resident_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("path", PATHS)
def test_memory_stays_flat(path):
    # The slower paths prove the same with fewer calls: what a call leaks does not depend on how many there are.
    calls = CALLS if path == "linear" else CALLS // 10
    done = subprocess.run([sys.executable, "-c", SCRIPT, PATHS[path], str(calls)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < ALLOWED_MB * calls / CALLS + 2.0
