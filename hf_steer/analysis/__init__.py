"""Experiments and pictures; nothing else imports this package but the command line."""
