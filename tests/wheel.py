"""What an installed wheel must do, on a machine without a compiler: `python tests/wheel.py`.

It imports the installed package alone, so run it from another folder than the checkout.
"""

import platform

import _sparse_kernels_cpu
import torch

import sparse_kernels as sk

for fan in ({"fan_in": 32}, {"fan_out": 16}):
    layer = sk.SparseLinear(256, 512, **fan, dtype=torch.float64)
    x = torch.randn(33, 256, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), layer.to_dense()(x)
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(found, wanted)
instruction_sets = ", ".join(_sparse_kernels_cpu.isas())
print(f"{_sparse_kernels_cpu.__file__}\nPython {platform.python_version()}, {instruction_sets}")
