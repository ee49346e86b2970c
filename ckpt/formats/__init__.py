"""File formats: what a file is made of, beside the bytes of tensors."""
