"""The HTTP addresses, one file for each subject."""
