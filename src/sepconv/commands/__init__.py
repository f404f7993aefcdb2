"""What the verbs of the command print."""
