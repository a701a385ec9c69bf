"""Linear CKA of two sets of features, with a gradient of one matrix product a side.

With the features centred, their Gram matrices K and L, the diagonals of those dx and dy, and t the diagonals' sums:

    biased HSIC    S = <K, L>
    debiased HSIC  S - n/(n-2) <dx, dy> + tx ty / ((n-1)(n-2))      (Song et al. 2012, eq. 5)
    CKA            hsic(x, y) / sqrt(hsic(x, x) hsic(y, y))         (Kornblith et al. 2019, eq. 4)

N examples, P width of x, Q width of y
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from thesean.kernels.shared.dispatch import Backend, choose, load
from thesean.kernels.shared.precision import accumulator, centred, full_precision, widen

Form = Literal["gram", "feature"]
_DOT_ELEMENTS = 1 << 20  # of a matrix that are widened to float64 at a time


@dataclass(frozen=True, kw_only=True)
class CentredGram:
    """One side of CKA, ready for use with many others: made by `prepare`, taken by `cka` in place of y_NQ."""

    shape: tuple[int, int]
    dtype: torch.dtype
    form: Form
    squares_N: torch.Tensor  # squared lengths of the centred rows: the Gram's diagonal
    energy: torch.Tensor  # the Gram's squared Frobenius norm
    centred_NP: torch.Tensor | None  # None when prepared in Gram form, which reads no features
    gram: torch.Tensor | None  # gram_NN, or in feature form covariance_PP; None when prepared in feature form

    def to(self, dtype: torch.dtype) -> CentredGram:
        centred, gram = (x if x is None else x.to(dtype) for x in (self.centred_NP, self.gram))
        return replace(self, dtype=dtype, centred_NP=centred, gram=gram)


def prepare(y_NQ: torch.Tensor, *, student_width: int | None = None) -> CentredGram:
    """The guide's side, computed once for all steps on the same examples; no gradient flows into it.

    `student_width` (default: Q) only serves to choose the cheaper of the two forms.
    """
    (y_NQ,) = widen(y_NQ.detach())
    form = _cheaper_form(y_NQ.shape[0], student_width or y_NQ.shape[1], y_NQ.shape[1])
    with full_precision(y_NQ.device):
        side = _centre(y_NQ, form, exact=True)
    return replace(side, centred_NP=None) if form == "gram" else replace(side, gram=None)


def cka(
    x_NP: torch.Tensor, y: torch.Tensor | CentredGram, *, debiased: bool = False, backend: Backend = "auto"
) -> torch.Tensor:
    """Linear CKA. x_NP, and y_NQ or `prepare(y_NQ)` -> scalar in [0, 1], or in [-1, 1] when debiased.

    The scalar is float32, or float64 where an input is; NaN when a side does not vary. Differentiable once, in y_NQ
    too where it requires a gradient. Raises ValueError when N < 4 or the sides differ in N.
    """
    return _run("cka", x_NP, y, debiased, backend)


def cka_distance(
    x_NP: torch.Tensor, y: torch.Tensor | CentredGram, *, debiased: bool = False, backend: Backend = "auto"
) -> torch.Tensor:
    """1 - CKA as half the squared distance of the normalised Gram matrices, the loss to train on.

    Like `cka`, but free of the cancellation in 1 - CKA, which in float32 leaves no digits below 1e-7.
    """
    return _run("cka_distance", x_NP, y, debiased, backend)


def _run(op: str, x_NP: torch.Tensor, y: torch.Tensor | CentredGram, debiased: bool, backend: Backend) -> torch.Tensor:
    if x_NP.shape[0] < 4 or x_NP.shape[0] != y.shape[0]:
        raise ValueError(f"{op}: expected N >= 4 examples, as many in x as in y, found {x_NP.shape[0]}, {y.shape[0]}.")
    if backend == "auto":
        form = y.form if isinstance(y, CentredGram) else _cheaper_form(x_NP.shape[0], x_NP.shape[1], y.shape[1])
        if form == "feature" or torch.float64 in (x_NP.dtype, y.dtype):
            backend = "torch"  # the kernels make Grams, in float32
    result: torch.Tensor
    if choose(backend, "cka", x_NP.device) == "triton":
        result = load("cka", op)(x_NP, y, debiased=debiased)  # in the features' own dtype
    elif isinstance(y, CentredGram):
        dtype = torch.promote_types(x_NP.dtype, y.dtype)
        result = _CKA.apply(x_NP.to(dtype), None, y.to(dtype), y.form, debiased, op == "cka_distance")
    else:
        x_NP, y_NQ = widen(x_NP, y)
        form = _cheaper_form(x_NP.shape[0], x_NP.shape[1], y_NQ.shape[1])
        result = _CKA.apply(x_NP, y_NQ, None, form, debiased, op == "cka_distance")
    return result


class _CKA(torch.autograd.Function):
    """d CKA / dX = 2 W Xc, W = a L - b K + c_j (delta_ij - 1/n), a = 1/sqrt(hxx hyy), b = CKA/hxx, c = 0 if biased."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NP: torch.Tensor,
        y_NQ: torch.Tensor | None,
        guide: CentredGram | None,
        form: Form,
        debiased: bool,
        distance: bool,
    ) -> torch.Tensor:
        with full_precision(x_NP.device):
            x = _centre(x_NP, form, exact=distance)
            y = _centre(y_NQ, form, exact=distance) if y_NQ is not None else guide
            assert y is not None
            x_scale, y_scale = _self_scale(x, debiased), _self_scale(y, debiased)
            cross_QP = None
            if form == "gram":
                assert x.gram is not None
                assert y.gram is not None
                if distance:
                    apart_NN = (x.gram * x_scale).sub_(y.gram * y_scale)
                    squares_N = x.squares_N * x_scale - y.squares_N * y_scale
                    value = _hsic(_dot(apart_NN, apart_NN), squares_N, squares_N, debiased) / 2
                else:
                    value = _hsic(_dot(x.gram, y.gram), x.squares_N, y.squares_N, debiased) * (x_scale * y_scale)
            else:
                assert x.centred_NP is not None
                assert y.centred_NP is not None
                cross_QP = _product(y.centred_NP, x.centred_NP, exact=distance)
                value = _hsic(_dot(cross_QP, cross_QP), x.squares_N, y.squares_N, debiased) * (x_scale * y_scale)
                if distance:
                    # harmless here: `exact` made every product in float64; at identity -2e-16 can be left
                    value = (1 - value).clamp_min(0)
        ctx.save_for_backward(
            *(x.centred_NP, x.gram, x.squares_N, x_scale, y.centred_NP, y.gram, y.squares_N, y_scale, cross_QP, value)
        )
        ctx.debiased, ctx.distance = debiased, distance
        return value.to(x_NP.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *sides, cross_QP, value = ctx.saved_tensors
        x, y = sides[:4], sides[4:]
        similarity, grad = (1 - value, -grad) if ctx.distance else (value, grad)
        grad_x_NP = grad_y_NQ = None
        with full_precision(grad.device):
            if ctx.needs_input_grad[0]:
                grad_x_NP = _gradient(x, y, cross_QP, similarity, grad, ctx.debiased)
            if ctx.needs_input_grad[1]:
                cross_PQ = None if cross_QP is None else cross_QP.mT
                grad_y_NQ = _gradient(y, x, cross_PQ, similarity, grad, ctx.debiased)
        return grad_x_NP, grad_y_NQ, None, None, None, None


def _gradient(
    own: list[torch.Tensor],
    other: list[torch.Tensor],
    cross: torch.Tensor | None,
    similarity: torch.Tensor,
    grad: torch.Tensor,
    debiased: bool,
) -> torch.Tensor:
    """The gradient of one side's features. `cross`: other^T own, in feature form."""
    centred_NP, gram, squares_N, scale = own
    other_NQ, other_gram, other_squares_N, other_scale = other
    n, dtype = centred_NP.shape[0], centred_NP.dtype
    # W / scale: of the order of one at any scale of the features
    own_weight, other_weight = scale * similarity, other_scale
    slope_N = None
    if debiased:
        slope_N = other_squares_N * other_weight - squares_N * own_weight
        slope_N = (slope_N.sum() / ((n - 1) * (n - 2)) - slope_N * (n / (n - 2))).to(dtype)
    if cross is None:
        weight_NN = (other_gram * other_weight).sub_(gram * own_weight)
        if slope_N is not None:
            weight_NN.sub_(slope_N / n).diagonal().add_(slope_N)
        grad_NP = weight_NN @ centred_NP
    else:
        grad_NP = other_NQ @ (cross * other_weight).to(dtype)
        grad_NP = grad_NP.addmm_(centred_NP, (gram * own_weight).to(dtype), alpha=-1)
        if slope_N is not None:
            sloped_NP = centred_NP * slope_N.unsqueeze(1)
            grad_NP.add_(sloped_NP.sub_(sloped_NP.mean(0)))
    return grad_NP.mul_(2 * grad * scale)


def _cheaper_form(n: int, p: int, q: int) -> Form:
    """Gram matrices are (n, n), covariances (p, q). Products in forward and backward balance near n = 1.75 p."""
    return "gram" if n < 0.875 * (p + q) else "feature"


def _centre(x_NP: torch.Tensor, form: Form, exact: bool) -> CentredGram:
    wide, centred_NP = accumulator(x_NP.device), centred(x_NP)
    if form == "gram":
        gram = centred_NP @ centred_NP.mT
        squares_N = gram.diagonal().to(wide)  # the Gram's own: their rounding errors then cancel in the debiased form
    else:
        gram = _product(centred_NP, centred_NP, exact)
        squares_N = torch.linalg.vecdot(centred_NP, centred_NP).to(wide)
    return CentredGram(
        shape=(x_NP.shape[0], x_NP.shape[1]),
        dtype=x_NP.dtype,
        form=form,
        squares_N=squares_N,
        energy=_dot(gram, gram),
        centred_NP=centred_NP,
        gram=gram,
    )


def _product(a_NP: torch.Tensor, b_NQ: torch.Tensor, exact: bool) -> torch.Tensor:
    if exact:
        a_NP, b_NQ = (x.to(accumulator(x.device)) for x in (a_NP, b_NQ))
    return a_NP.mT @ b_NQ


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> in float64, some rows at a time: float32's norm() of a large Gram is off by 1e-4 on CPU."""
    wide, rows = accumulator(a.device), max(1, _DOT_ELEMENTS // a.shape[1])
    pairs = zip(a.split(rows), b.split(rows), strict=True)
    return torch.stack([torch.dot(u.to(wide).reshape(-1), v.to(wide).reshape(-1)) for u, v in pairs]).sum()


def _hsic(inner: torch.Tensor, dx_N: torch.Tensor, dy_N: torch.Tensor, debiased: bool) -> torch.Tensor:
    if not debiased:
        return inner
    n = dx_N.shape[0]
    return inner - torch.dot(dx_N, dy_N) * (n / (n - 2)) + dx_N.sum() * dy_N.sum() / ((n - 1) * (n - 2))


def _self_scale(side: CentredGram, debiased: bool) -> torch.Tensor:
    """1 / sqrt(hsic(x, x)); NaN where that is nothing but rounding, as for features that do not vary."""
    hsic = _hsic(side.energy, side.squares_N, side.squares_N, debiased)
    floor = 4 * torch.finfo(side.dtype).eps * side.energy
    return torch.where(hsic > floor, hsic, torch.nan).rsqrt()
