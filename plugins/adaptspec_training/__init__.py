"""Training of drafters: heads on a target's hidden states, by ``adaptspec train``.

What is learnt here are weights; parameters of strategies are the tuner's.
"""
