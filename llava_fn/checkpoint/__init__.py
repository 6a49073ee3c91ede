"""Files of tensors: our checkpoints, and archives of others."""
