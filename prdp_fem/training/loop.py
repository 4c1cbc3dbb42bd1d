"""The training loop: epochs of batches, a validation after each, and a refinement that is told its
result.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, cast

import torch
from firedrake import Ensemble
from mpi4py import MPI
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from prdp_fem.history import ASSESSED, Account, History, assessed_at
from prdp_fem.ranks.agreement import agree, from_first_rank
from prdp_fem.refinement.rules import Refinement, checked_metric
from prdp_fem.solvers import RefinedSolver
from prdp_fem.torch.layer import SolverLayer
from prdp_fem.training.guard import Guard, checked_mode
from prdp_fem.training.reduction import GradientReduction, check_replicas
from prdp_fem.training.sampling import EnsembleSampler

__all__ = ["train"]


def train(
    network: torch.nn.Module,
    loss: Callable[[torch.Tensor], torch.Tensor],
    validate: Callable[[], float],
    *,
    optimiser: torch.optim.Optimizer,
    refinement: Refinement,
    solvers: Iterable,
    samples: int,
    batch_size: int,
    epochs: int,
    seed: int = 0,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    assess: Mapping[str, Callable[[], float]] | None = None,
    assess_every: int | None = None,
    comm: MPI.Comm = MPI.COMM_SELF,
    ensemble: Ensemble | None = None,
    guard: str | None = "warn",
    label: str = "training",
    progress: bool = True,
) -> History:
    """Train a network, and refine the physics that it is trained through.

    After each epoch the validation metric is recorded, and handed to ``refinement``, which the
    solvers inside ``loss`` and ``validate`` follow. The order of the samples depends on ``seed``
    only, so that runs under different refinements see the same batches.

    In parallel each rank holds the whole network and computes its part of the loss, and the parts
    of the gradient are added up. Ranks can share the unknowns of each sample (``comm``), and groups
    of them the samples of each batch, too (``ensemble``). The result is that of one rank, up to the
    order in which numbers are added.

    Parameters
    ----------
    network : torch.nn.Module
        Whose parameters are trained; equal on all ranks. What ``requires_grad`` says of them at a
        batch holds at that batch; what is frozen, and what the loss does not depend on, stays as it
        is. It is put into the modes of ``network.train()`` before an epoch and ``network.eval()``
        before ``validate``.
    loss : callable
        From sample numbers (a tensor of integers, shape (batch,)) to this rank's part of the loss:
        the sum over the ranks that share the unknowns is the loss. A functional that a solver layer
        returns is whole on each rank, and counts once: it is not divided. What all ranks have alike
        goes to a layer by :func:`~prdp_fem.torch.shared`. With an ensemble the loss must be a mean
        over the samples, and not be collective on all ranks: a member without samples, of a batch
        that is smaller than the ensemble, does not call it.
    validate : callable
        Returns the metric, finite and not negative; lower is better. That of rank 0 counts. Called
        without gradients, at the physics of the epoch; and by the guard, and by rules that compare,
        once more with others, so it has to find the same again.
    optimiser : torch.optim.Optimizer
        One whose step needs a closure, such as LBFGS, is given one for each batch. Its hooks are
        those of a plain loop: one that ``optimiser.register_step_pre_hook`` takes can look at
        gradients, or clip them (but not where the step has a closure, which makes them later), and
        one that ``register_step_post_hook`` takes can average weights, as by
        ``torch.optim.swa_utils.AveragedModel``.
    refinement : Refinement
    solvers : iterable of LinearVariationalSolver or NonlinearVariationalSolver
        Whose iterations and seconds are counted; they follow the refinement.
    samples : int
        Number of training samples.
    batch_size : int
        Samples for each step of the optimiser.
    epochs : int
    seed : int
        Of the order of the samples.
    scheduler : torch.optim.lr_scheduler.LRScheduler or None
        Called after each epoch; one that needs the metric, such as ReduceLROnPlateau, with that.
        One to be called after each batch goes into a hook of ``optimiser.register_step_post_hook``.
    assess : mapping of str to callable, or None
        What is measured beside, as errors go into the history: ``"in_use"``, the error of what is
        used in the end, such as the network alone, and ``"converged"``, that with converged
        physics. They are called as ``validate`` is; what they take, and what the solvers do for
        them, is not counted. That of rank 0 counts.
    assess_every : int or None
        Epochs from one such measurement to the next; None for 15 to 30 of them in a long training.
        There is one after the last epoch in any case.
    comm : mpi4py.MPI.Comm
        The ranks that share the samples' unknowns; left aside where there is an ensemble.
    ensemble : firedrake.Ensemble or None
        Its members deal the samples of each batch out among them; the ranks of a member share the
        unknowns.
    guard : str or None
        What becomes of a metric that is another one with converged physics, by more than 5 %:
        ``"warn"`` says so, once and at the end, in a warning and in ``history.warnings``;
        ``"error"`` raises it, at the end, or as soon as the refinement has stopped; None does not
        look. It takes at most 3 % of the run's iterations, which ``history.guard_iterations``
        counts, and nothing else does. It also says where a refinement has stopped while residuals
        are large, where learning rates have fallen while physics are coarse, and where levels climb
        beyond the floor of rounding.
    label : str
        What the progress bar says.
    progress : bool
        Whether rank 0 shows a progress bar.

    Returns
    -------
    History

    Raises
    ------
    TypeError, ValueError
        Before any work for arguments of another kind, counts below one, a network without
        parameters, an optimiser that has others, a mesh on other ranks, a solver that follows
        another refinement, a scheduler of another optimiser, or one that ends before the epochs do,
        an optimiser whose steps torch would refuse, one that takes a closure on several ranks that
        share the unknowns, and layers that take statistics of batches in an ensemble; where ranks
        have different networks.
    ValueError
        Where the loss or a gradient is not finite, with weights and the optimiser's state as before
        that batch; where weights are not after an epoch, and where the metric is no number,
        negative or not finite: training has diverged.

    CoarsePhysicsWarning
        Where ``guard="error"``, and metrics differ. Its attribute ``history`` is the History.

    Warns
    -----
    CoarsePhysicsWarning
        See ``guard``.
    UserWarning
        Where no solver follows the refinement, or a solver none, and on several ranks where
        parameters have hooks.

    Notes
    -----
    On several ranks hooks of parameters (``register_hook``,
    ``register_post_accumulate_grad_hook``) see a rank's part of a gradient, and those of the
    optimiser's steps the whole: see :class:`~prdp_fem.torch.GradientReduction`, which is for other
    loops, too, such as those in which a ``torch.amp.GradScaler`` leaves steps out.

    How fast a difference by rounding grows is up to the optimiser: LBFGS on batches made 1e-2 of
    1e-15 within six steps, on one rank as between numbers of ranks.
    """
    members = MPI.COMM_SELF
    if not isinstance(comm, MPI.Comm):
        raise TypeError(f"comm must be a communicator of mpi4py, such as mesh.comm, found {comm!r}")
    if ensemble is not None:
        if not isinstance(ensemble, Ensemble):
            raise TypeError(f"ensemble must be a firedrake.Ensemble, found {ensemble!r}")
        comm, members = ensemble.global_comm, ensemble.ensemble_comm
    sharing = comm if ensemble is None else ensemble.comm

    def alike() -> tuple:
        _check_arguments(network, loss, validate, optimiser, refinement, scheduler)
        _check_count("epochs", epochs)
        assessed = _check_assessments(assess, assess_every)
        _check_solvers(solvers, refinement, sharing)
        _check_optimiser(network, optimiser, comm, sharing)
        _check_scheduler(optimiser, scheduler, epochs)
        checked_mode(guard)
        return (
            epochs,
            assessed,
            guard,
            samples,
            batch_size,
            seed,
            refinement.level,
            refinement.setting,
        )

    solvers = list(solvers) if isinstance(solvers, Iterable) else solvers
    agree(comm, alike, "epochs, samples, batch sizes, seeds, guards and levels of refinement")
    if comm.rank == 0:
        _warn_of_what_is_not_refined(network, solvers, refinement)
    sampler = EnsembleSampler(samples, batch_size, seed=seed, ensemble=ensemble)
    history, account = History(), Account(solvers, comm, members)
    inside = [layer.solver for layer in network.modules() if isinstance(layer, SolverLayer)]
    watched = list({id(solver): solver for solver in [*solvers, *inside]}.values())
    watch = Guard(guard, validate, refinement, watched, optimiser, history, account)
    watch.keeps_metrics = "converged" not in (assess or {})
    bar = tqdm(
        range(epochs),
        desc=label,
        unit="epoch",
        mininterval=0.5,
        disable=not progress or comm.rank > 0,
    )
    with _Steps(network, loss, optimiser, comm) as steps:
        check_replicas(network, optimiser, comm)
        for _ in bar:
            network.train()
            agree(members, partial(_check_statistics, network, members), "layers of the network")
            for batch, share in sampler:
                steps.step(batch, share)
            check_replicas(network, optimiser, comm)
            steps.check_weights()
            network.eval()
            with torch.no_grad():
                found = watch.validate()
                # Those of ranks may differ by rounding, and decisions must not.
                metric = from_first_rank(comm, partial(checked_metric, found))
                result = refinement.told(metric, validate)
                history.record(metric, refinement, account)
                watch.look(metric, epochs)
                if assess and assessed_at(len(history), epochs, assess_every):
                    history.assess(assess, account)
            refinement.step(result)
            if scheduler is not None:
                told: Any = [metric] if _required(scheduler.step) else []
                scheduler.step(*told)
            bar.set_postfix(
                metric=f"{metric:.3e}",
                level=refinement.level,
                physics=refinement.setting,
                refresh=False,
            )
    return history


class _Steps:
    """Steps of an optimiser, each from finite gradients or not at all.

    Parameters
    ----------
    network, loss, optimiser, comm
        As in :func:`train`; ``comm`` has all ranks.

    Raises
    ------
    ValueError
        For a network without parameters to train, and for an optimiser that has others.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        loss: Callable,
        optimiser: torch.optim.Optimizer,
        comm: MPI.Comm,
    ):
        self._network = network
        self._loss = loss
        self._optimiser = optimiser
        self._comm = comm
        self._takes_closure = bool(_required(type(optimiser).step, leave=1))
        self._known: list[int] = []
        agree(comm, self._check_parameters, "parameters of the network and the optimiser")
        # On one rank there is nothing to add up, and this is a plain loop.
        self._reduction = GradientReduction(network, comm) if comm.size > 1 else None

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *error) -> None:
        if self._reduction is not None:
            self._reduction.__exit__(*error)

    def _check_parameters(self) -> None:
        """Raise where the optimiser has parameters that are not the network's; groups may have been
        added since the last step.
        """
        optimised = [id(parameter) for parameter in self._optimised() if parameter.requires_grad]
        if optimised == self._known:
            return
        parameters = list(self._network.parameters())
        if not any(parameter.requires_grad for parameter in parameters):
            raise ValueError("the network has no parameters to train")
        if not set(optimised) <= set(map(id, parameters)):
            raise ValueError(
                "the optimiser has parameters that are not the network's: make them parts of one"
                " torch.nn.Module"
            )
        if isinstance(self._optimiser, torch.optim.LBFGS) and not set(self._known) <= set(
            optimised
        ):
            raise ValueError(
                "parameters have been frozen, and LBFGS would move them by gradients "
                "that it remembers: freeze them before training, or call train() "
                "again with a new optimiser"
            )
        self._known = optimised

    def _optimised(self) -> list[torch.Tensor]:
        return [
            parameter for group in self._optimiser.param_groups for parameter in group["params"]
        ]

    def step(self, batch: torch.Tensor, share: float) -> None:
        """A step by some samples of this rank, which are a share of the batch."""
        if not self._takes_closure:
            self._differentiate(batch, share)
            self._optimiser.step()
            return
        # Such an optimiser moves weights between evaluations.
        weights = [parameter.detach().clone() for parameter in self._optimised()]
        state = copy.deepcopy(self._optimiser.state_dict())
        try:
            # torch states that a closure returns a float, and takes tensors.
            self._optimiser.step(cast("Any", lambda: self._evaluate(batch, share)))
        except BaseException:
            with torch.no_grad():
                for parameter, before in zip(self._optimised(), weights):
                    parameter.copy_(before)
            self._optimiser.load_state_dict(state)
            raise

    def _evaluate(self, batch: torch.Tensor, share: float) -> torch.Tensor:
        """What a closure does: the loss, a tensor as optimisers may take it for, with gradients."""
        loss = self._comm.allreduce(self._differentiate(batch, share))
        return torch.tensor(loss, dtype=torch.float64, device="cpu")

    def _differentiate(self, batch: torch.Tensor, share: float) -> float:
        """Have gradients of the loss, and return this rank's part of that."""
        if self._reduction is None:
            self._network.zero_grad()
        else:
            self._reduction.zero()
        part = self._loss(batch) if share else None
        value = agree(self._comm, lambda: self._checked_part(part, batch, share), "losses").value
        if part is not None:
            (part if share == 1 else share * part).backward()
        if self._reduction is not None:
            self._reduction.finish()
        self._check_gradients(batch)
        return share * value

    def _checked_part(self, part, batch: torch.Tensor, share: float) -> _Value:
        self._check_parameters()
        if not share:
            return _Value(0.0)
        if not isinstance(part, torch.Tensor) or part.numel() != 1 or not part.is_floating_point():
            what = (
                f"a tensor of shape {tuple(part.shape)} and {part.dtype}"
                if isinstance(part, torch.Tensor)
                else repr(part)
            )
            raise TypeError(f"loss must return a tensor with one real number, found {what}")
        if not math.isfinite(value := part.item()):
            raise ValueError(
                f"the loss of samples {_named(batch)} is {value}, and weights are as before it:"
                " training has diverged, or there is such a number in what the loss is made from"
            )
        if not part.requires_grad:
            raise ValueError(
                "the loss depends on no parameter that is trained: unfreeze some, and make it"
                " outside of torch.no_grad()"
            )
        return _Value(value)

    def _check_gradients(self, batch: torch.Tensor) -> None:
        for parameter in self._optimised():
            gradient = parameter.grad
            # A sum that is finite has finite terms; one that is not may have come out too large.
            if (
                gradient is not None
                and not math.isfinite(abs(gradient.sum().item()))
                and not _is_finite(gradient)
            ):
                name = next(
                    (
                        name
                        for name, other in self._network.named_parameters()
                        if other is parameter
                    ),
                    "a parameter",
                )
                raise ValueError(
                    f"the gradient by '{name}' of the loss of samples {_named(batch)} is not"
                    " finite, and weights are as before it: the loss is at a point where it has no"
                    " derivative, or too large for its type"
                )

    def check_weights(self) -> None:
        """Raise where steps have made weights no numbers, which a validation may not see."""
        for name, parameter in self._network.named_parameters():
            if not is_lazy(parameter) and not _is_finite(parameter.detach()):
                raise ValueError(
                    f"'{name}' of the network is not finite after an epoch: the steps were too long"
                    " for its type, and a smaller learning rate may help"
                )


@dataclass(frozen=True, repr=False)
class _Value:
    """A number that is another on each rank: ranks compare the names of such things."""

    value: float

    def __repr__(self) -> str:
        return "a loss"


def _is_finite(values: torch.Tensor) -> bool:
    dense = values.coalesce().values() if values.is_sparse else values
    return bool(dense.isfinite().all())


def _named(batch: torch.Tensor) -> str:
    numbers = batch.tolist()
    return ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")


def _required(function: Callable, leave: int = 0) -> list[str]:
    """The names of arguments, after some, that a function must be given."""
    parameters = list(inspect.signature(function).parameters.values())[leave:]
    return [
        one.name
        for one in parameters
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]


def _check_arguments(network, loss, validate, optimiser, refinement, scheduler) -> None:
    for name, value, expected in (
        ("network", network, torch.nn.Module),
        ("optimiser", optimiser, torch.optim.Optimizer),
        ("refinement", refinement, Refinement),
    ):
        if not isinstance(value, expected):
            raise TypeError(f"{name} must be a {expected.__name__}, found {value!r}")
    for name, value in (("loss", loss), ("validate", validate)):
        if not callable(value):
            raise TypeError(f"{name} must be callable, found {value!r}")
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(
            f"scheduler must be one of torch.optim.lr_scheduler, or None, found {scheduler!r}"
        )


def _check_assessments(assess, every) -> tuple:
    """Raise for what cannot be assessed, and return what ranks must have alike."""
    if every is not None:
        _check_count("assess_every", every)
    if assess is None:
        return ()
    if not isinstance(assess, Mapping):
        raise TypeError(f"assess must be a dictionary of functions by name, found {assess!r}")
    for name, function in assess.items():
        if name not in ASSESSED:
            raise ValueError(f"assess can have {' and '.join(ASSESSED)}, found {name!r}")
        if not callable(function):
            raise TypeError(f"assess[{name!r}] must be callable, found {function!r}")
    return *assess, every


def _check_count(name: str, count) -> None:
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(f"{name} must be an integer, found {count!r}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, found {count!r}")


def _check_solvers(solvers, refinement: Refinement, comm: MPI.Comm) -> None:
    """Raise for what a rank can see alone; the ranks of ``comm`` share the unknowns."""
    if not isinstance(solvers, list):
        raise TypeError(f"solvers must be a list of solvers, found {solvers!r}: write solvers=[…]")
    for solver in solvers:
        if not isinstance(solver, RefinedSolver):
            remedy = ": give its solver" if isinstance(solver, SolverLayer) else ""
            raise TypeError(
                "solvers must be of prdp_fem's LinearVariationalSolver or"
                " NonlinearVariationalSolver, found a"
                f" {type(solver).__module__}.{type(solver).__name__}{remedy}"
            )
        name = solver.problem.u.name()
        if solver.refinement is not None and solver.refinement is not refinement:
            raise ValueError(
                f"the solver for '{name}' follows another refinement than the one that train() is"
                " given, which would go up without it: give both the same object"
            )
        if (ranks := solver.problem.u.function_space().mesh().comm.size) != comm.size and ranks > 1:
            raise ValueError(
                f"the mesh of '{name}' is on {ranks} ranks, and training on {comm.size}: give "
                "comm=mesh.comm, or the ensemble that the mesh was made on"
            )
    if solvers and all(solver.refinement is None for solver in solvers):
        raise ValueError(
            "no solver follows the refinement that train() is given: make them with it, or set"
            " solver.refinement"
        )


def _check_optimiser(network, optimiser, comm: MPI.Comm, sharing: MPI.Comm) -> None:
    """Raise for optimisers that want what there is not; ranks of ``sharing`` share the unknowns."""
    name = type(optimiser).__name__
    wanted = _required(type(optimiser).step, leave=1)
    if len(wanted) > 1:
        raise TypeError(f"{name}.step must take nothing, or a closure, found {', '.join(wanted)}")
    if (
        isinstance(optimiser, torch.optim.LBFGS)
        and optimiser.param_groups[0]["line_search_fn"] is None
    ):
        # Gradients of truncated solves are not quite those of the loss, and each batch has another.
        raise ValueError(
            "LBFGS without a line search compares no losses, so that nothing tells whether a step"
            " has gone uphill, as steps from a batch to the next, and by gradients of truncated"
            ' solves, may: give it line_search_fn="strong_wolfe", or write a loop of your own,'
            " which takes it as it is"
        )
    if wanted and sharing.size > 1:
        raise ValueError(
            f"{name} compares values of the loss, of which each of {sharing.size} ranks has a part"
            " that need not add up to it: use an optimiser without a closure, or an ensemble with"
            " members of one rank"
        )
    # torch says the rest at the first step, when there has been work.
    for group in optimiser.param_groups:
        if group.get("differentiable"):
            raise ValueError(
                f"{name} with differentiable=True makes steps that are "
                "differentiated, which parameters do not allow: leave it away"
            )
        if group.get("capturable") and any(parameter.is_cpu for parameter in group["params"]):
            raise ValueError(
                f"{name} with capturable=True makes steps for CUDA graphs, found "
                "parameters on the CPU: leave it away"
            )
    if isinstance(optimiser, torch.optim.SparseAdam):
        if comm.size > 1:
            raise ValueError(
                "SparseAdam takes sparse gradients only, and those that are added up "
                "over ranks are dense: use another optimiser, or one rank"
            )
        _check_sparsity(network, optimiser)
    elif comm.size == 1:  # on several ranks they are added up dense
        _check_density(network, optimiser)


def _check_density(network: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Raise for layers with sparse gradients, of which an optimiser of torch's makes no step."""
    name = type(optimiser).__name__
    if not type(optimiser).__module__.startswith("torch.optim"):
        return
    takes_sparse = isinstance(optimiser, _TAKE_SPARSE)
    sparse = {
        id(parameter): type(layer).__name__
        for layer in network.modules()
        if getattr(layer, "sparse", False) is True
        for parameter in layer.parameters(recurse=False)
        if parameter.requires_grad
    }
    for group in optimiser.param_groups:
        options = [option for option in ("weight_decay", "fused") if group.get(option)]
        kinds = [sparse[id(one)] for one in group["params"] if id(one) in sparse]
        if kinds and (options or not takes_sparse):
            found = f"{name} with {options[0]}" if takes_sparse else name
            raise ValueError(
                f"{found} takes dense gradients only, and that by an {kinds[0]} with sparse=True "
                "is sparse: leave sparse=True away, or use SparseAdam, or SGD or Adagrad without "
                "weight_decay and fused"
            )


_TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.LBFGS)


def _check_sparsity(network: torch.nn.Module, optimiser: torch.optim.SparseAdam) -> None:
    """Raise for parameters of torch's own layers that have dense gradients."""
    optimised = {
        id(parameter)
        for group in optimiser.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    for layer in network.modules():
        if not type(layer).__module__.startswith("torch.nn.") or getattr(layer, "sparse", False):
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in optimised:
                raise ValueError(
                    "SparseAdam takes sparse gradients only, and that by the "
                    f"{name} of a {type(layer).__name__} is dense: use another "
                    "optimiser, or layers with sparse=True"
                )


def _check_scheduler(optimiser, scheduler, epochs: int) -> None:
    """Raise for schedulers that cannot make a step after each epoch."""
    if scheduler is None:
        return
    if len(wanted := _required(scheduler.step)) > 1:
        raise TypeError(
            f"{type(scheduler).__name__}.step must take nothing, or the metric, found"
            f" {', '.join(wanted)}"
        )
    if getattr(scheduler, "optimizer", optimiser) is not optimiser:
        raise ValueError(
            "scheduler is that of another optimiser than the one that train() is given: give both"
            " the same object"
        )
    if isinstance(scheduler, _SCHEDULERS.ReduceLROnPlateau):
        rates = [group["lr"] for group in optimiser.param_groups]
        if all(rate * (1 - scheduler.factor) <= scheduler.eps for rate in rates):
            raise ValueError(
                "ReduceLROnPlateau would never reduce learning rates of"
                f" {', '.join(f'{rate:g}' for rate in rates)}, since it makes no change of at most"
                f" eps={scheduler.eps:g}: make it with a smaller eps"
            )
    _check_length(scheduler, epochs)


_SCHEDULERS = torch.optim.lr_scheduler


def _check_length(scheduler, steps: int, *, from_start: bool = False) -> None:
    """Raise where a scheduler, or one inside of it, ends before it has made some steps.

    Parameters
    ----------
    scheduler : torch.optim.lr_scheduler.LRScheduler
    steps : int
    from_start : bool
        Whether another scheduler puts it to its start before them.
    """
    if isinstance(scheduler, _SCHEDULERS.OneCycleLR):
        last = steps + (0 if from_start else scheduler.last_epoch)
        if last > scheduler.total_steps:
            raise ValueError(
                f"OneCycleLR was made for {scheduler.total_steps} steps, and train(), "
                f"which makes one after each epoch, would make it go to {last}: "
                f"make it with total_steps={last}"
            )
    elif isinstance(scheduler, _SCHEDULERS.SequentialLR):
        _check_sequence(scheduler, steps)
    else:
        # A ChainedScheduler has all of them make each step, and most others have none.
        for one in getattr(scheduler, "_schedulers", ()):
            _check_length(one, steps)


def _check_sequence(scheduler: torch.optim.lr_scheduler.SequentialLR, steps: int) -> None:
    """Raise where one of a sequence of schedulers cannot start, or ends before its turn does."""
    done, last = scheduler.last_epoch, scheduler.last_epoch + steps
    turns = zip(
        scheduler._schedulers, [0, *scheduler._milestones], [*scheduler._milestones, math.inf]
    )
    for one, begin, end in turns:
        first = max(begin, done + 1)
        count = int(min(end, last + 1)) - first
        if count <= 0:
            continue
        # At a milestone torch computes the first rate of the schedule in place of a step.
        starts = begin > 0 and first == begin
        if starts and type(one).get_lr is _SCHEDULERS.LRScheduler.get_lr:
            raise ValueError(
                f"SequentialLR would come to a {type(one).__name__} after "
                f"{begin - done} epochs, which torch cannot start at a milestone: put "
                "the schedulers that are in it into the SequentialLR, or put it first"
            )
        _check_length(one, count - starts, from_start=starts)


def _check_statistics(network: torch.nn.Module, members: MPI.Comm) -> None:
    """Raise for layers that would compute with another mean on each of several members."""
    if members.size == 1:
        return
    for name, layer in network.named_modules():
        if isinstance(layer, _STATISTICAL) and (layer.training or layer.running_mean is None):
            raise ValueError(
                f"'{name}' of the network takes statistics of a batch, of which each "
                f"of {members.size} members of the ensemble has a part: use "
                "LayerNorm or GroupNorm, or ranks that share the mesh"
            )


_STATISTICAL = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


def _warn_of_what_is_not_refined(network, solvers: list, refinement: Refinement) -> None:
    layers = [module.solver for module in network.modules() if isinstance(module, SolverLayer)]
    if len(refinement.ladder) > 1 and all(
        solver.refinement is not refinement for solver in [*solvers, *layers]
    ):
        warnings.warn(
            "train() is given a refinement that none of the solvers it knows follows, and no"
            " solvers: name them, so that their work is counted",
            stacklevel=3,
        )
    for solver in solvers:
        if solver.refinement is None:
            warnings.warn(
                f"the solver for '{solver.problem.u.name()}' follows no refinement: it solves as"
                " far as its options say",
                stacklevel=3,
            )
