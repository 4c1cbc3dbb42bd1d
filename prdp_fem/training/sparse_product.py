"""Products with a constant sparse matrix, which torch differentiates at a product's cost."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from prdp_fem.torch.autograd import transforms_are_active

__all__ = ["SparseProduct"]

_HALF = (torch.float16, torch.bfloat16)


class SparseProduct(nn.Module):
    """A constant sparse matrix times dense ones: shape (n, k) to (m, k).

    Stored by rows, and so is the transpose: several times as fast as torch's other formats, and as
    its own derivative, which transposes the matrix in each backward pass. Of the three arrays of
    each, since torch cannot copy or convert such matrices.
    """

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.shape = tuple(matrix.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            for name, by_rows in (
                ("matrix", matrix.to_sparse_csr()),
                ("transposed", matrix.T.to_sparse_csr()),
            ):
                self.register_buffer(f"{name}_rows", by_rows.crow_indices(), persistent=False)
                self.register_buffer(f"{name}_columns", by_rows.col_indices(), persistent=False)
                self.register_buffer(f"{name}_values", by_rows.values(), persistent=False)

    def _parts(self, name: str) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, f"{name}_{part}") for part in ("rows", "columns", "values"))

    def _apply(self, fn, recurse: bool = True) -> SparseProduct:
        """What ``to`` and ``half`` do to each module; but weights that add up to zero are not
        rounded so far that they do not.
        """
        before = {name: values for name, values in self.named_buffers() if name.endswith("_values")}
        super()._apply(fn, recurse)
        for name, values in before.items():
            converted = getattr(self, name)
            if converted.dtype in _HALF:
                setattr(self, name, values.to(converted.device))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self._parts("matrix")
        if transforms_are_active():
            rows, columns, values = matrix
            rows = torch.repeat_interleave(
                torch.arange(self.shape[0], device=rows.device), rows.diff()
            )
            terms = values[:, None] * x[columns].to(values.dtype)
            return (
                torch.zeros_like(terms[:1])
                .expand(self.shape[0], -1)
                .index_add(0, rows, terms)
                .to(x.dtype)
            )
        return _MatrixProduct.apply(self.shape, matrix, self._parts("transposed"), x)


class _MatrixProduct(torch.autograd.Function):
    """In the type of the matrix, which may be more accurate than that of what it is multiplied
    with, as under autocast.
    """

    @staticmethod
    def forward(ctx, shape, matrix, transposed, x):
        ctx.shape = shape
        ctx.matrix = matrix
        ctx.transposed = transposed
        starts, columns, entries = matrix
        by_rows = torch.sparse_csr_tensor(starts, columns, entries, shape, check_invariants=False)
        dense = x.to(matrix[2].dtype)
        if not torch.is_autocast_enabled(x.device.type):
            return (by_rows @ dense).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return (by_rows @ dense).to(x.dtype)

    @staticmethod
    def backward(ctx, cotangent):
        return (
            None,
            None,
            None,
            _MatrixProduct.apply(
                ctx.shape[::-1], ctx.transposed, ctx.matrix, cotangent.contiguous()
            ),
        )
