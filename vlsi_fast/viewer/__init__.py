"""What the layers of a run's models say, side by side: in the terminal, as JSON, as a page, in a local app."""
