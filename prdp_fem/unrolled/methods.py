"""Krylov methods and stationary ones as PETSc has them, each a short program in an arithmetic.

A method is registered by the type of KSP that it states again, and its ``of(found)`` makes it as
that is set. It has a state, a tuple of vectors and scalars (None where there is none yet), and

- ``initial(on, b, guess)``, the state before the first iteration; a guess of None is zero;
- ``steps(iterations)``, into which it divides so many iterations: single ones, or the cycles
  between restarts;
- ``advance(on, state, iterations)``, the state after one such step, or the same one (not a copy)
  where PETSc's iteration ends with what it has, since it broke down or has nothing left to do;
- ``solution(on, state)``, the iterate;
- ``is_linear``, whether that is linear in b and the guess;
- ``counts_unfinished``, whether PETSc counts the iteration in which it finds itself done.

``on`` is the arithmetic: see :class:`prdp_fem.unrolled.values.Values`. The recursions, and in which
order they are evaluated, are those of PETSc's sources in src/ksp/ksp/impls, named at each.
"""

from __future__ import annotations

from firedrake.petsc import PETSc

from prdp_fem.krylov.petsc_types import pc_facts
from prdp_fem.krylov.view import found_in
from prdp_fem.unrolled.registry import KSPAsSet, unrolled_methods
from prdp_fem.unrolled.steepest_descent import SteepestDescent

__all__ = [
    "BiCGStab",
    "Chebyshev",
    "ConjugateGradients",
    "FGMRES",
    "GMRES",
    "Iteration",
    "Richardson",
    "SelfScaledRichardson",
    "SteepestDescentIteration",
]

# Below it PETSc takes the next vector of a Krylov basis for zero (haptol in gmres.c).
_HAPPY_BREAKDOWN = 1e-30


def _residual(on, b, x):
    return b if x is None else on.add(b, -1.0, on.operator(x))


class Iteration:
    """A method whose steps are single iterations, and whose iterate is first in its state."""

    is_linear = False
    counts_unfinished = False

    @classmethod
    def of(cls, found: KSPAsSet) -> Iteration:
        """The method of a KSP, as that is set."""
        return cls()

    def steps(self, iterations: int) -> list[int]:
        return [1] * iterations

    def solution(self, on, state):
        return state[0]


@unrolled_methods("richardson", "any scale, and self-scaled")
class Richardson(Iteration):
    """x ← x + s B (b - A x), in rich.c.

    Parameters
    ----------
    scale : float
    """

    is_linear = True

    def __init__(self, scale: float):
        self.scale = scale

    @classmethod
    def of(cls, found):
        kind = found.ksp.getPC().getType()
        does_own = pc_facts(kind).does_own_richardson
        if "self-scale" in found.text:
            if does_own:
                raise ValueError(
                    f"with pc_type {kind} PETSc does not heed ksp_richardson_self_scale unless "
                    "there is a monitor: self-scaled Richardson iterations are unrolled for other "
                    "preconditioners only"
                )
            return SelfScaledRichardson()
        scale = found.number(r"damping factor=(\S+)", "ksp_richardson_scale")
        A, P = found.ksp.getOperators()
        if scale == 1 and does_own and A.handle != P.handle:
            raise ValueError(
                f"with pc_type {kind} and a ksp_richardson_scale of 1 PETSc iterates "
                "with the matrix that the preconditioner is made from, instead of the "
                "operator: this is unrolled only where they are the same"
            )
        return cls(scale)

    def initial(self, on, b, guess):
        return guess, b

    def advance(self, on, state, iterations):
        x, b = state
        return on.add(x, self.scale, on.precondition(_residual(on, b, x))), b


class SelfScaledRichardson(Iteration):
    """Richardson's iteration whose step makes the next preconditioned residual least, in rich.c."""

    def initial(self, on, b, guess):
        return guess, on.precondition(_residual(on, b, guess))

    def advance(self, on, state, iterations):
        x, z = state
        y = on.precondition(on.operator(z))
        squared = on.dot(y, y)
        if float(squared) == 0:
            return state
        scale = on.dot(z, y) / squared
        return on.add(x, scale, z), on.add(z, -scale, y)


@unrolled_methods("chebyshev", "with `ksp_chebyshev_eigenvalues`")
class Chebyshev(Iteration):
    """Chebyshev's iteration with polynomials of the first kind, in cheby.c.

    Parameters
    ----------
    smallest, largest : float
        The bounds of the eigenvalues of B A that it is made for, constants.
    """

    is_linear = True
    counts_unfinished = True

    def __init__(self, smallest: float, largest: float):
        self.scale = 2 / (largest + smallest)
        self.mu = 1 / (1 - self.scale * smallest)

    @classmethod
    def of(cls, found):
        kind = found_in(found.text, r"polynomial of (.*) kind")[1]
        if kind != "first":
            raise ValueError(
                f"Chebyshev polynomials of the {kind} kind have no unrolled "
                "derivative: use ksp_chebyshev_kind first"
            )
        if "estimated" in found.text:
            raise ValueError(
                "unrolled differentiation must know the bounds of the eigenvalues "
                "that Chebyshev's iteration uses, and PETSc does not tell what it has "
                "estimated: set ksp_chebyshev_eigenvalues smallest,largest"
            )
        return cls(
            *found.numbers(r"targets used: min (\S+), max (\S+)", "ksp_chebyshev_eigenvalues")
        )

    def initial(self, on, b, guess):
        return guess, None, b, None, None

    def advance(self, on, state, iterations):
        x, previous, b, c, c_previous = state
        z = on.precondition(_residual(on, b, x))
        if c is None:
            return on.add(x, self.scale, z), x, b, self.mu, 1.0
        c_next = 2 * self.mu * c - c_previous
        omega = 2 * self.mu * c / c_next
        terms = () if previous is None else (1 - omega, previous)
        return on.add(None, omega, x, omega * self.scale, z, *terms), x, b, c_next, c


@unrolled_methods("cg")
class ConjugateGradients(Iteration):
    """Hestenes and Stiefel's conjugate gradients, in cg.c."""

    def initial(self, on, b, guess):
        return guess, _residual(on, b, guess), None, None, None

    def advance(self, on, state, iterations):
        x, r, p_previous, rho_previous, curvature_previous = state
        z = on.precondition(r)
        rho = on.dot(z, r)
        if float(rho) == 0 or (p_previous is not None and float(rho) * float(rho_previous) < 0):
            return state
        p = z if p_previous is None else on.add(z, rho / rho_previous, p_previous)
        w = on.operator(p)
        curvature = on.dot(p, w)
        if float(curvature) == 0:
            return state
        if curvature_previous is not None and float(curvature) * float(curvature_previous) < 0:
            return state
        alpha = rho / curvature
        return on.add(x, alpha, p), on.add(r, -alpha, w), p, rho, float(curvature)


@unrolled_methods(SteepestDescent, name="prdp_fem.SteepestDescent")
class SteepestDescentIteration(Iteration):
    """Steepest descent with exact line search: :class:`prdp_fem.unrolled.SteepestDescent`."""

    def initial(self, on, b, guess):
        return guess, _residual(on, b, guess)

    def advance(self, on, state, iterations):
        x, r = state
        z = on.precondition(r)
        w = on.operator(z)
        curvature = on.dot(z, w)
        if float(curvature) == 0:
            return state
        alpha = on.dot(z, r) / curvature
        return on.add(x, alpha, z), on.add(r, -alpha, w)


@unrolled_methods("bcgs")
class BiCGStab(Iteration):
    """Van der Vorst's stabilised bi-conjugate gradients, with B from the left, in bcgs.c."""

    @classmethod
    def of(cls, found):
        if found.ksp.getPCSide() != PETSc.PC.Side.LEFT:
            raise ValueError(
                "bcgs with ksp_pc_side right may add the guess of an earlier solve: "
                "use ksp_pc_side left, or gmres"
            )
        return cls()

    def initial(self, on, b, guess):
        r = on.precondition(_residual(on, b, guess))
        return guess, r, r, None, None, None, None, None

    def advance(self, on, state, iterations):
        x, r, shadow, p, v, rho_previous, alpha, omega = state
        rho = on.dot(r, shadow)
        if p is None:
            p = r
        else:
            if float(rho_previous) == 0 or float(omega) == 0:
                return state
            beta = (rho / rho_previous) * (alpha / omega)
            p = on.add(r, -omega * beta, v, beta, p)
        v = on.precondition(on.operator(p))
        against_shadow = on.dot(v, shadow)
        if float(against_shadow) == 0:
            return state
        alpha = rho / against_shadow
        s = on.add(r, -alpha, v)
        t = on.precondition(on.operator(s))
        squared = on.dot(t, t)
        if float(squared) == 0:
            # There is nothing left to do, or nothing that can be done.
            return (on.add(x, alpha, p), s, *state[2:]) if float(on.dot(s, s)) == 0 else state
        omega = on.dot(s, t) / squared
        return on.add(x, alpha, p, omega, s), on.add(s, -omega, t), shadow, p, v, rho, alpha, omega


@unrolled_methods("gmres", "with restarts")
class GMRES:
    """Saad and Schultz's generalised minimal residual method, in gmres.c.

    Its basis is made by classical Gram-Schmidt orthogonalisation. The iterate depends on the space
    that the basis spans, and not on the basis: with any other numbers in the place of the products
    and norms that each next vector is made with, the least residual would be the same. So they are
    not differentiated.

    Parameters
    ----------
    restart : int
    right : bool
        Whether it solves A B u = b with x = B u, rather than B A x = B b.
    """

    is_linear = False
    counts_unfinished = False

    def __init__(self, restart: int, right: bool):
        self.restart = restart
        self.right = right

    @classmethod
    def of(cls, found):
        return cls(_restart(found), found.ksp.getPCSide() == PETSc.PC.Side.RIGHT)

    def steps(self, iterations):
        cycles, rest = divmod(iterations, self.restart)
        return [self.restart] * cycles + [rest] * (rest > 0)

    def initial(self, on, b, guess):
        return guess, b

    def advance(self, on, state, iterations):
        x, b = state
        r = _residual(on, b, x)
        if not self.right:
            r = on.precondition(r)
        v, first = on.orthonormalised(r, [])
        if first.norm == 0:
            return state
        basis = [v]
        directions: list = []
        columns = []
        for _ in range(iterations):
            v, column = on.orthonormalised(self.next_vector(on, v, directions), basis)
            basis.append(v)
            columns.append(column)
            if column.norm < _HAPPY_BREAKDOWN:
                break
        y = on.minimiser(first, columns, basis)
        return self.update(on, x, y, basis[:-1], directions), b

    def next_vector(self, on, v, directions):
        return on.operator(on.precondition(v)) if self.right else on.precondition(on.operator(v))

    def update(self, on, x, y, basis, directions):
        if not self.right:
            return on.combine(x, y, *basis)
        z = on.precondition(on.combine(None, y, *basis))
        return z if x is None else on.add(x, 1.0, z)

    def solution(self, on, state):
        return state[0]


@unrolled_methods("fgmres", "with restarts")
class FGMRES(GMRES):
    """Saad's flexible GMRES, in fgmres.c: it keeps the preconditioned basis.

    Parameters
    ----------
    restart : int
    """

    def __init__(self, restart: int):
        super().__init__(restart, right=True)

    @classmethod
    def of(cls, found):
        return cls(_restart(found))

    def next_vector(self, on, v, directions):
        directions.append(on.precondition(v))
        return on.operator(directions[-1])

    def update(self, on, x, y, basis, directions):
        return on.combine(x, y, *directions)


def _restart(found: KSPAsSet) -> int:
    """How many iterations of (F)GMRES there are between restarts."""
    if "classical" not in found.text or "no iterative refinement" not in found.text:
        raise ValueError(
            f"{found.ksp.getType()} is unrolled with PETSc's default orthogonalisation only: set "
            "ksp_orthogonalization cgs, without refinement"
        )
    return int(found_in(found.text, r"restart=(\d+)")[1])
