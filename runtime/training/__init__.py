"""Training: from rows to a trained model, in a job that has a folder and outlives its statement."""
