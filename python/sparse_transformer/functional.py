"""The pieces between the linears, with the gradients written out where that saves memory or time.

All are exact, deterministic on the CPU, and differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import sparse_kernels as sk

# As `torch.nn.RMSNorm` has it by default in float32, in which the released models run.
RMS_EPS = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`y = x / sqrt(mean(x^2) + eps) * weight` over the last axis, eps = 2^-23 in every dtype."""
    y: Tensor = RmsNorm.apply(x, weight)
    return y


class RmsNorm(Function):
    """PyTorch's own makes five passes over fresh memory on the CPU, this makes three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(RMS_EPS).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return ((x * scale).mul_(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        # With n = x * scale and g = dY * weight: dX = scale * (g - n * mean(g * n)).
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        product = grad_y * normal
        grad_weight = product.view(-1, product.shape[-1]).sum(0)
        mean = (product @ weight.to(product.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = torch.mul(grad_y, weight, out=product if product.dtype == grad_y.dtype else None)
        grad_x = (grad_x - normal.mul_(mean)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def embed(tokens: Tensor, weight: Tensor, columns: Tensor, width: int) -> Tensor:
    """Row `t` of a sparse `(V, width)` table for each token t; no dense table is made.

    Args:
        tokens: int64, any shape.
        weight: `(V, F)`, the values that exist.
        columns: int32 `(V, F)`, where in its row each value stands; distinct in each row.
        width: size of the last axis of the result.
    """
    y: Tensor = Embed.apply(tokens, weight, columns, width)
    return y


class Embed(Function):
    """Scatters M x F values into `(M, width)`; backward gathers M x F and adds them by token."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, columns: Tensor, width: int) -> Tensor:
        flat = tokens.reshape(-1)
        # index_select refuses negative tokens, which indexing would count from the end.
        where = columns.index_select(0, flat).long()  # (M, F)
        ctx.save_for_backward(flat, where)
        ctx.rows = weight.shape[0]
        values = weight.index_select(0, flat)
        y = weight.new_zeros(flat.shape[0], width).scatter_(1, where, values)
        return y.view(*tokens.shape, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        flat, where = ctx.saved_tensors
        wide = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
        found = grad_y.reshape(flat.shape[0], -1).gather(1, where).to(wide)
        grad = found.new_zeros(ctx.rows, where.shape[1]).index_add_(0, flat, found)
        return None, grad.to(grad_y.dtype), None, None


def cross_entropy_(
    logits: Tensor, targets: Tensor, bigram: Tensor | None, tokens: Tensor
) -> Tensor:
    """Mean over M of `logsumexp(z) - z[target]`, `z = logits + bigram[token]`.

    Where gradients are wanted they are made at once, row by row, IN THE MEMORY OF `logits`,
    which is why the name ends in an underscore: pass what nobody else reads.

    Args:
        logits: `(M, V)`, contiguous.
        targets, tokens: int64 `(M,)`.
        bigram: `(V, V)` or None: what is added for each current token.

    Returns:
        A scalar in float32 at least.
    """
    loss: Tensor = CrossEntropy.apply(logits, targets, bigram, tokens)
    return loss


class CrossEntropy(Function):
    """See `cross_entropy_`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, bigram: Tensor | None, tokens: Tensor
    ) -> Tensor:
        M, wants_gradient = logits.shape[0], any(ctx.needs_input_grad)
        # It shares the version of `logits`: a backward of whoever kept them raises.
        memory = logits.detach()
        # In half precision a probability over M would vanish before it meets the loss's scale.
        ctx.over = M if logits.dtype == torch.float16 else 1
        scale = ctx.over / M if wants_gradient else 0.0
        losses = sk.transformer_ops.token_losses_(memory, targets, bigram, tokens, scale)
        if wants_gradient:
            ctx.save_for_backward(memory, tokens)
            ctx.rows = None if bigram is None else bigram.shape[0]
            ctx.bigram_dtype = None if bigram is None else bigram.dtype
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, tokens = ctx.saved_tensors
        # Looking at the scalar is free on the CPU; it would wait for a GPU, and break a graph.
        can_look = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (can_look and float(grad_loss) == ctx.over):
            grad = grad * (grad_loss / ctx.over).to(grad.dtype)
        grad_bigram = None
        if ctx.needs_input_grad[2]:
            grad_bigram = torch.ops.aten.embedding_dense_backward(
                grad.to(ctx.bigram_dtype), tokens, ctx.rows, -1, False
            )
        return grad if ctx.needs_input_grad[0] else None, None, grad_bigram, None
