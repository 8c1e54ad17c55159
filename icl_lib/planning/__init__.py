"""What a card asks of a machine, and a rehearsal of it on small stand-ins."""
