"""The method, as functions of tensors."""
