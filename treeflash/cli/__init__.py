"""What the commands share: options, progress, comparison, tree drawings, summaries."""
