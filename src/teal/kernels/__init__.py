"""How a product of kept activations and weights is computed: tensors in, tensors out."""
