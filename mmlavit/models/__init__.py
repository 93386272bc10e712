"""The model: LaViT, its layers, and the geometry of windows."""
