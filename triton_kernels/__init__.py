"""GPU kernels in Triton: exact, truncated and top-k local posteriors, and the merge of states.

One kernel family a file, each with its launcher. The kernels do not depend on databases or
machines: a launcher takes tensors, a plan of candidates (:mod:`els.triton_kernels.tiles`) and a
configuration.
"""
