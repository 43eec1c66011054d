"""The reader of models on disk: where they are, which files count, quantized layouts."""
