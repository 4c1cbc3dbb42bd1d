"""What PETSc's errors say, in a few words."""

from __future__ import annotations

from petsc4py import PETSc

__all__ = ["cause_of", "remedy", "what_went_wrong"]

# PETSC_ERR_SUP, PETSC_ERR_MEM, PETSC_ERR_NOT_CONVERGED, PETSC_ERR_MISSING_FACTOR, and what petsc4py
# returns to PETSc where Python has raised something.
_NOT_SUPPORTED = 56
_NO_MEMORY = 55
_NOT_CONVERGED = 91
_NO_FACTORISATION = 92
_FROM_PYTHON = 101
# PETSC_ERR_ARG_WRONG, PETSC_ERR_ARG_OUTOFRANGE, PETSC_ERR_ARG_WRONGSTATE, PETSC_ERR_USER and
# PETSC_ERR_ARG_UNKNOWN_TYPE: it is told something wrong, or not enough, whatever the numbers are.
_TOLD_WRONG = (62, 63, 73, 83, 86)
_REMEDIES = {
    _NOT_SUPPORTED: "PETSc does not have it for this operator ({}): use another pc_type",
    _NO_MEMORY: "there is not enough memory ({}): use a pc_type that needs less",
    _NOT_CONVERGED: (
        "PETSc was told to take this for an error ({}): allow more iterations or a looser "
        "tolerance, or leave ksp_error_if_not_converged and snes_error_if_not_converged away"
    ),
    _NO_FACTORISATION: (
        "there is no such factorisation ({}): use another pc_factor_mat_solver_type, mat_type or "
        "pc_type"
    ),
    **dict.fromkeys(
        _TOLD_WRONG,
        "PETSc asks for something else ({}): give it that, or use another ksp_type or pc_type",
    ),
}
_OTHERWISE = (
    "look for NaN or infinity in the controls and coefficients, or for an operator that "
    "is singular (PETSc says: {})"
)


def cause_of(error: BaseException) -> BaseException:
    """What Python raised inside a call of PETSc's, which passed it on as its own; or the error."""
    while isinstance(error, PETSc.Error) and _code(error) == _FROM_PYTHON:
        if error.__cause__ is None:
            break
        error = error.__cause__
    return error


def _code(error: PETSc.Error) -> int:
    return error.ierr  # type: ignore[attr-defined]  # petsc4py's types do not have it


def what_went_wrong(error: Exception) -> str:
    """What PETSc says is wrong: the last line that is no place in its source."""
    lines = [
        line.partition("] ")[2]
        for line in str(error).splitlines()
        if line.startswith("[") and "() at " not in line
    ]
    return lines[-1].partition(". ")[0] if lines else str(error).partition("\n")[0]


def remedy(error: PETSc.Error) -> str:
    """What is wrong with a solve, and what to do about it."""
    return _REMEDIES.get(_code(error), _OTHERWISE).format(what_went_wrong(error))
