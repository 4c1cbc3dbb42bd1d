"""Krylov methods and stationary ones as PETSc has them, each a short program in an arithmetic.

A method has a state, a tuple of vectors and scalars (None where there is none yet), and

- ``initial(on, b, guess)``, the state before the first iteration; a guess of None is zero;
- ``steps(iterations)``, into which it divides so many iterations: single ones, or the cycles between restarts;
- ``advance(on, state, iterations)``, the state after one such step, or the same one (not a copy) where PETSc's iteration ends
  with what it has, since it broke down or has nothing left to do;
- ``solution(on, state)``, the iterate;
- ``is_linear``, whether that is linear in b and the guess.

``on`` is the arithmetic: see :class:`prdp_fem.unrolled.values.Values`. The recursions, and in which order they are evaluated, are those
of PETSc's sources in src/ksp/ksp/impls, named at each.
"""
from __future__ import annotations

__all__ = ["BiCGStab", "Chebyshev", "ConjugateGradients", "FGMRES", "GMRES", "Richardson", "SelfScaledRichardson",
           "SteepestDescentIteration"]

# Below it PETSc takes the next vector of a Krylov basis for zero (haptol in gmres.c).
_HAPPY_BREAKDOWN = 1e-30


def _residual(on, b, x):
    return b if x is None else on.add(b, -1.0, on.operator(x))


class _Iteration:
    """A method whose steps are single iterations, and whose iterate is the first part of its state."""

    is_linear = False

    def steps(self, iterations: int) -> list[int]:
        return [1]*iterations

    def solution(self, on, state):
        return state[0]


class Richardson(_Iteration):
    """x ← x + s B (b - A x), in rich.c.

    Parameters
    ----------
    scale : float
    """

    is_linear = True

    def __init__(self, scale: float):
        self.scale = scale

    def initial(self, on, b, guess):
        return guess, b

    def advance(self, on, state, iterations):
        x, b = state
        return on.add(x, self.scale, on.precondition(_residual(on, b, x))), b


class SelfScaledRichardson(_Iteration):
    """Richardson's iteration with the step that makes the next preconditioned residual least, in rich.c."""

    def initial(self, on, b, guess):
        return guess, on.precondition(_residual(on, b, guess))

    def advance(self, on, state, iterations):
        x, z = state
        y = on.precondition(on.operator(z))
        squared = on.dot(y, y)
        if float(squared) == 0:
            return state
        scale = on.dot(z, y)/squared
        return on.add(x, scale, z), on.add(z, -scale, y)


class Chebyshev(_Iteration):
    """Chebyshev's iteration with polynomials of the first kind, in cheby.c.

    Parameters
    ----------
    smallest, largest : float
        The bounds of the eigenvalues of B A that it is made for, constants.
    """

    is_linear = True

    def __init__(self, smallest: float, largest: float):
        self.scale = 2/(largest + smallest)
        self.mu = 1/(1 - self.scale*smallest)

    def initial(self, on, b, guess):
        return guess, None, b, None, None

    def advance(self, on, state, iterations):
        x, previous, b, c, c_previous = state
        z = on.precondition(_residual(on, b, x))
        if c is None:
            return on.add(x, self.scale, z), x, b, self.mu, 1.0
        c_next = 2*self.mu*c - c_previous
        omega = 2*self.mu*c/c_next
        terms = () if previous is None else (1 - omega, previous)
        return on.add(None, omega, x, omega*self.scale, z, *terms), x, b, c_next, c


class ConjugateGradients(_Iteration):
    """Hestenes and Stiefel's conjugate gradients, in cg.c."""

    def initial(self, on, b, guess):
        return guess, _residual(on, b, guess), None, None, None

    def advance(self, on, state, iterations):
        x, r, p_previous, rho_previous, curvature_previous = state
        z = on.precondition(r)
        rho = on.dot(z, r)
        if float(rho) == 0 or (p_previous is not None and float(rho)*float(rho_previous) < 0):
            return state
        p = z if p_previous is None else on.add(z, rho/rho_previous, p_previous)
        w = on.operator(p)
        curvature = on.dot(p, w)
        if float(curvature) == 0 or (curvature_previous is not None and float(curvature)*float(curvature_previous) < 0):
            return state
        alpha = rho/curvature
        return on.add(x, alpha, p), on.add(r, -alpha, w), p, rho, float(curvature)


class SteepestDescentIteration(_Iteration):
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
        alpha = on.dot(z, r)/curvature
        return on.add(x, alpha, z), on.add(r, -alpha, w)


class BiCGStab(_Iteration):
    """Van der Vorst's stabilised bi-conjugate gradients, preconditioned from the left, in bcgs.c."""

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
            beta = (rho/rho_previous)*(alpha/omega)
            p = on.add(r, -omega*beta, v, beta, p)
        v = on.precondition(on.operator(p))
        against_shadow = on.dot(v, shadow)
        if float(against_shadow) == 0:
            return state
        alpha = rho/against_shadow
        s = on.add(r, -alpha, v)
        t = on.precondition(on.operator(s))
        squared = on.dot(t, t)
        if float(squared) == 0:
            # There is nothing left to do, or nothing that can be done.
            return (on.add(x, alpha, p), s, *state[2:]) if float(on.dot(s, s)) == 0 else state
        omega = on.dot(s, t)/squared
        return on.add(x, alpha, p, omega, s), on.add(s, -omega, t), shadow, p, v, rho, alpha, omega


class GMRES:
    """Saad and Schultz's generalised minimal residual method with classical Gram-Schmidt orthogonalisation, in gmres.c.

    Its iterate depends on the space that the basis spans, and not on the basis: with any other numbers in the place of the products and
    norms that each next vector is made with, the least residual would be the same. So they are not differentiated.

    Parameters
    ----------
    restart : int
    right : bool
        Whether it solves A B u = b with x = B u, rather than B A x = B b.
    """

    is_linear = False

    def __init__(self, restart: int, right: bool):
        self.restart, self.right = restart, right

    def steps(self, iterations):
        cycles, rest = divmod(iterations, self.restart)
        return [self.restart]*cycles + [rest]*(rest > 0)

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
        basis, directions, columns = [v], [], []
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


class FGMRES(GMRES):
    """Saad's flexible GMRES, in fgmres.c: it keeps the preconditioned basis.

    Parameters
    ----------
    restart : int
    """

    def __init__(self, restart: int):
        super().__init__(restart, right=True)

    def next_vector(self, on, v, directions):
        directions.append(on.precondition(v))
        return on.operator(directions[-1])

    def update(self, on, x, y, basis, directions):
        return on.combine(x, y, *directions)
