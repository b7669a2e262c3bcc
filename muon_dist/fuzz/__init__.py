"""Tests random models on random meshes with random options against the plain algorithm on whole tensors."""
