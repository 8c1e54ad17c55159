"""The embedded models: what comes with the repository and works without a network."""
