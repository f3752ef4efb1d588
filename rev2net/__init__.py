"""Rev2Net: the networks, the objective, training and evaluation."""
