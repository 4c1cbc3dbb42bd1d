"""The heat step in JAX: as the paper's code does it, and as sparse as JAX can have it."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from heat_step import (
    BETAS,
    COUPLING,
    DIAGONAL,
    EPSILON,
    ITERATIONS,
    LEARNING_RATE,
    LEVELS,
    NODES,
    UNKNOWNS,
    batches,
    initial_weights,
    matrix,
    processor_time,
    training_data,
)
from jax.experimental.sparse import BCOO

# Solvers
# -------
# Each is a function of a batch of right-hand sides and of a number of iterations.

Solver = Callable[[jax.Array, int], jax.Array]


def dense_unrolled(precision: str) -> Solver:
    """The paper's way: a scan over products with the dense matrix, without its diagonal, for one
    sample; vmap; JAX's own derivative.

    The matrix is a constant of what is compiled, and all iterates are stacked, of which the last is
    wanted.
    """
    A = jnp.asarray(matrix(), precision)

    def solve(b, iterations):
        def sweep(u, _):
            u = (b - (jnp.tril(A, -1) + jnp.triu(A, 1)) @ u) / jnp.diag(A)
            return u, u

        return jax.lax.scan(sweep, jnp.zeros_like(b), length=iterations)[1][-1]

    return jax.vmap(solve, in_axes=(0, None))


@dataclass
class Operator:
    """What the neighbours of each unknown have to do with it, on batches in the layout that is
    quickest.
    """

    into: Callable[[jax.Array], jax.Array]
    out: Callable[[jax.Array], jax.Array]
    neighbours: Callable[[jax.Array], jax.Array]

    def iterate(self, sweeps: Callable, b: jax.Array) -> jax.Array:
        """Jacobi iterations; ``sweeps`` repeats a function of the iterate, from a start."""
        b = self.into(b)
        return self.out(sweeps(lambda u: (b + self.neighbours(u)) / DIAGONAL, jnp.zeros_like(b)))


def neighbours_matrix(precision: str) -> jax.Array:
    A = jnp.asarray(matrix(), precision)
    return jnp.diag(jnp.diag(A)) - A


def dense(precision: str) -> Operator:
    """A dense matrix, with the batch along the last axis."""
    N = neighbours_matrix(precision)
    return Operator(jnp.transpose, jnp.transpose, lambda u: N @ u)


def bcoo(precision: str) -> Operator:
    """A sparse matrix of jax.experimental.sparse, with the batch along the last axis. Its BCSR
    takes about as long.
    """
    N = BCOO.fromdense(neighbours_matrix(precision))
    return Operator(jnp.transpose, jnp.transpose, lambda u: N @ u)


def stencil(precision: str) -> Operator:
    """Written by hand for this grid: fields shifted by one, with zeros coming in.

    Of a dozen ways that were tried (padding and slicing, rolling, convolving, small matrices, the
    batch first or last, unrolling the loop by two to twenty) none was clearly faster than this one
    in both precisions and with both derivatives.
    """

    def shifted(u, axis, by):
        return jax.lax.pad(
            u, jnp.zeros((), u.dtype), [(by, -by, 0) if k == axis else (0, 0, 0) for k in range(3)]
        )

    def neighbours(u):
        return COUPLING * (
            shifted(u, 1, 1) + shifted(u, 1, -1) + shifted(u, 2, 1) + shifted(u, 2, -1)
        )

    return Operator(
        lambda b: b.reshape(-1, NODES, NODES), lambda u: u.reshape(-1, UNKNOWNS), neighbours
    )


def unrolled(operator: Operator) -> Solver:
    """JAX's derivative of a scan: the number of iterations must be known when it is compiled."""

    def solve(b, iterations):
        return operator.iterate(
            lambda sweep, start: jax.lax.scan(
                lambda u, _: (sweep(u), None), start, length=iterations
            )[0],
            b,
        )

    return solve


def implicit(operator: Operator) -> Solver:
    """The implicit derivative: the same iterations for the adjoint, whose operator is the same.
    Their number may be an argument.
    """

    @jax.custom_vjp
    def solve(b, iterations):
        return operator.iterate(
            lambda sweep, start: jax.lax.fori_loop(0, iterations, lambda _, u: sweep(u), start), b
        )

    solve.defvjp(
        lambda b, iterations: (solve(b, iterations), iterations),
        lambda iterations, cotangent: (solve(cotangent, iterations), None),
    )
    return solve


SOLVERS: dict[str, Callable[[str], Solver]] = {
    "dense, unrolled": dense_unrolled,
    "dense, implicit": lambda precision: implicit(dense(precision)),
    "BCOO, unrolled": lambda precision: unrolled(bcoo(precision)),
    "BCOO, implicit": lambda precision: implicit(bcoo(precision)),
    "stencil, unrolled": lambda precision: unrolled(stencil(precision)),
    "stencil, implicit": lambda precision: implicit(stencil(precision)),
}


def contestant(name: str, samples, precision: str) -> Callable:
    """A function that takes a batch, by its number, forward and backward; compiled."""
    solve = SOLVERS[name](precision)
    samples = jnp.asarray(samples, precision)

    @jax.jit
    def forward_and_backward(b):
        u, pull_back = jax.vjp(lambda b: solve(b, ITERATIONS), b)
        return u, pull_back(u)[0]

    return lambda batch: jax.block_until_ready(forward_and_backward(samples[batch]))


# Training
# --------


def train(name: str, precision: str, epochs_per_level: int) -> dict:
    """A training run, with the time that compiling takes.

    Where the number of iterations may be an argument, everything is compiled once; else again at
    each level.
    """
    solve = SOLVERS[name](precision)
    compiled_once = name.endswith("implicit")
    initial, target = (jnp.asarray(array) for array in training_data(precision))
    weights = [jnp.asarray(array) for array in initial_weights(precision)]
    state = (
        weights,
        [jnp.zeros_like(w) for w in weights],
        [jnp.zeros_like(w) for w in weights],
        jnp.asarray(0, precision),
    )

    def loss(weights, rows, iterations):
        W1, b1, W2, b2 = weights
        prediction = jax.nn.relu(initial[rows] @ W1 + b1) @ W2 + b2
        return jnp.mean((solve(prediction, iterations) - target[rows]) ** 2)

    def update(state, rows, iterations):
        weights, first, second, count = state
        value, gradients = jax.value_and_grad(loss)(weights, rows, iterations)
        count = count + 1
        first = [BETAS[0] * m + (1 - BETAS[0]) * g for m, g in zip(first, gradients)]
        second = [BETAS[1] * v + (1 - BETAS[1]) * g**2 for v, g in zip(second, gradients)]
        weights = [
            w
            - LEARNING_RATE
            * (m / (1 - BETAS[0] ** count))
            / (jnp.sqrt(v / (1 - BETAS[1] ** count)) + EPSILON)
            for w, m, v in zip(weights, first, second)
        ]
        return (weights, first, second, count), value

    def compile_for(iterations):
        start = processor_time()
        argument = jnp.asarray(iterations) if compiled_once else iterations
        step = (
            jax.jit(update, static_argnums=() if compiled_once else 2)
            .lower(state, jnp.asarray(order[0][0]), argument)
            .compile()
        )
        return step, processor_time() - start

    order = batches(LEVELS * epochs_per_level)
    compiling = 0.0
    losses = []
    step = None
    start = processor_time()
    for epoch, rows_of_batches in enumerate(order):
        iterations = 1 + epoch // epochs_per_level
        if step is None or (epoch % epochs_per_level == 0 and not compiled_once):
            step, seconds = compile_for(iterations)
            compiling += seconds
        values = []
        for rows in rows_of_batches:
            state, value = (
                step(state, rows, jnp.asarray(iterations)) if compiled_once else step(state, rows)
            )
            values.append(value)
        losses.append(sum(map(float, values)) / len(values))
    return {
        "compiling": compiling,
        "training": processor_time() - start - compiling,
        "losses": losses,
    }
