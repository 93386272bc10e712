"""LaViT-nano and peers of its size on real images, trained alike through ``tools/train.py``.

From front to back: ``backbones`` says what is compared and ``tasks`` on what, ``training`` writes
the config of one training and runs it, ``study`` runs all that is missing, ``report`` writes what
came out, ``cost`` measures what it costs, and ``pictures`` draws what a model gets right and wrong.
"""
