"""How a product of kept activations and weights is computed: tensors in, tensors out.

`ops` is the door; `dispatch` chooses a backend; `reference` defines what every backend computes.
"""
