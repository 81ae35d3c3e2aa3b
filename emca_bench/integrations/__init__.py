"""This project's model inside other frameworks; each is imported here alone."""
