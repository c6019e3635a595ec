"""Commands that look at a bundle, or at a model's folder, where it is: verify, inspect, profile.

`command` is what their command lines have in common. None of them needs transformers.
"""
