"""What the adapter does: text and scores."""
