"""The derivatives of a number of iterations, against PETSc's own solves and against torch's
derivatives of dense restatements.
"""

import gc
import itertools

import numpy as np
import pytest
from firedrake import *
from firedrake.petsc import PETSc

from prdp_fem.unrolled import OperatorCotangent, UnrolledKSP
from prdp_fem.unrolled.trace import Trace
from prdp_fem.unrolled.values import Vector

ITERATIONS = (1, 2, 4, 8)
# The matrix, and options.
METHODS = {
    "richardson": ("unsymmetric", {"ksp_type": "richardson", "ksp_richardson_scale": 0.3}),
    "self-scaled": ("unsymmetric", {"ksp_type": "richardson", "ksp_richardson_self_scale": None}),
    "chebyshev": ("unsymmetric", {"ksp_type": "chebyshev", "ksp_chebyshev_eigenvalues": "0.1,2.7"}),
    "cg": ("symmetric", {"ksp_type": "cg"}),
    "cg-natural": ("symmetric", {"ksp_type": "cg", "ksp_norm_type": "natural"}),
    "cg-unpreconditioned": ("symmetric", {"ksp_type": "cg", "ksp_norm_type": "unpreconditioned"}),
    "cg-none": ("symmetric", {"ksp_type": "cg", "ksp_norm_type": "none"}),
    "gmres": ("unsymmetric", {"ksp_type": "gmres"}),
    "gmres-restarted": ("unsymmetric", {"ksp_type": "gmres", "ksp_gmres_restart": 3}),
    "gmres-right": (
        "unsymmetric",
        {"ksp_type": "gmres", "ksp_gmres_restart": 3, "ksp_pc_side": "right"},
    ),
    "fgmres": ("unsymmetric", {"ksp_type": "fgmres", "ksp_gmres_restart": 3}),
    "bcgs": ("unsymmetric", {"ksp_type": "bcgs"}),
    "steepest-descent": (
        "symmetric",
        {"ksp_type": "python", "ksp_python_type": "prdp_fem.unrolled.SteepestDescent"},
    ),
}
PRECONDITIONERS = {
    "none": {"pc_type": "none"},
    "jacobi": {"pc_type": "jacobi"},
    "pbjacobi": {"pc_type": "pbjacobi"},
    "ssor": {"pc_type": "sor", "pc_sor_omega": 1.3},
    "forward": {"pc_type": "sor", "pc_sor_local_forward": None, "pc_sor_omega": 0.7},
    "backward": {"pc_type": "sor", "pc_sor_local_backward": None},
    "gauss-seidel": {"pc_type": "sor"},
}
NO_SHORTCUT = {("self-scaled", name) for name in ("ssor", "forward", "backward", "gauss-seidel")}
PAIRS = [pair for pair in itertools.product(METHODS, PRECONDITIONERS) if pair not in NO_SHORTCUT]
_counter = itertools.count()


@pytest.fixture(scope="module")
def matrices():
    """An operator of vectors on an unstructured mesh, whose rows PETSc's sweeps take in groups,
    symmetric and with convection.
    """
    mesh = UnitDiskMesh(2)
    x, y = SpatialCoordinate(mesh)
    V = VectorFunctionSpace(mesh, "CG", 1)
    u, v = TrialFunction(V), TestFunction(V)
    symmetric = (
        2 * inner(u, v) + 0.2 * (1 + 0.3 * x) * inner(grad(u), grad(v)) + 0.3 * div(u) * div(v)
    ) * dx
    unsymmetric = (
        symmetric
        + inner(dot(as_vector([2 * y, 1 - x]), nabla_grad(u)) + as_vector([u[1], -0.5 * u[0]]), v)
        * dx
    )
    found = {}
    for name, form in (("symmetric", symmetric), ("unsymmetric", unsymmetric)):
        matrix = assemble(form).petscmat.copy()
        size = matrix.createVecRight()
        matrix.getDiagonal(size)
        matrix.scale(matrix.getSize()[0] / size.sum())  # the eigenvalues about 1
        found[name] = matrix
    return found


def solver(A, P=None, **options):
    prefix = f"unrolled{next(_counter)}_"
    database = PETSc.Options(prefix)
    for name, value in options.items():
        database[name] = value
    ksp = PETSc.KSP().create(comm=A.comm)
    ksp.setOptionsPrefix(prefix)
    ksp.setOperators(A, P)
    ksp.setFromOptions()
    return ksp


def solve(ksp, b, guess, iterations):
    x = b.duplicate()
    ksp.setTolerances(rtol=1e-30, atol=1e-300, divtol=1e300, max_it=iterations)
    ksp.setInitialGuessNonzero(guess is not None)
    if guess is not None:
        guess.copy(x)
    ksp.solve(b, x)
    assert ksp.getIterationNumber() == iterations
    return x


def growth_of_a_change(ksp, b, guess, iterations, x):
    """How much larger than a small change of b is the change of x that PETSc makes of it."""
    change = vector(ksp.getOperators()[0], 6)
    change.scale(1e-12)
    return (solve(ksp, b + change, guess, iterations) - x).norm() / change.norm()


def vector(A, seed):
    """The same values on any number of ranks."""
    x = A.createVecRight()
    x.setArray(
        np.random.default_rng(seed).standard_normal(x.getSize())[slice(*x.getOwnershipRange())]
    )
    return x


def direction(A, seed):
    """A matrix with the pattern of A, and its entries."""
    indptr, columns, values = A.getValuesCSR()
    rows = A.getOwnershipRange()[0] + np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    values = values * np.sin(seed + 1.7 * columns + 0.9 * rows)
    matrix = A.duplicate(copy=True)
    matrix.setValuesCSR(indptr, columns, values)
    matrix.assemble()
    return matrix, values


def dense(A):
    torch = pytest.importorskip("torch")
    return torch.tensor(A.convert("dense", out=PETSc.Mat()).getDenseArray().copy())


def difference(x, y):
    return np.linalg.norm(np.asarray(x) - np.asarray(y)) / (np.linalg.norm(np.asarray(y)) or 1.0)


# The same iterations for dense torch tensors, from textbooks.


def dense_preconditioner(A, name):
    import torch

    d, n = torch.diagonal(A), A.shape[0]
    lower = torch.tril(A, -1)
    upper = torch.triu(A, 1)
    D = torch.diag(d)
    pairs = torch.block_diag(*[torch.ones(2, 2, dtype=A.dtype)] * (n // 2))
    match name:
        case "none":
            return lambda r: r
        case "jacobi":
            return lambda r: r / d
        case "pbjacobi":
            return lambda r: torch.linalg.solve(A * pairs, r)
        case "ssor":
            omega = 1.3
            return lambda r: torch.linalg.solve(
                D / omega + upper,
                (2 - omega) / omega * d * torch.linalg.solve(D / omega + lower, r),
            )
        case "forward":
            return lambda r: torch.linalg.solve(D / 0.7 + lower, r)
    # Pairs of like rows, which are blocks to PETSc where omega is 1.
    D = A * pairs
    lower, upper = lower * (1 - pairs), upper * (1 - pairs)
    if name == "backward":
        return lambda r: torch.linalg.solve(D + upper, r)
    return lambda r: torch.linalg.solve(D + upper, D @ torch.linalg.solve(D + lower, r))


def dense_iterate(method, A, b, x, B, iterations):
    import torch

    kind = method.split("-")[0]
    if kind in ("gmres", "fgmres"):
        restart = 30 if method == "gmres" else 3
        while iterations > 0:
            m = min(restart, iterations)
            if method.endswith("right") or kind == "fgmres":
                x = x + B(least_residual(lambda v: A @ B(v), b - A @ x, m))
            else:
                x = x + least_residual(lambda v: B(A @ v), B(b - A @ x), m)
            iterations -= m
        return x
    if kind == "chebyshev":
        # Saad, Iterative methods for sparse linear systems, algorithm 12.1.
        theta, delta = (2.7 + 0.1) / 2, (2.7 - 0.1) / 2
        rho, d = delta / theta, B(b - A @ x) / theta
        for _ in range(iterations):
            x = x + d
            rho_next = 1 / (2 * theta / delta - rho)
            d = rho_next * rho * d + 2 * rho_next / delta * B(b - A @ x)
            rho = rho_next
        return x
    r = b - A @ x
    if kind == "bcgs":
        r = B(r)
        shadow = p = r
        for _ in range(iterations):
            v = B(A @ p)
            alpha = (r @ shadow) / (v @ shadow)
            s = r - alpha * v
            t = B(A @ s)
            omega = (t @ s) / (t @ t)
            x = x + alpha * p + omega * s
            r_next = s - omega * t
            p = r_next + (r_next @ shadow) / (r @ shadow) * alpha / omega * (p - omega * v)
            r = r_next
        return x
    p = B(r)
    for _ in range(iterations):
        match kind:
            case "richardson":
                x = x + 0.3 * B(b - A @ x)
            case "self":
                z = B(b - A @ x)
                y = B(A @ z)
                x = x + (z @ y) / (y @ y) * z
            case "steepest":
                r = b - A @ x
                z = B(r)
                x = x + (r @ z) / (z @ (A @ z)) * z
            case "cg":
                # Hestenes and Stiefel's formulas: others agree with them for symmetric changes of A
                # only.
                alpha = (r @ B(r)) / (p @ (A @ p))
                x = x + alpha * p
                r_next = b - A @ x
                p = B(r_next) + (r_next @ B(r_next)) / (r @ B(r)) * p
                r = r_next
    assert torch.isfinite(x).all()
    return x


def least_residual(K, r, m):
    """The z in the Krylov space of K and r that makes ‖r - K z‖ least."""
    import torch

    basis = [r / r.norm()]
    for _ in range(m):
        w = K(basis[-1])
        for v in basis:
            w = w - (v @ w) * v
        basis.append(w / w.norm())
    V = torch.stack(basis[:-1], 1)
    Q, R = torch.linalg.qr(torch.stack([K(v) for v in basis[:-1]], 1))
    return V @ torch.linalg.solve(R, Q.T @ r)


def bounds_by_growth(results, inputs, expected, iterations):
    """How far results may be off by rounding: as far as changes of its size take them.

    Each iteration has sums of n terms, whose rounding errors grow as n roundings by chance do.
    """
    import torch

    rounding = iterations * np.sqrt(len(inputs[1])) * np.finfo(float).eps
    generator, size = torch.Generator().manual_seed(7), 1e-9

    def change(tensor):
        return 1 + size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    bounds = dict.fromkeys(expected, 0.0)
    for _ in range(3):
        A, b, x = inputs
        # A guess of zero is not exact either: residuals are of b's size.
        moved = results(A * change(A), b * change(b), x + b * (change(b) - 1), change=change)
        for name, value in expected.items():
            growth = torch.linalg.norm(moved[name] - value) / size
            bounds[name] = max(bounds[name], rounding * growth)
    return bounds


@pytest.mark.parametrize("method, preconditioner", PAIRS)
def test_against_petsc_and_torch(matrices, method, preconditioner):
    torch = pytest.importorskip("torch")
    name, options = METHODS[method]
    A = matrices[name]
    ksp = solver(A, **options, **PRECONDITIONERS[preconditioner])
    unrolled = UnrolledKSP(ksp)
    b, x0, c, b_dot, x0_dot = (vector(A, seed) for seed in range(5))
    A_dot, _ = direction(A, 3)
    out = b.duplicate()
    b_bar = b.duplicate()
    x0_bar = b.duplicate()
    A_bar = OperatorCotangent(A)
    pattern = A_bar.pattern
    tensors = dense(A), torch.tensor(b.array), torch.tensor(x0.array)
    tangents = dense(A_dot), torch.tensor(b_dot.array), torch.tensor(x0_dot.array)
    cotangent = torch.tensor(c.array)
    for iterations, guess in itertools.product(ITERATIONS, (None, x0)):

        def results(*inputs, iterations=iterations, change=None):
            """The iterate, its gradients and its tangent, by torch."""

            def iterate(A, b, x):
                B = dense_preconditioner(A, preconditioner)
                apply = B if change is None else lambda r: B(r) * change(r)
                return dense_iterate(method, A, b, x, apply, iterations)

            inputs = [tensor.clone().requires_grad_() for tensor in inputs]
            by_A, by_b, by_x = torch.autograd.grad(iterate(*inputs), inputs, cotangent)
            value, tangent = torch.func.jvp(
                iterate, tuple(tensor.detach() for tensor in inputs), tangents
            )
            return {
                "value": value,
                "A": by_A[pattern.rows, pattern.columns],
                "b": by_b,
                "x": by_x,
                "tangent": tangent,
            }

        inputs = *tensors[:2], tensors[2] * (guess is not None)
        expected = results(*inputs)
        # Some derivatives after one iteration are zero.
        bounds = {
            name: 1e-11 * (torch.linalg.norm(value) or 1.0) for name, value in expected.items()
        }
        bounds["value"] = 1e-13 * torch.linalg.norm(expected["value"])
        bounds["x"] = 1e-11 * torch.linalg.norm(cotangent)
        if method == "bcgs":
            # Its residuals grow on the way, and rounding errors with them.
            bounds = bounds_by_growth(results, inputs, expected, iterations)

        unrolled.iterate(b, guess, iterations, out)
        found = {
            "value": solve(ksp, b, guess, iterations).array - out.array + expected["value"].numpy()
        }
        A_bar.zero()
        unrolled.adjoint(
            b,
            guess,
            iterations,
            c,
            b_cotangent=b_bar,
            guess_cotangent=x0_bar,
            operator_cotangent=A_bar,
        )
        found.update({"A": A_bar.values, "b": b_bar.array, "x": x0_bar.array})
        unrolled.tangent(
            b, guess, iterations, out, b_tangent=b_dot, guess_tangent=x0_dot, operator_tangent=A_dot
        )
        found["tangent"] = out.array
        for name, value in found.items():
            assert torch.linalg.norm(torch.tensor(value) - expected[name]) < bounds[name], name


@pytest.mark.parametrize("method, preconditioner", PAIRS)
def test_central_differences_of_petsc(matrices, method, preconditioner):
    name, options = METHODS[method]
    A = matrices[name].copy()
    options = {**options, **PRECONDITIONERS[preconditioner]}
    unrolled = UnrolledKSP(solver(A, **options))
    b, x0, out, b_dot, x0_dot = (vector(A, seed) for seed in range(5))
    A_dot, _ = direction(A, 4)
    if name == "symmetric":
        A_dot.axpy(1.0, A_dot.transpose(PETSc.Mat()))
    unrolled.tangent(b, x0, 4, out, b_tangent=b_dot, guess_tangent=x0_dot, operator_tangent=A_dot)
    step, moved = 1e-5, []
    for sign in (1, -1):
        changed = A.copy()
        changed.axpy(sign * step, A_dot)
        moved.append(
            solve(solver(changed, **options), b + sign * step * b_dot, x0 + sign * step * x0_dot, 4)
        )
    assert difference(out.array, (moved[0].array - moved[1].array) / (2 * step)) < 1e-6


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_adjoint_is_that_of_the_tangent(matrices, preconditioner):
    for method, (name, options) in METHODS.items():
        if (method, preconditioner) in NO_SHORTCUT:
            continue
        A = matrices[name]
        ksp = solver(A, **options, **PRECONDITIONERS[preconditioner])
        b, x0, c, b_dot, x0_dot = (vector(A, seed) for seed in range(5))
        A_dot, values = direction(A, 5)
        out = b.duplicate()
        b_bar = b.duplicate()
        x0_bar = b.duplicate()
        for iterations, guess in ((1, None), (4, x0), (7, None)):
            unrolled = UnrolledKSP(ksp)
            unrolled.iterate(b, guess, iterations, out)
            expected = solve(ksp, b, guess, iterations)
            out.axpy(-1.0, expected)
            # BiCGStab does so with rounding errors, where its inner products are small
            amplified = 100 if method == "bcgs" else 1
            # How small they are depends on how the mesh is cut into parts.
            growth = (
                max(1, growth_of_a_change(ksp, b, guess, iterations, expected))
                if method == "bcgs"
                else 1
            )
            assert out.norm() < 1e-13 * amplified * growth * c.norm()
            results = []
            for checkpoints in (None, 1, 2, 3):
                A_bar = OperatorCotangent(A)
                UnrolledKSP(ksp, checkpoints=checkpoints).adjoint(
                    b,
                    guess,
                    iterations,
                    c,
                    b_cotangent=b_bar,
                    guess_cotangent=x0_bar,
                    operator_cotangent=A_bar,
                )
                results.append(np.concatenate([A_bar.values, b_bar.array, x0_bar.array]))
            for result in results[1:]:
                assert np.abs(result - results[0]).max(initial=0) < 1e-10 * max(
                    1, np.abs(results[0]).max(initial=0)
                )
            unrolled.tangent(
                b,
                guess,
                iterations,
                out,
                b_tangent=b_dot,
                guess_tangent=x0_dot,
                operator_tangent=A_dot,
            )
            products = (
                A.comm.tompi4py().allreduce(float(A_bar.values @ values))
                + b_bar.dot(b_dot)
                + x0_bar.dot(x0_dot)
            )
            assert abs(products - out.dot(c)) < 1e-12 * amplified * out.norm() * c.norm()


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    "method, preconditioner",
    [
        ("cg", "jacobi"),
        ("cg-natural", "none"),
        ("steepest-descent", "ssor"),
        ("cg", "gauss-seidel"),
    ],
)
def test_symmetric_operators_need_no_transposes(matrices, method, preconditioner):
    A = matrices["symmetric"]
    ksp = solver(A, **METHODS[method][1], **PRECONDITIONERS[preconditioner])
    b, c, first, second = (vector(A, seed) for seed in range(4))
    UnrolledKSP(ksp).adjoint(b, None, 6, c, b_cotangent=first)
    UnrolledKSP(ksp).adjoint(b, None, 6, c, b_cotangent=second, symmetric=True)
    assert (first - second).norm() < 1e-12 * first.norm()


@pytest.mark.parametrize("iterations", (7, 5000))
def test_richardson_from_zero_is_implicit(matrices, iterations):
    A = matrices["unsymmetric"]
    ksp = solver(A, **METHODS["richardson"][1], pc_type="jacobi")
    b, c, b_bar, implicit, again = (vector(A, seed) for seed in range(5))
    solve(ksp, b, None, iterations)
    unrolled = UnrolledKSP(ksp)
    unrolled.adjoint(b, None, iterations, c, b_cotangent=b_bar)
    ksp.solveTranspose(c, implicit)
    assert ksp.getIterationNumber() == iterations
    # Summed in another order: B (1 + A B + …) and (1 + B A + …) B.
    assert difference(b_bar.array, implicit.array) < 1e-13
    # The iterations themselves are not repeated.
    assert len(unrolled._restated.pool._free) < 20
    UnrolledKSP(ksp, checkpoints=2).adjoint(b, None, iterations, c, b_cotangent=again)
    assert np.array_equal(again.array, b_bar.array)


def test_values_that_were_put_off(matrices):
    A = matrices["unsymmetric"]
    unrolled = UnrolledKSP(solver(A, ksp_type="cg", pc_type="jacobi"))
    b, out = vector(A, 1), vector(A, 2)
    unrolled.iterate(b, None, 1, out)
    on = Trace(unrolled._restated.system, unrolled._restated.pool, None, None, puts_off=True)
    x = y = on.lifted(Vector(b))
    for _ in range(5000):
        x = on.add(x, 1.0, y, -0.5, x)
    # It goes to 2 y.
    assert abs(on.dot(x, y).value - 2 * b.dot(b)) < 1e-13 * b.dot(b)


def test_another_matrix_for_the_preconditioner(matrices):
    A, P = matrices["unsymmetric"], matrices["symmetric"]
    for method in ("richardson", "gmres-restarted", "bcgs"):
        for name in ("jacobi", "ssor", "pbjacobi"):
            ksp = solver(A, P, **METHODS[method][1], **PRECONDITIONERS[name])
            unrolled = UnrolledKSP(ksp)
            b, c, out, b_bar = (vector(A, seed) for seed in range(4))
            (A_dot, A_values), (P_dot, P_values) = direction(A, 1), direction(P, 2)
            A_bar, P_bar = OperatorCotangent(A), OperatorCotangent(P)
            unrolled.adjoint(
                b,
                None,
                4,
                c,
                b_cotangent=b_bar,
                operator_cotangent=A_bar,
                preconditioner_cotangent=P_bar,
            )
            unrolled.tangent(b, None, 4, out, operator_tangent=A_dot, preconditioner_tangent=P_dot)
            assert (
                abs(out.dot(c) - A_bar.values @ A_values - P_bar.values @ P_values)
                < 1e-12 * out.norm() * c.norm()
            )


def test_other_preconditioners_count_as_constant(matrices, caplog):
    A = matrices["unsymmetric"]
    for options in (
        {"pc_type": "ilu"},
        {"pc_type": "ilu"},
        {"pc_type": "jacobi", "pc_jacobi_type": "rowl1"},
    ):
        ksp = solver(A, ksp_type="gmres", **options)
        unrolled = UnrolledKSP(ksp)
        b, c, b_bar, b_dot, out = (vector(A, seed) for seed in range(5))
        A_dot, values = direction(A, 1)
        A_bar = OperatorCotangent(A)
        unrolled.adjoint(b, None, 4, c, b_cotangent=b_bar, operator_cotangent=A_bar)
        unrolled.tangent(b, None, 4, out, b_tangent=b_dot, operator_tangent=A_dot)
        assert (
            abs(out.dot(c) - A_bar.values @ values - b_bar.dot(b_dot))
            < 1e-12 * out.norm() * c.norm()
        )
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 1 and f"pc_type {options['pc_type']}" in warnings[0]
        caplog.clear()


def test_operators_that_change(matrices):
    A = matrices["unsymmetric"].copy()
    for name in ("jacobi", "ssor"):
        ksp = solver(A, ksp_type="gmres", **PRECONDITIONERS[name])
        unrolled = UnrolledKSP(ksp)
        b, c, b_bar, out = (vector(A, seed) for seed in range(4))
        for shift in (0.0, 1.0):
            A.shift(shift)
            A_bar, fresh_bar = OperatorCotangent(A), OperatorCotangent(A)
            unrolled.adjoint(b, None, 4, c, b_cotangent=b_bar, operator_cotangent=A_bar)
            fresh = UnrolledKSP(solver(A, ksp_type="gmres", **PRECONDITIONERS[name]))
            fresh.adjoint(b, None, 4, c, b_cotangent=out, operator_cotangent=fresh_bar)
            assert np.array_equal(A_bar.values, fresh_bar.values) and np.array_equal(
                out.array, b_bar.array
            )


def test_null_spaces():
    mesh = UnitSquareMesh(5, 5)
    V = FunctionSpace(mesh, "CG", 1)
    u, v = TrialFunction(V), TestFunction(V)
    A = assemble(inner(grad(u), grad(v)) * dx).petscmat
    constants = PETSc.NullSpace().create(constant=True, comm=A.comm)
    A.setNullSpace(constants)
    A.setTransposeNullSpace(constants)
    for kind, name in (("cg", "jacobi"), ("gmres", "jacobi"), ("cg", "none")):
        ksp = solver(A, ksp_type=kind, **PRECONDITIONERS[name])
        unrolled = UnrolledKSP(ksp)
        b, c, out, b_bar, b_dot = (vector(A, seed) for seed in range(5))
        unrolled.iterate(b, None, 5, out)
        assert difference(out.array, solve(ksp, b, None, 5).array) < 1e-12
        A_bar, (A_dot, values) = OperatorCotangent(A), direction(A, 2)
        unrolled.adjoint(b, None, 5, c, b_cotangent=b_bar, operator_cotangent=A_bar)
        unrolled.tangent(b, None, 5, out, b_tangent=b_dot, operator_tangent=A_dot)
        assert (
            abs(out.dot(c) - A_bar.values @ values - b_bar.dot(b_dot))
            < 1e-12 * out.norm() * c.norm()
        )


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method not in ("richardson", "chebyshev")]
)
def test_nothing_left_to_do(matrices, method):
    name, options = METHODS[method]
    A = matrices[name]
    unrolled = UnrolledKSP(solver(A, **options, pc_type="jacobi"))
    b, c, b_bar, x0_bar, out = (vector(A, seed) for seed in range(5))
    # The residual is zero at once.
    b.zeroEntries()
    A_bar, (A_dot, _) = OperatorCotangent(A), direction(A, 1)
    unrolled.iterate(b, None, 5, out)
    assert out.norm() == 0
    unrolled.adjoint(
        b, None, 5, c, b_cotangent=b_bar, guess_cotangent=x0_bar, operator_cotangent=A_bar
    )
    unrolled.tangent(b, None, 5, out, b_tangent=c, operator_tangent=A_dot)
    # It is after one iteration.
    identity = A.duplicate()
    identity.zeroEntries()
    identity.shift(2.0)
    unrolled = UnrolledKSP(solver(identity, **options, pc_type="jacobi"))
    c.copy(b)
    for checkpoints in (None, 1):
        unrolled.checkpoints = checkpoints
        unrolled.iterate(b, None, 5, out)
        assert np.abs(2 * out.array - b.array).max() < 1e-14
        unrolled.adjoint(
            b, None, 5, c, b_cotangent=b_bar, guess_cotangent=x0_bar, operator_cotangent=A_bar
        )
        assert (
            np.isfinite(b_bar.norm())
            and np.isfinite(x0_bar.norm())
            and np.isfinite(A_bar.values).all()
        )


def test_refusals(matrices):
    A = matrices["unsymmetric"]
    with pytest.raises(
        ValueError,
        match=(
            "ksp_type minres has no unrolled .*: use one of bcgs, cg, chebyshev, fgmres, gmres,"
            " richardson"
        ),
    ):
        UnrolledKSP(solver(A, ksp_type="minres"))
    with pytest.raises(ValueError, match="checkpoints=0"):
        UnrolledKSP(solver(A, ksp_type="cg"), checkpoints=0)
    b, out = vector(A, 1), vector(A, 2)

    def refuses(text, **options):
        unrolled = UnrolledKSP(solver(A, **options))
        with pytest.raises(ValueError, match=text):
            unrolled.iterate(b, None, 2, out)

    refuses("set ksp_chebyshev_eigenvalues", ksp_type="chebyshev")
    refuses(
        "ksp_chebyshev_kind first",
        ksp_type="chebyshev",
        ksp_chebyshev_kind="fourth",
        ksp_chebyshev_eigenvalues="0.1,2.7",
    )
    refuses("ksp_orthogonalization cgs", ksp_type="gmres", ksp_orthogonalization="mgs")
    refuses("ksp_pc_side", ksp_type="bcgs", ksp_pc_side="right")
    refuses("self-scal", ksp_type="richardson", ksp_richardson_self_scale=None, pc_type="sor")
    refuses("knoll", ksp_type="cg", ksp_knoll=None)
    refuses(
        "there is a self-scaled richardson inside the preconditioner",
        ksp_type="fgmres",
        pc_type="ksp",
        ksp_ksp_type="richardson",
        ksp_ksp_richardson_self_scale=None,
    )
    refuses("pc_sor_diagonal_shift", ksp_type="gmres", pc_type="sor", pc_sor_diagonal_shift=0.1)
    # PETSc tells six digits of a number.
    ksp = solver(
        A, ksp_type="richardson", ksp_richardson_scale=0.6666666666666666, pc_type="jacobi"
    )
    UnrolledKSP(ksp).iterate(b, None, 4, out)
    assert difference(out.array, solve(ksp, b, None, 4).array) < 1e-13
    PETSc.Options(ksp.getOptionsPrefix()).delValue("ksp_richardson_scale")
    with pytest.raises(ValueError, match="ksp_richardson_scale"):
        UnrolledKSP(ksp).iterate(b, None, 4, out)
    UnrolledKSP(ksp, options={"ksp_richardson_scale": 2 / 3}).iterate(b, None, 4, out)
    assert difference(out.array, solve(ksp, b, None, 4).array) < 1e-13


def test_completed_iterations_of_chebyshev(matrices):
    A = matrices["symmetric"]
    ksp = solver(A, ksp_type="chebyshev", ksp_chebyshev_eigenvalues="0.1,2.7", pc_type="jacobi")
    unrolled = UnrolledKSP(ksp)
    b, out, x = (vector(A, seed) for seed in range(3))
    for max_it in (5, 1000):
        ksp.setTolerances(rtol=1e-4, max_it=max_it)
        ksp.solve(b, x)
        unrolled.iterate(b, None, unrolled.completed_iterations(), out)
        assert difference(out.array, x.array) < 1e-13


@pytest.mark.parametrize(
    "method, preconditioner",
    [("cg", "jacobi"), ("gmres-restarted", "ssor"), ("chebyshev", "pbjacobi")],
)
def test_nothing_is_left_behind(matrices, method, preconditioner):
    name, options = METHODS[method]
    A = matrices[name]
    unrolled = UnrolledKSP(solver(A, **options, **PRECONDITIONERS[preconditioner]), checkpoints=1)
    b, c, b_bar, out = (vector(A, seed) for seed in range(4))
    A_bar, (A_dot, _) = OperatorCotangent(A), direction(A, 1)

    def call():
        A_bar.zero()
        unrolled.adjoint(b, None, 5, c, b_cotangent=b_bar, operator_cotangent=A_bar)
        unrolled.iterate(b, None, 5, out)

    call()
    before = b_bar.array.copy(), A_bar.values.copy()
    # Something else in between.
    unrolled.adjoint(c, b, 8, b, b_cotangent=b_bar)
    unrolled.tangent(c, b, 6, out, b_tangent=b, operator_tangent=A_dot)
    call()
    gc.collect()
    vectors, objects = len(unrolled._restated.pool._free), len(gc.get_objects())
    for _ in range(1000):
        call()
    assert np.array_equal(before[0], b_bar.array) and np.array_equal(before[1], A_bar.values)
    assert len(unrolled._restated.pool._free) == vectors
    gc.collect()
    assert len(gc.get_objects()) <= objects + 50


@pytest.mark.parallel([1, 2])
def test_steepest_descent_is_a_ksp(matrices):
    A = matrices["symmetric"]
    norms = []
    for norm_type in ("preconditioned", "unpreconditioned"):
        ksp = solver(
            A,
            **METHODS["steepest-descent"][1],
            pc_type="jacobi",
            ksp_norm_type=norm_type,
            ksp_rtol=1e-6,
        )
        ksp.setConvergenceHistory()
        seen = []
        ksp.setMonitor(lambda ksp, iteration, norm, seen=seen: seen.append(norm))
        b, x = vector(A, 1), vector(A, 2)
        ksp.solve(b, x)
        assert ksp.getConvergedReason() == PETSc.KSP.ConvergedReason.CONVERGED_RTOL
        assert len(seen) == ksp.getIterationNumber() + 1 and np.array_equal(
            seen, ksp.getConvergenceHistory()
        )
        r = b - A * x
        if norm_type == "preconditioned":
            z = r.duplicate()
            ksp.getPC().apply(r, z)
            r = z
        assert abs(r.norm() - seen[-1]) < 1e-8 * seen[-1] + 1e-15 and seen[-1] <= 1e-6 * seen[0]
        norms.append(seen)
        # From where it was, and transposed.
        ksp.setInitialGuessNonzero(True)
        ksp.setTolerances(rtol=1e-2)
        before = x.copy()
        ksp.solve(b, x)
        assert (x - before).norm() < 1e-4 * x.norm()
        ksp.setInitialGuessNonzero(False)
        ksp.setTolerances(rtol=1e-30, max_it=5)
        ksp.solve(b, x)
        assert (
            ksp.getIterationNumber() == 5
            and ksp.getConvergedReason() == PETSc.KSP.ConvergedReason.DIVERGED_MAX_IT
        )
        ksp.solveTranspose(b, before)
        assert (x - before).norm() < 1e-12 * x.norm()
    assert norms[0] != norms[1]


@pytest.mark.parametrize("kind, side", [("gmres", "left"), ("gmres", "right"), ("fgmres", "right")])
def test_long_cycles_of_gmres_stay_accurate(kind, side):
    """Tangents of a basis must not grow from vector to vector, and rounding errors with them."""
    mesh = UnitSquareMesh(24, 24)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    kappa = Function(FunctionSpace(mesh, "DG", 0))
    kappa.dat.data[:] = np.exp(0.5 * np.random.default_rng(1).standard_normal(kappa.dat.data.size))
    conditions = DirichletBC(V, 0, "on_boundary")
    A = assemble(kappa * inner(grad(w), grad(v)) * dx, bcs=conditions).petscmat
    A_dot = A.duplicate(copy=False)
    A_dot.axpy(
        1.0,
        assemble(inner(grad(w), grad(v)) * dx, bcs=conditions, weight=0.0).petscmat,
        structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN,
    )
    direct, b = solver(A, ksp_type="preonly", pc_type="lu"), vector(A, 1)
    u, right, expected, found = (b.duplicate() for _ in range(4))
    direct.solve(b, u)
    A_dot.mult(u, right)
    direct.solve(-right, expected)
    ksp = solver(A, ksp_type=kind, pc_type="jacobi", ksp_gmres_restart=400, ksp_pc_side=side)
    UnrolledKSP(ksp).tangent(b, None, 150, found, operator_tangent=A_dot)
    assert difference(found.array, expected.array) < 1e-10
