"""What is deployed to Modal, and what the command line asks of Modal."""
