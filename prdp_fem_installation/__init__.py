"""What can be said and done about an installation whose Firedrake, PETSc or MPI may not work."""
