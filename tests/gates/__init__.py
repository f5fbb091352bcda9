"""What is believed of a Triton kernel without a GPU: that it compiles well, and that it moves no byte twice.

python -m tests.gates              # the shapes of the published models, what `make test` gates
python -m tests.gates --all        # every shape, dtype and architecture
"""
