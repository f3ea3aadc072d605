"""The newest versions that passed the contracts in ``tests/compat``, of the libraries whose private parts are used.

A range in ``pyproject.toml`` that ends, ends at the next of these. ``emloc doctor`` warns of a newer one.
"""

#: The newest version tested, and the private parts used.
TESTED = {
    "torch": ("2.15", "tensors without contents, by which memory is planned"),
    "transformers": ("5.25", "the compiling of chat templates, the loading of tensors by name, and fused experts"),
    "peft": ("0.21", "the place where adapters are put into a model"),
    "trl": ("1.16", "the loss of the tokens that count"),
    "lm-eval": ("0.4.13", "the reading of task files, and its models' tokenizers"),
}
