"""A campaign against the toolkit: kills, signals, full disks, two writers, inputs that change, hostile inputs.

``make test-chaos`` runs all of it and prints a table. Linux only: the kernel itself says what a process is about to do
to a file (see :mod:`chaos.kernel`), whoever does it: Python, safetensors' writer in Rust, torch's in C++, a child.
"""
