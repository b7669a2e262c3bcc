"""Random models on random meshes under random options, each against the plain algorithm on whole tensors."""
