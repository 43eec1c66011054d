"""Fast decoding, dense and sparse along one path."""
