"""The newest versions that EMLoC was tested with, of the libraries whose private parts it uses.

A newer one is not refused: ``emloc doctor`` names it, with what may no longer fit. Lower bounds are the package's.
"""

#: The newest version tested, and what is private there.
TESTED = {
    "torch": ("2.13", "fake tensors, by which memory is planned"),
    "transformers": ("5.24", "the compiling of chat templates, fused experts, and the trainer's loss when it resumes"),
    "trl": ("1.16", "the loss of the tokens that count"),
    "lm-eval": ("0.4.13", "the reading of task files"),
}
