"""Experiments: what each part of LaViT buys, on made-up data, in minutes a training.

From front to back: ``variants`` says what is compared, ``tasks`` on what, ``matching`` draws the
data of the fourth task, ``training`` trains one variant once, ``study`` all that an experiment asks
for, and ``report`` writes what came out.
"""
