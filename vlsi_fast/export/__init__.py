"""`vlsi-fast export`: a run's student as a checkpoint to publish. checkpoint.py writes and proves it, card.py describes
it (card.md is the card's text), scores.py reads results, command.py is the command."""
