"""The networks of Stable Diffusion v1, one file per part."""
