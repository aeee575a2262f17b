"""The demonstration checkpoint: its shape, its vocabulary, its skills, and how it is trained.

Everything but `skills` needs the packages of the extra `train` (torch, transformers, safetensors, mistral-common).
"""
