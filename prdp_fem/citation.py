"""The paper behind the method, for ``-citations``."""

import petsctools

__all__ = ["cite"]

petsctools.add_citation(
    "Bhatia2025",
    r"""@inproceedings{Bhatia2025,
  author    = {Bhatia, Kanishk and Koehler, Felix and Thuerey, Nils},
  title     = {{PRDP}: Progressively Refined Differentiable Physics},
  booktitle = {The Thirteenth International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2502.19611},
}
""",
)


def cite() -> None:
    """Register the PRDP paper with PETSc, which prints it at exit under ``-citations``."""
    petsctools.cite("Bhatia2025")
