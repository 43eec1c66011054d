"""The reader of models on disk: which files count, tensor names, formats of quantized weights."""
