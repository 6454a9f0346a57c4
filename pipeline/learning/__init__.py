"""Learning: the history that models are trained on, the versions in force, and who takes over."""
